# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality without its engine; with it: tests/integration/test_quality.py."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.quality import longbench, report, scores
from benchmarks.quality.__main__ import (
    arguments,
    base_options,
    cells,
    failure,
    merged,
    part,
    run_engine,
)
from benchmarks.quality.cells import (
    DECODED,
    EITHER,
    FULL,
    HIDDEN,
    PERPLEXITY,
    VISIBLE,
    Cell,
    Choice,
    Result,
    config_of,
    interval,
    kind_of_seeds,
    load,
    runs,
)
from benchmarks.quality.measure import (
    Settings,
    by_engine,
    by_request,
    engine_of,
    generated,
    kept_share,
    score,
)
from benchmarks.quality.prompts import (
    CONTINUATION,
    GIVEN,
    TINY,
    Prompt,
    Prompts,
    check_tasks,
    parts,
)
from benchmarks.retrieval import TASKS
from kvcompress_vllm import policies
from kvcompress_vllm.config.options import KVCompressConfig
from kvcompress_vllm.reporting.usage import CompressionUsage

RUN = {"model": "tiny", "dtype": "auto", "base": "recent=32", "seeds": "tuning"}


# ---------------------------------------------------------------- the grid


def wanted(*flags: str) -> list[Cell]:
    return cells(arguments().parse_args(flags), [])


def test_the_grid_always_holds_the_controls() -> None:
    found = wanted("--policies", "snapkv", "--tasks", "single", "--allocators", "auto,global")
    assert found[0] == Cell(FULL, "auto", 1.0, EITHER, "", "single", 1500)
    assert len(found) == 1 + 3 * 2 * 2 and len(set(found)) == len(found)
    assert {cell.policy for cell in found} == {FULL, "streaming", "random", "snapkv"}


def test_perplexity_is_measured_over_a_compressed_context_only() -> None:
    modes = ["--questions", "visible,hidden,decoded"]
    found = wanted(*modes, "--tasks", "qa,perplexity", "--ratios", "4")
    assert {(cell.task, cell.question) for cell in found if cell.policy == "kv_compress"} == {
        ("qa", VISIBLE), ("qa", HIDDEN), ("qa", DECODED), (PERPLEXITY, HIDDEN),
        (PERPLEXITY, DECODED),
    }  # fmt: skip
    assert {cell.question for cell in found if cell.policy == FULL} == {EITHER}


def test_options_vary_where_they_mean_something() -> None:
    flags = ["--vary", "window=2,8", "--vary", "policy_options.gamma=5,50", "--tasks", "qa"]
    found = wanted(*flags, "--policies", "cake,tova", "--ratios", "4")
    assert [cell.options for cell in found if cell.policy == "cake"] == [
        f"window={window},policy_options.gamma={gamma}" for window in (2, 8) for gamma in (5, 50)
    ]
    assert [cell.options for cell in found if cell.policy == "tova"] == ["window=2", "window=8"]
    assert [cell.options for cell in found if cell.policy == "streaming"] == [""]
    config = config_of(next(c.choice for c in found if c.policy == "cake"), "recent=32")
    assert (config.window, config.recent, config.policy_options) == (2, 32, {"gamma": 5})
    assert not config.decode and not config.on_pressure


def test_all_policies_share_an_engine_at_equal_shields() -> None:
    def engines(*flags: str) -> list[list[Cell]]:
        args = arguments().parse_args(["--policies", "all", "--tasks", "qa", *flags])
        groups = by_engine(cells(args, []), base_options(args))
        assert sum(cell.policy == FULL for group in groups for cell in group) == 1
        return groups

    window, every, last = engines("--questions", "visible,hidden", "--allocators", "auto,uniform")
    assert {cell.policy for cell in every} == {"roco", "h2o", "mean_attention"}
    assert {cell.policy for cell in last} == {"scissorhands"}
    started = [json.loads(engine_of(group[-1].choice, "recent=32")) for group in (window, every)]
    assert [(e["policy"], e["recent"], e["query_stride"]) for e in started] == [
        ("streaming", 32, 0), (every[0].policy, 32, 32),
    ]  # fmt: skip
    alone = "--options", "query_stride=0"
    assert len(engines(*alone)) == 1
    assert len(engines(*alone, "--shields", "own")) == 2  # 16, and 32 where the window is kept
    assert len(engines(*alone, "--vary", "recent=32,48")) == 2
    # A window that is kept whole widens the shield of its own policy.
    assert len(engines(*alone, "--vary", "window=8,64")) == 2
    assert len(engines("--vary", "query_stride=0,1")) == 3


def test_what_is_generated_is_compressed_by_an_engine_of_its_own() -> None:
    found = wanted("--questions", "visible,hidden,decoded", "--tasks", "qa", "--ratios", "4")
    prompts, generations = by_engine(found, "")
    assert {cell.question for cell in prompts} == {EITHER, VISIBLE, HIDDEN}
    assert {cell.question for cell in generations} == {DECODED}
    for cell in [cell for cell in found if cell.policy != FULL]:
        config = config_of(cell.choice, "")
        assert config.decode == (cell.question == DECODED) and not config.on_pressure
    assert len(by_engine(wanted("--questions", "decoded", "--vary", "interval=2,8"), "")) == 2
    with pytest.raises(ValueError, match="decode=False"):
        by_engine(found, "decode=false")


@pytest.mark.parametrize(
    "flags",
    [
        ["--tasks", "sinle"],
        ["--questions", "seen"],
        ["--policies", "snapvk"],
        ["--vary", "window"],
        ["--options", "speed=9"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_named(flags: list[str]) -> None:
    args = arguments().parse_args(flags)
    word = flags[1].partition("=")[0]
    with pytest.raises(ValueError, match=word):
        by_engine(cells(args, []), base_options(args))


def test_every_task_of_the_generator_is_known() -> None:
    check_tasks([*TASKS, PERPLEXITY, "kv55", "vt4", "mine"], ["mine"])
    assert {c.task for c in wanted("--tasks", "all")} == set(TASKS)
    assert {c.task for c in wanted("--tasks", "ruler")} < set(TASKS)


def test_shards_are_a_partition() -> None:
    found = wanted("--policies", "all", "--questions", "visible,hidden", "--shields", "own")
    shards = [part(found, "", index, 3) for index in (1, 2, 3)]
    assert sorted(cell for shard in shards for cell in shard) == sorted(found)
    choices = [{cell.choice for cell in shard} for shard in shards]
    assert max(map(len, choices)) - min(map(len, choices)) <= 1
    assert sum(map(len, choices)) == len({cell.choice for cell in found})


# ---------------------------------------------------------------- the file of results


def line(cell: Cell, first_seed: int, given: list[float], **more: Any) -> dict[str, Any]:
    text = cell._asdict() | {"metric": "exact", "first_seed": first_seed, "scores": given}
    return RUN | text | more


def written(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in lines))
    return path


SNAPKV = Cell("snapkv", "auto", 4.0, VISIBLE, "", "single", 1500)


def test_a_run_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert load([path], RUN) == {}
    written(path, line(SNAPKV, 0, [1, 0]), line(SNAPKV, 2, [1]), line(SNAPKV, 7, [0]))
    (result,) = load([path], RUN).values()
    assert result.scores == {0: 1, 1: 0, 2: 1, 7: 0} and result.mean == 0.5


def test_shards_are_read_together(tmp_path: Path) -> None:
    other = SNAPKV._replace(ratio=8.0)
    a = written(tmp_path / "a", line(SNAPKV, 0, [1, 0]))
    b = written(tmp_path / "b", line(other, 0, [0, 0]))
    assert {cell: result.mean for cell, result in load([a, b]).items()} == {SNAPKV: 0.5, other: 0}


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a", line(SNAPKV, 0, [1, 0]))
    with pytest.raises(ValueError, match="recent=16"):
        load([path], RUN | {"base": "recent=16"})
    with pytest.raises(ValueError, match="twice"):
        load([path, written(tmp_path / "b", line(SNAPKV, 1, [1]))])
    with pytest.raises(ValueError, match="two metrics"):
        load([path, written(tmp_path / "b", line(SNAPKV, 2, [1], metric="f1"))])
    with pytest.raises(ValueError, match="not a result of this benchmark"):
        load([written(tmp_path / "c", {"policy": "snapkv", "samples": 10})])
    with pytest.raises(ValueError, match="no '"):
        merged([tmp_path / "none"])
    with pytest.raises(ValueError, match="test"):
        load([path, written(tmp_path / "b", line(SNAPKV, 2, [1], seeds="test"))])


def test_seeds_are_of_one_kind() -> None:
    assert kind_of_seeds(range(99_950, 100_000)) == "tuning"
    assert kind_of_seeds(range(100_000, 100_200)) == "test"
    for bad in (
        range(0),
        range(99_999, 100_001),
        range(199_999, 200_001),
        range(1_000_000, 1_000_001),
    ):
        with pytest.raises(ValueError, match=r"not accepted|--samples"):
            kind_of_seeds(bad)


def test_runs() -> None:
    assert list(runs([5, 1, 2, 7, 6, 9])) == [range(1, 3), range(5, 8), range(9, 10)]
    assert list(runs([])) == []


@pytest.mark.parametrize(
    ("right", "samples", "low", "high"),
    # Newcombe 1998, table I: the score interval without continuity correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (29, 29, 0.8830, 1.0)],
)  # fmt: skip
def test_wilson_interval(right: int, samples: int, low: float, high: float) -> None:
    assert interval(right, samples) == pytest.approx((low, high), abs=1e-4)
    result = Result("exact", dict(enumerate([1.0] * right + [0.0] * (samples - right))))
    assert result.interval() == pytest.approx((low, high), abs=1e-4)


def test_interval_of_a_mean() -> None:
    result = Result("f1", {0: 0.2, 1: 0.4, 2: 0.9})
    half = 1.96 * math.sqrt(0.26 / 2 / 3)  # sum of squared deviations 0.09 + 0.01 + 0.16
    assert result.interval() == pytest.approx((0.5 - half, 0.5 + half))
    assert Result("f1", {0: 0.3}).interval() == (-math.inf, math.inf)


# ---------------------------------------------------------------- reports


def results(*given: tuple[str, float, str, str, list[float]]) -> dict[Cell, Result]:
    return {
        Cell(policy, "auto", ratio, question, "", task, 1500): Result(
            "nats" if task == PERPLEXITY else "exact", dict(enumerate(values))
        )
        for policy, ratio, question, task, values in given
    }


MEASURED = results(
    (FULL, 1.0, EITHER, "qa", [1, 1]),
    ("tova", 4.0, VISIBLE, "qa", [1, 0]),
    ("tova", 4.0, VISIBLE, "single", [0, 0]),
    ("knorm", 4.0, VISIBLE, "qa", [1, 1]),
    ("knorm", 4.0, HIDDEN, "qa", [0, 1]),
    (FULL, 1.0, EITHER, PERPLEXITY, [2.0, 3.0]),
    ("tova", 4.0, HIDDEN, PERPLEXITY, [2.5, 3.25]),
    ("knorm", 4.0, HIDDEN, PERPLEXITY, [2.25, 3.125]),
)


def test_tasks_are_added_up_and_the_best_comes_first() -> None:
    rows = report.by_choice(MEASURED, "retrieval tasks")
    assert [(c.policy, c.question, r.mean, r.samples) for c, r in rows.items()] == [
        (FULL, EITHER, 1.0, 2), ("knorm", HIDDEN, 0.5, 2),
        ("knorm", VISIBLE, 1.0, 2), ("tova", VISIBLE, 0.25, 4),
    ]  # fmt: skip
    assert [c.policy for c in report.by_choice(MEASURED, PERPLEXITY)] == [FULL, "knorm", "tova"]


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_tables(MEASURED)
    lines = capsys.readouterr().out.splitlines()
    assert any(text.split() == ["visible", "4", "tova", "0.250", "0.046", "0.699", "0.500", "0.000"]
               for text in lines)  # fmt: skip
    # The loss against the full cache, pair by pair: 0.5 and 0.25, so 0.375 +- 0.245.
    row = ["hidden", "4", "tova", "2.875", "0.130", "0.620", "2.875"]
    assert any(text.split() == row for text in lines)


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(MEASURED, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="with --heat-map"):
        report.heat_map(MEASURED, tmp_path / "heat.png")
    cell = next(cell for cell in MEASURED if cell.policy == "tova")
    two = {
        cell: Result("exact", {0: 1.0}, [(1, [[0.5, 0.0]]), (3, [[0.1, 1.0]])]),
        cell._replace(task="kv40"): Result("exact", {0: 1.0}, [(4, [[0.4, 0.75]])]),
    }
    assert report.kept_maps(two)[cell.choice] == [pytest.approx([0.3, 0.75])]
    report.heat_map(two, tmp_path / "heat.png")
    assert (tmp_path / "heat.png").stat().st_size > 5_000


def test_kept_pages_of_all_ranks() -> None:
    ranks = [{"1-ab": [[8, 2], [4, 4]], "11-cd": [[0, 0]] * 2}, {"1-ef": [[1, 3], [6, 0]]}]
    assert by_request(ranks, "1") == [[8, 2, 1, 3], [4, 4, 6, 0]]
    ranks[1]["1-ef"][1][1] = 4  # 32 pages of 8 heads are 4 blocks
    usage = CompressionUsage(compressions=2, blocks_before=9, blocks_after=5)  # one in the tail
    assert kept_share(ranks, "1", usage) == [[1, 0.25, 0.125, 0.375], [0.5, 0.5, 0.75, 0.5]]
    assert by_request(ranks, "2") is None and kept_share(ranks, "2", usage) is None


# ---------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(TINY)


def test_the_context_ends_before_the_question(tokenizer: Any) -> None:
    prompts = Prompts(str(TINY), tokenizer, 2048)
    for seed, task in enumerate(TASKS):
        prompt = prompts.get(task, 600, seed)
        text, answer = prompts._generator.task(task, 600, seed)
        assert prompt.tokens == tokenizer.encode(text)
        context, rest = (
            tokenizer.decode(part)
            for part in (prompt.tokens[: prompt.context_tokens],
                         prompt.tokens[prompt.context_tokens :])
        )  # fmt: skip
        assert context + rest == "<s>" + text
        assert rest.count("\n") == 1 and rest.startswith("\n") and rest.endswith("<|assistant|>")
        assert prompt.answers == (answer,) and prompt.metric == "exact"
        assert prompt.max_tokens > len(tokenizer.encode(answer, add_special_tokens=False))


class Foreign:
    """A tokenizer without the generator's markers, and with a template that strips."""

    chat_template = "yes"
    bos_token_id = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[None]:
        return [None] * len(tokens)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return self._tokenizer.encode(text, add_special_tokens=False)

    def apply_chat_template(self, messages: list, tokenize: bool, add_generation_prompt: bool):
        assert not tokenize and add_generation_prompt
        return f"Be kind.\nQ: {messages[0]['content'].strip()}\nA:"


def test_other_models_are_asked_through_their_template(tokenizer: Any) -> None:
    prompts = Prompts("unknown", Foreign(tokenizer), 2048)
    prompt = prompts.get("multiquery", 600, 3)
    before = tokenizer.decode(prompt.tokens[: prompt.context_tokens])
    after = tokenizer.decode(prompt.tokens[prompt.context_tokens :])
    assert before.startswith("Be kind.\nQ: ") and after.endswith("nothing else.\nA:")
    assert "?" in after and "<|" not in before + after
    assert prompt.metric == "recall" and 2 <= len(prompt.answers) <= 4
    reply = " and ".join(prompt.answers[1:])
    assert prompt.score(reply, ended=False) == pytest.approx(1 - 1 / len(prompt.answers))
    tokens, context = prompts._chat("  spaces first", " then asked ")
    assert tokenizer.decode(tokens[:context]) == "Be kind.\nQ: spaces first"
    assert tokenizer.decode(tokens[context:]) == " then asked\nA:"


class Coarse(Foreign):
    """Three characters a token."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [hash(text[i : i + 3]) for i in range(0, len(text), 3)]


class Fine(Foreign):
    """A token a character."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]


def test_lengths_are_of_the_models_own_tokens(tokenizer: Any) -> None:
    prompts = Prompts("unknown", Foreign(tokenizer), 20000)
    for kind in (Foreign, Coarse, Fine):
        prompts._tokenizer = kind(tokenizer)
        for task in ("single", "vt2", PERPLEXITY):
            prompt = prompts.get(task, 4000, 1)
            assert 0.8 * 4000 < len(prompt.tokens) <= 4000, (kind, task)
            assert prompt == prompts.get(task, 4000, 1)


def test_plain_text(tokenizer: Any) -> None:
    prompts = Prompts(str(TINY), tokenizer, 2048)
    prompt = prompts.get(PERPLEXITY, 900, 1)
    assert len(prompt.tokens) - prompt.context_tokens == CONTINUATION
    assert 600 < len(prompt.tokens) <= 900 and prompt.tokens[0] == tokenizer.bos_token_id
    assert prompt.tokens == prompts.get(PERPLEXITY, 900, 1).tokens
    assert prompt.tokens != prompts.get(PERPLEXITY, 900, 2).tokens
    with pytest.raises(ValueError, match="perplexity at 300"):
        prompts.get(PERPLEXITY, 300, 1)


def test_samples_must_fit_the_model(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="the model takes 512"):
        Prompts(str(TINY), tokenizer, 512).get("single", 600, 0)


def test_exact_answers_end() -> None:
    prompt = Prompt([1], 1, ("42",), 4, "exact")
    assert prompt.score(" 42", ended=True) == 1
    assert prompt.score("42", ended=False) == 0 and prompt.score("421", ended=True) == 0


def output(tokens: list[int], logprobs: Any = None) -> Any:
    completion = SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="stop")
    return SimpleNamespace(request_id="7", outputs=[completion], prompt_logprobs=None)


def test_the_answer_begins_after_what_is_generated() -> None:
    text = SimpleNamespace(decode=lambda tokens, skip_special_tokens: " ".join(map(str, tokens)))
    prompt = Prompt([*range(GIVEN + 3)], 2, ("42",), 4, "exact")
    last = [GIVEN, GIVEN + 1, GIVEN + 2]
    visible, decoded = Choice("tova", question=VISIBLE), Choice("tova", question=DECODED)
    assert generated(visible, prompt) == [] and generated(decoded, prompt) == last
    assert score(output([42]), visible, prompt, text) == 1
    assert score(output([*last, 42]), decoded, prompt, text) == 1
    assert score(output([*last, 41]), decoded, prompt, text) == 0
    with pytest.raises(RuntimeError, match="7 did not generate the 3 tokens"):
        score(output([42]), decoded, prompt, text)
    with pytest.raises(ValueError, match=f"of {GIVEN} tokens is not accepted"):
        generated(decoded, Prompt([*range(GIVEN)], 2, ("42",), 4, "exact"))


def test_the_loss_of_what_is_generated() -> None:
    prompt = Prompt([*range(GIVEN + 4)], GIVEN + 1, (), 1, "nats")
    assert list(prompt.measured) == [GIVEN + 2, GIVEN + 3]
    last = [*range(GIVEN, GIVEN + 4)]
    known = [{token: SimpleNamespace(logprob=-0.5 * i)} for i, token in enumerate(last)]
    decoded = Choice("tova", question=DECODED)
    assert score(output(last, known), decoded, prompt, None) == pytest.approx((1.0 + 1.5) / 2)


def test_nothing_but_the_generation_is_compressed() -> None:
    assert KVCompressConfig().min_prompt_tokens > GIVEN


def test_parts_of_an_answer() -> None:
    assert parts("vt2", "C = B = 48213") == ("C", "B", "48213")
    assert parts("multivalue", "1, 22, 3") == ("1", "22", "3")
    assert parts("multiquery", "Old Town: 7; Rome: 12") == ("7", "12")
    assert parts("copy", "a, b = c") == ("a, b = c",)


# ---------------------------------------------------------------- LongBench


def test_scores() -> None:
    pytest.importorskip("rapidfuzz")
    assert scores.f1("The big, red house!", "a red house") == pytest.approx(2 * 2 / 5)
    assert scores.f1("no", "yes") == 0
    # "the cat sat" of 4 and 6 words in common order.
    assert scores.rouge_l("The cat sat up.", "the cat that never sat there") == pytest.approx(0.6)
    assert scores.rouge_l("", "words") == 0
    classes = ["Food", "Food product", "Animal"]
    assert scores.class_match("It is a Food product", "Food product", classes) == 1
    assert scores.class_match("Food or Animal", "Animal", classes) == 0.5
    assert scores.class_match("Food", "Animal", classes) == 0
    assert scores.edit_similarity("```python\nabcd\nrest", "abcf") == 0.75
    assert scores.number_match("Paragraph 12 or 3", "Paragraph 12") == 0.5
    assert scores.number_match("112", "12") == 0
    assert scores.recall("It is PARIS.", "Paris") == 1
    assert scores.best("f1", "red", ["blue", "red house", "red"], []) == 1


def row(**more: Any) -> dict[str, Any]:
    known = {"input": "Who?", "context": "Ann sang. " * 200, "answers": ["Ann", "She"],
             "all_classes": None, "dataset": "hotpotqa", "length": 400}  # fmt: skip
    return known | more


def test_files_in_the_format_of_longbench(tmp_path: Path, tokenizer: Any) -> None:
    trec = row(dataset="trec_e", input="Type:", answers=["Human"], all_classes=["Human", "Place"])
    file = written(tmp_path / "rows.jsonl", row(), trec, row(input="Why?"))
    found = Settings("", longbench=(str(file),)).data_sets()
    assert {name: len(data.rows) for name, data in found.items()} == {"hotpotqa": 2, "trec_e": 1}
    prompts = Prompts(str(TINY), tokenizer, 300, found)
    prompt = prompts.get("hotpotqa", 0, 1)
    assert len(prompt.tokens) == 300 - 32 and prompt.metric == "f1"
    after = tokenizer.decode(prompt.tokens[prompt.context_tokens :])
    assert "Question: Why?" in after and "Ann sang" not in after
    assert tokenizer.decode(prompt.tokens[: prompt.context_tokens]).endswith("Ann sang. ")
    assert prompt.score("It was Ann", ended=True) == pytest.approx(0.5)
    prompt = prompts.get("trec_e", 0, 0)
    assert "<|user|>" not in tokenizer.decode(prompt.tokens)  # examples are continued
    assert prompt.score("\nHuman\nPlace", ended=False) == 1
    assert prompt.score("Place\nHuman", ended=False) == 0


def test_templates(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows.jsonl", row(dataset="mine"))
    templates = tmp_path / "templates.json"
    with pytest.raises(ValueError, match=r"line 1: no template for data set 'mine'"):
        longbench.read([rows])
    mine = {"prompt": "Text: {context} Q: {input}", "metric": "rouge_l", "max_tokens": 9}
    templates.write_text(json.dumps({"mine": mine, "trec": {"metric": "f1"}}))
    form = longbench.read([rows], templates)["mine"].form
    assert form.render(row(context="{x}")) == ("Text: {x}", " Q: Who?")
    assert (form.metric, form.max_tokens) == ("rouge_l", 9)
    for bad, reason in [
        ({"prompt": "{input} {context}", "metric": "f1", "max_tokens": 9}, "before {input}"),
        ({**mine, "metric": "bleu"}, "bleu"),
        ({**mine, "speed": 1}, "speed"),
        ({**mine, "max_tokens": 0}, "max_tokens=0"),
        ({"metric": "f1"}, "needs prompt"),
    ]:
        templates.write_text(json.dumps({"mine": bad}))
        with pytest.raises(ValueError, match=reason):
            longbench.read([rows], templates)
    without = written(tmp_path / "bad.jsonl", {"input": "", "context": ""})
    with pytest.raises(ValueError, match="line 1: no field 'answers'"):
        longbench.read([without])


def test_the_middle_is_left_out() -> None:
    tokens = list(range(100))
    assert longbench.truncated(tokens, 80, 100) == (tokens, 80)
    kept, context = longbench.truncated(tokens, 80, 60)
    assert kept == [*range(30), *range(70, 100)] and context == 40
    assert kept[context:] == [*range(80, 100)]
    assert longbench.truncated(tokens, 50, 60)[1] == 30  # the cut takes some of the rest
    assert len(longbench.truncated(tokens, 80, 61)[0]) == 61


def test_choices_name_what_is_not_their_own() -> None:
    assert report.label(Choice("cake", "global", 4.0, VISIBLE, "window=8")) == (
        "cake, global, window=8"
    )
    assert set(policies.BUILT_IN) >= {"streaming", "random"}


def test_differences_from_the_reference_are_explained_or_not() -> None:
    pytest.importorskip("transformers")
    import torch

    from benchmarks.quality.reference import Comparison, compare_kept, expected
    from tests.policies import prompts

    config = prompts.config("kv_compress", ratio=4, window=8, pool=1)
    attention = prompts.random_prompt(213, 0)
    wanted, literal_scores = expected(config, attention)

    def compared(kept: list[list[int]], given: torch.Tensor = literal_scores) -> Comparison:
        result = Comparison()
        compare_kept(config, attention, kept, wanted, given, "x", result)
        return result

    assert compared(wanted) == Comparison(heads=6, same_heads=6, keys=sum(map(len, wanted)))
    score = literal_scores[0]
    worst = min((j for j in wanted[0] if 4 <= j < 190), key=lambda j: score[j])
    other = min(j for j in range(4, 190) if j not in wanted[0])
    swapped = [sorted({*wanted[0], other} - {worst}), *wanted[1:]]
    result = compared(swapped)
    assert (result.same_heads, result.swapped, len(result.unexplained)) == (5, 1, 1)
    close = literal_scores.clone()
    close[0, other] = score[worst] * (1 - 1e-6)
    result = compared(swapped, close)
    assert (result.swapped, len(result.notes), result.unexplained) == (1, 1, [])
    moved = [wanted[0][16:], [*range(208)], *wanted[2:]]
    result = compared(moved)
    assert result.moved == 12 - len(wanted[1]) // 16 + 1 and len(result.unexplained) >= 1


# ---------------------------------------------------------------- engines that end


ENDING_ENGINE = """#!{python}
import json, os, sys
given = json.load(sys.stdin)
cell, seeds = given["missing"][0]
names = ["policy", "allocator", "ratio", "question", "options", "task", "length"]
line = dict(zip(names, cell)) | {{"metric": "exact", "first_seed": 0, "scores": [1.0]}}
print("Traceback (most recent call last):\\n  the client's\\nEngineDeadError", file=sys.stderr)
sys.stderr.flush()
print("(EngineCore pid=7) INFO all is well")
print(json.dumps(line))
for text in ("Traceback (most recent call last):", "  step", *["  frame"] * 90, "ValueError: why"):
    print("(EngineCore pid=7) ERROR", text)
os.write(2, b"x" * 5000 + b"\\n")  # at once: the reader writes to the same file
sys.exit(3)
"""


def test_an_engine_that_ends_shows_its_own_traceback_and_leaves_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, output = tmp_path / "engine", tmp_path / "results.jsonl"
    engine.write_text(ENDING_ENGINE.format(python=sys.executable))
    engine.chmod(0o755)
    output.with_suffix(".log").write_text("(EngineCore pid=1) Traceback (most recent call last)\n")
    monkeypatch.setattr("benchmarks.quality.__main__.sys.executable", str(engine))
    bar = SimpleNamespace(set_description=lambda text: None, update=lambda count: None)
    cell = Cell("snapkv", "auto", 4.0, VISIBLE, "", "single", 600)
    with pytest.raises(SystemExit, match=r"status 3; 1 results kept; its log is .*results\.log"):
        run_engine({cell: [0, 1]}, Settings("m"), RUN, output, bar)
    shown = capsys.readouterr().err
    assert shown.startswith("(EngineCore pid=7) ERROR Traceback (most recent call last):\n")
    assert shown.endswith("(EngineCore pid=7) ERROR ValueError: why\n")
    assert "client" not in shown and "xxx" not in shown
    log = output.with_suffix(".log").read_text()
    assert log.startswith("(EngineCore pid=1)") and "x" * 5000 in log
    assert "INFO all is well" in log and "ValueError: why" in log and "the client's" in log
    assert load([output])[cell].scores == {0: 1.0}


def test_failures_without_a_traceback_of_an_engine_process() -> None:
    assert failure(["a", "Traceback (most recent call last):", " b", "c"]).splitlines()[0][0] == "T"
    assert failure([f"line {i}" for i in range(50)]).splitlines()[0] == "line 10"

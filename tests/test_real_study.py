# SPDX-License-Identifier: Apache-2.0
"""benchmarks/real: its model, scores, masks, samples and tables, on the bundled model."""

import json
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.lm_eval.scoring import process_results
from benchmarks.masking_study import Llama, Setting, kept_keys
from benchmarks.real import (
    calibration,
    decoded,
    engine,
    formats,
    policies,
    report,
    samples,
    scores,
    study,
)
from benchmarks.real.__main__ import parser
from benchmarks.real.masks import Shields, count, keep
from benchmarks.real.model import Model

TINY = Path(__file__).parents[1] / "models" / "tiny"
LENGTH = 230


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return Model(TINY, "cpu", torch.float32)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(10, 4000, (1, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def sample(tokens: Tensor) -> samples.Sample:
    asked = [samples.Question("a", [5, 6, 7], [8, 9]), samples.Question("b", [5, 7], [9, 9, 4])]
    return samples.Sample("toy", LENGTH, 0, tokens[0].tolist(), asked)


def test_the_model_is_that_of_the_other_study(model, tokens):
    context = model.prefill(tokens)
    other = Llama(TINY)
    prompt = other.prefill(tokens[0].tolist())
    torch.testing.assert_close(context.keys[0], prompt.keys)
    torch.testing.assert_close(context.queries[0], prompt.queries)
    kept = torch.rand(3, *prompt.keys.shape[:-1], generator=torch.Generator().manual_seed(0)) > 0.5
    kept[..., :2] = True
    after = torch.tensor([[3, 4, 5, 6]])
    mine, found = model.follow(
        context.keys, context.values, kept[None], after[None], LENGTH, torch.arange(4)[None, None]
    )
    theirs = other.continue_masked(prompt, kept, after.expand(3, -1))
    torch.testing.assert_close(mine[0, :, 0], theirs, rtol=1e-4, atol=1e-4)
    assert found is None


@pytest.mark.parametrize("allocator", ["global", "layer", "uniform"])
@pytest.mark.parametrize("ratio", [1, 2, 8])
def test_masks_are_those_of_the_other_study(model, tokens, allocator, ratio):
    prompt = Llama(TINY).prefill(tokens[0].tolist())
    setting = Setting(ratio=ratio, allocator=allocator, pool=7, recent=32)
    context = model.prefill(tokens, details=True)
    evidence = policies.Evidence(model, context, tokens, [5], Shields())
    score = policies.POLICIES["kv_compress_p7"].score(evidence, ratio)
    candidates = LENGTH // 16 * 16
    score = scores.pooled(evidence.window(8, "squares")[..., :candidates], 7)
    score = torch.nn.functional.pad(score, (0, LENGTH - candidates))
    mine = keep(score[None], ratio, Shields(), allocator)[0]
    assert torch.equal(mine, kept_keys(prompt, setting))


def test_pages_of_earlier_rounds_are_freed_first():
    first = torch.rand(1, 2, 2, 256, generator=torch.Generator().manual_seed(1))
    shields = Shields()
    left = keep(first, 2, shields)
    again = keep(first, 4, shields, present=left)
    assert not (again & ~left).any()
    assert again.sum() == count(256, 4, shields).kept * 16 * 4
    # The same scores at once keep the same keys.
    assert torch.equal(again, keep(first, 4, shields))


def literal_echo(
    q: Tensor, k: Tensor, rotate, scale: float, segment: int, delta: float, before: int = 0
) -> list[list[list[list[float]]]]:
    """Probabilities by head, key, query head and query of the key's segment."""
    heads, group, length, _ = q.shape
    result: list = [[[[] for _ in range(group)] for _ in range(length)] for _ in range(heads)]
    for h in range(heads):
        for begin in range(0, length, segment):
            end = min(length, begin + segment)
            # The first keys stand beside every segment, once more than among its own.
            beside = [*range(4), *range(max(4, begin - before), begin)]
            for g in range(group):
                for i in range(begin, end):
                    ahead = rotate(q[h, g, i], torch.tensor(delta))
                    old = [math.exp(float(ahead @ k[h, j]) * scale) for j in range(begin, end)]
                    z = sum(old) + sum(math.exp(float(ahead @ k[h, j]) * scale) for j in beside)
                    z += sum(
                        math.exp(float(q[h, g, i] @ k[h, j]) * scale) for j in range(begin, i + 1)
                    )
                    for j, e in enumerate(old, begin):
                        result[h][j][g].append(e / z)
    return result


def reduced(literal: list[list[list[list[float]]]], reduce) -> Tensor:
    return torch.tensor([[reduce(by_query_head) for by_query_head in head] for head in literal])


def highest(rows: list[list[float]]) -> float:
    return max(max(row) for row in rows)


def mean_of_two(rows: list[list[float]]) -> float:
    return sum(sorted(p for row in rows for p in row)[-2:]) / 2


@pytest.mark.parametrize("segment", [16, 24])
def test_echo_is_its_formula(model, segment):
    generator = torch.Generator().manual_seed(2)
    k = torch.randn(2, 40, model.head_dim, generator=generator)
    q = torch.randn(2, 2, 40, model.head_dim, generator=generator)
    literal = literal_echo(q, k, model.rotate, 0.3, segment, 17.0)
    for reduce, by_formula in (
        (None, highest),
        (scores.group_mean, lambda rows: sum(map(max, rows)) / len(rows)),
        (scores.second_mean, mean_of_two),
    ):
        mine = scores.echo(k, q, model.rotate, 0.3, segment, 17.0, reduce=reduce)
        torch.testing.assert_close(mine, reduced(literal, by_formula), rtol=1e-4, atol=1e-6)
    for before in (8, 100):
        mine = scores.echo(k, q, model.rotate, 0.3, segment, 17.0, before=before)
        literal = literal_echo(q, k, model.rotate, 0.3, segment, 17.0, before)
        torch.testing.assert_close(mine, reduced(literal, highest), rtol=1e-4, atol=1e-6)


def test_what_moves_budget_between_heads_and_tokens_is_its_formula(model, tokens):
    generator = torch.Generator().manual_seed(5)
    score = torch.rand(2, 3, 30, generator=generator) ** 4
    agreed = scores.agreed(score, 0.5)
    carried, odds = scores.carried(score, 0.25), scores.odds(score)
    levelled = scores.levelled(score, 0.5)
    mean = float(score.mean())
    for layer, head, j in product(range(2), range(3), range(30)):
        one = float(score[layer, head, j])
        token = sum(float(score[a, b, j]) for a, b in product(range(2), range(3))) / 6
        assert float(agreed[layer, head, j]) == pytest.approx(one * math.sqrt(token / mean))
        spread = max(float(score[layer, head, i]) * 0.25 ** (j - i) for i in range(j + 1))
        assert float(carried[layer, head, j]) == pytest.approx(spread, rel=1e-4)
        assert float(odds[layer, head, j]) == pytest.approx(one / max(1 - one, 1 / 64), rel=1e-4)
        ordered = sorted(score[layer, head].tolist())
        # Rank 26.1 of 0 to 29.
        level = ordered[26] + 0.1 * (ordered[27] - ordered[26])
        assert float(levelled[layer, head, j]) == pytest.approx(one / math.sqrt(level), rel=1e-4)
    evidence = policies.Evidence(model, model.prefill(tokens), tokens, [5], Shields())
    values = evidence.values
    far = torch.stack([
        torch.stack([(v - v.mean(0)).square().sum(-1).sqrt() for v in layer]) for layer in values
    ])  # fmt: skip
    torch.testing.assert_close(evidence.value_spread, far / far.mean(), rtol=1e-4, atol=1e-5)


def test_echo_of_a_generation_is_that_of_its_segments(model, tokens):
    """Segments of 64 scored when they are complete, whenever compressions came."""
    context = model.prefill(tokens)
    whole = scores.echo(context.keys[0], context.queries[0], model.rotate, model.scale, 64, 256.0)
    stored: dict[str, Tensor] = {}
    begin = 0
    for end in (80, 144, LENGTH):
        view = decoded.View(
            model, context.keys[..., :end, :], context.values[..., :end, :],
            context.queries[..., :end, :], torch.ones(context.keys.shape[:-1])[..., :end].bool(),
            begin, 4, Shields(), {}, stored,
        )  # fmt: skip
        score = view.echo(64, 256)
        begin = end
    torch.testing.assert_close(score[0], whole)


def test_tables_put_heads_on_the_scale_of_a_repetition():
    generator = torch.Generator().manual_seed(0)
    exact = torch.rand(2, 3, 4000, generator=generator)
    foreseen = (0.01 * exact) ** 2  # the same order, on another scale
    table = calibration.Table(foreseen, exact)
    some = foreseen[..., :300]
    high = exact[..., :300] > 0.5  # knots get denser towards what decides
    torch.testing.assert_close(table(some)[high], exact[..., :300][high], rtol=0.03, atol=0)
    ordered = table(some.sort(-1).values)
    assert (ordered[..., 1:] >= ordered[..., :-1]).all()
    # Beyond all that was seen, further on.
    assert (table(foreseen.amax(-1, keepdim=True) * 4) > exact.amax(-1, keepdim=True)).all()


def test_formats_come_back_within_half_a_step():
    """What is not there has no say in the ranges."""
    generator = torch.Generator().manual_seed(4)
    vectors = torch.randn(2, 3, 100, 64, generator=generator) * 10 ** torch.linspace(-2, 1, 64)
    kept = torch.rand(2, 3, 100, generator=generator) > 0.4
    kept[0, 0] = False
    kept[0, 1] = False
    kept[0, 1, 7] = True
    vectors[~kept] = vectors[~kept] * 1000
    for name, form in formats.FORMATS.items():
        for quantise in (form.keys, form.values):
            assert quantise(vectors, kept).isfinite().all(), name
    low, high = formats.ranges(vectors, kept)
    step = ((high - low) / 15).expand_as(vectors)[kept]
    error = (formats.by_channel(vectors, kept)[kept] - vectors[kept]).abs()
    assert (error <= step / 2 + 1e-5 * vectors[kept].abs() + 1e-6).all()
    again = formats.by_channel(formats.by_channel(vectors, kept), kept)
    torch.testing.assert_close(again[kept], formats.by_channel(vectors, kept)[kept])
    coarse = formats.fp8(vectors, kept)[kept]
    largest = vectors[kept].abs().amax()
    assert ((coarse - vectors[kept]).abs() <= 2**-4 * vectors[kept].abs() + largest / 2**16).all()
    turn = formats.hadamard(8, torch.device("cpu"))
    torch.testing.assert_close(turn @ turn, torch.eye(8))


@pytest.mark.parametrize("mode", study.MODES)
def test_equal_bytes_of_fewer_bits_are_more_keys(model, sample, mode):
    plan = study.Plan(
        [study.PRODUCT[mode]], [4.0], [Shields(recent=16)], [5], 64,
        page_dtypes=["auto", "fp8", "int4", "exact4"],
    )  # fmt: skip
    lines = list(
        study.generated(model, [sample], plan)
        if mode == study.DECODED
        else study.once(model, sample, mode, plan)
    )
    found = {line["page_dtype"]: line for line in lines if line["policy"] != "full"}
    assert list(found) == plan.page_dtypes
    full = next(line for line in lines if line["policy"] == "full")
    if mode != study.DECODED:
        # All keys stay: what is lost is what 4 bits lose.
        assert found["exact4"]["tasks"] == full["tasks"]
        assert found["int4"]["tasks"] != full["tasks"]
    else:
        held = [found[name]["held"] for name in ("auto", "fp8", "int4")]
        assert held[0] < held[1] < held[2] == 1


def test_a_generation_is_compressed_as_the_engine_would():
    assert list(decoded.schedule(700, 2, Shields())) == [256, 512]
    assert list(decoded.schedule(700, 2, Shields(page=64), 4)) == [192, 384, 576]
    assert list(decoded.schedule(500, 4, Shields())) == [176, 352]
    assert list(decoded.schedule(500, 1, Shields())) == []


def test_a_generation_reads_over_what_is_left(model, tokens):
    keys, values, present = decoded.generate(
        model, tokens, ["streaming", "echo64"], 4, Shields(recent=16), {}
    )
    context = model.prefill(tokens)
    assert (~present).flatten(1).any(1).all()
    left = present[0, 0, 0].nonzero().flatten().tolist()
    assert set(range(4)) <= set(left) and left[-50:] == list(range(LENGTH - 50, LENGTH))
    # Only what was read after the first compression differs.
    first = next(decoded.schedule(LENGTH, 4, Shields(recent=16)))
    torch.testing.assert_close(keys[0, ..., :first, :], context.keys[0, ..., :first, :])
    assert not torch.allclose(values[0, -1, ..., first:, :], context.values[0, -1, ..., first:, :])


@pytest.mark.parametrize("mode", study.MODES)
def test_what_keeps_everything_answers_as_the_full_cache(model, sample, mode):
    names = ["echo"] if mode != study.DECODED else ["echo64"]
    plan = study.Plan(names, [1.0, 4.0], [Shields()], [5, 6], rows=64)
    if mode == study.DECODED:
        lines = list(study.generated(model, [sample], plan))
    else:
        lines = list(study.once(model, sample, mode, plan))
    assert [line["policy"] for line in lines] == ["full", *names * 2]
    full, all_kept, few_kept = (line["tasks"] for line in lines)
    assert list(full) == ["a", "b"]
    for task, (right, likelihood) in full.items():
        assert all_kept[task] == [right, pytest.approx(likelihood, abs=0.01)]
    assert few_kept != full


def test_samples_have_facts_and_exact_lengths(tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "texts" / "words").mkdir(parents=True)
    text = " ".join(f"This is sentence {i} of a long text about nothing." for i in range(900))
    (tmp_path / "texts" / "words" / "a.txt").write_text(text)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    maker = samples.Maker(tokenizer, tmp_path / "texts")
    made = maker.facts("words", 900, 7)
    assert len(made.context) == 900
    assert [question.task for question in made.questions] == list(samples.TASKS)
    context = tokenizer.decode(made.context)
    for question in made.questions:
        begun = tokenizer.decode(question.asked).split("Answer: ")[1]
        assert begun.strip() + " " + tokenizer.decode(question.answer).strip() in context
        assert len(question.answer) > 1  # the first token is free where the question is visible
    path = tmp_path / "samples.jsonl"
    assert samples.write([made], path) == 1
    assert list(samples.read(path)) == [made]
    rows = tmp_path / "facts.jsonl"
    assert samples.write_text([made], rows, tokenizer.decode) == 1
    row = json.loads(rows.read_text().splitlines()[0])
    assert process_results(row, [row["answer"] + ", and so on"]) == {"right": 1.0}
    assert process_results(row, ["nothing"]) == {"right": 0.0}
    flowing = maker.text("words", 100, 20, 7)
    assert (len(flowing.context), len(flowing.continuation)) == (100, 20)
    with pytest.raises(ValueError, match="length 100 is not accepted"):
        maker.facts("words", 100, 7)


def test_held_out_texts_are_in_no_other_half(tmp_path):
    for index in range(11):
        (tmp_path / f"{index:02}.txt").write_text(f"text {index}")
    held, others = samples.documents(tmp_path, True), samples.documents(tmp_path, False)
    assert held == ("text 0", "text 5", "text 10")
    assert sorted(held + others) == sorted(samples.documents(tmp_path))


def test_tables_say_what_share_of_the_full_caches_answers_is_left(tmp_path, capsys):
    def line(policy: str, seed: int, right: int, ratio: float) -> dict:
        return {
            "mode": "hidden", "source": "essays", "length": 1000, "seed": seed, "policy": policy,
            "ratio": ratio, "page": 16, "recent": 32, "floor": 16, "min_budget": 0,
            "tasks": {"a": [right, -1.0], "b": [1, -1.0]},
        }  # fmt: skip

    lines = [line("full", s, 1, 1.0) for s in range(4)]
    lines += [line("echo", s, s % 2, 4.0) for s in range(4)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    cell = report.cells(lines, ["mode"])[("hidden",)]
    share, low, high = cell["echo", 16, 32, 16, 0, "auto"][4.0].share(cell["full",][1.0])
    assert share == 0.75 and low < 0.75 < high
    args = parser().parse_args(["table", str(path)])
    args.action(args)
    printed = capsys.readouterr().out
    assert "full cache 1.000" in printed and "0.75 (" in printed
    assert report.interval(8, 8)[0] == pytest.approx(0.676, abs=1e-3)
    two = SimpleNamespace(right={}, likelihood={})
    assert report.interval(len(two.right), 0) == (0.0, 1.0)


@pytest.fixture
def gemma(tmp_path):
    """One of ``transformers`` with random weights, and where it is."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=8, query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    # As the converter writes them: benchmarks/models/convert.py.
    written = json.loads((tmp_path / "config.json").read_text())
    written |= {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    (tmp_path / "config.json").write_text(json.dumps(written))
    return theirs, tmp_path


def test_gemma_is_that_of_transformers(gemma):
    """Sliding windows, norms of queries and keys, two rotations; on random weights."""
    theirs, folder = gemma
    mine = Model(folder, "cpu", torch.float32)
    assert mine.layers == [1]
    tokens = torch.randint(64, (1, 40))
    with torch.inference_mode():
        expected = theirs(tokens).logits
    context = mine.prefill(tokens[:, :24])
    torch.testing.assert_close(context.last, expected[:, 23], rtol=1e-3, atol=1e-3)
    after, _ = mine.follow(
        context.keys, context.values, None, tokens[None, :, 24:], 24, torch.arange(16)[None, None]
    )
    torch.testing.assert_close(after[:, 0, 0], expected[:, 24:], rtol=1e-3, atol=1e-3)


def test_layers_with_a_window_can_be_compressed_like_the_others(gemma):
    theirs, folder = gemma
    usual = Model(folder, "cpu", torch.float32)
    every = Model(folder, "cpu", torch.float32, every_layer=True)
    assert every.layers == [0, 1, 2]
    assert [every.window(i) for i in range(3)] == [8, None, 8]
    tokens, wanted = torch.randint(64, (1, 40)), torch.arange(16)[None, None]
    context = every.prefill(tokens[:, :24], details=True)
    evidence = policies.Evidence(every, context, tokens[:, :24], [5], Shields())

    def after(model: Model, kept: Tensor) -> Tensor:
        logits, _ = model.follow(
            context.keys, context.values, kept, tokens[None, :, 24:], 24, wanted
        )
        return logits[0, 0, 0]

    everything = torch.ones(1, 1, 3, 1, 24, dtype=torch.bool)
    with torch.inference_mode():
        torch.testing.assert_close(
            after(every, everything), theirs(tokens).logits[0, 24:], rtol=1e-3, atol=1e-3
        )
    # What a window has passed matters to nobody; what it has not does.
    far, near = everything.clone(), everything.clone()
    far[0, 0, [0, 2], :, :16] = False
    near[0, 0, 0, :, 20] = False
    torch.testing.assert_close(after(every, far), after(every, everything))
    assert not torch.allclose(after(every, near), after(every, everything))
    # In the layer without a window both models mask the same.
    full = everything.clone()
    full[0, 0, 1, :, 3:9] = False
    torch.testing.assert_close(after(every, full), after(usual, full[:, :, [1]]))
    # Scores know what a layer sees, and how it rotates.
    assert (evidence.window(4, "max")[[0, 2], :, :13] == 0).all()
    assert (evidence.window(4, "max")[1] > 0).all()
    x = torch.randn(2, 16)
    assert torch.equal(every.rotation(1)(x, 7.0), every.rotate(x, 7.0))
    assert not torch.allclose(every.rotation(0)(x, 7.0), every.rotate(x, 7.0))


def test_an_allocator_is_an_option_of_a_policy_like_others():
    """It once was left out, and what was measured was the default's."""
    full, given, plain = engine.choices(["echo:allocator=layer;pool=7", "echo"], [4.0], ["hidden"])
    assert (given.allocator, given.options) == ("layer", "pool=7")
    assert (plain.allocator, plain.options) == ("auto", "")
    sample = samples.Sample("toy", 1, 0, [1], [])
    names = [engine._line(sample, each, Shields())["policy"] for each in (full, given, plain)]
    assert names == ["full", "echo:pool=7,allocator=layer", "echo"]

# SPDX-License-Identifier: Apache-2.0
"""What the metrics of a running server say, in sentences. No vLLM is needed to ask.

``kvcompress-vllm doctor --url``; :func:`explain` is the part without HTTP.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kvcompress_vllm.records.plan import TRIGGERS
from kvcompress_vllm.reporting.acceptance import REMEDY, falls
from kvcompress_vllm.reporting.metrics import PACKED
from kvcompress_vllm.reporting.scraped import EVERYWHERE, Metrics, Told, parse, summed

TIMEOUT = 10.0
INTERVAL = 2.0
"""Seconds between the two looks that tell what rises now."""
LARGER = 1.3
"""So many times as much as asked for is worth a word."""


class Finding(NamedTuple):
    """One sentence: ``level`` is ``info``, ``warning`` or ``problem``."""

    level: str
    text: str


def examine(
    url: str, api_key: str | None = None, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Ask a server, twice where requests wait.

    Returns:
        JSON-serialisable: ``findings`` in the order to be read, and those of them that are
        ``warnings`` and ``problems`` as text.

    Raises:
        ValueError: nothing answers there, or it is no vLLM.
    """
    url = url.rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    now = parse(_get(f"{url}/metrics"))
    page = _page(url, api_key)
    if not any(name.startswith("vllm:") for name, _ in summed(now.values())):
        if page is None:
            raise ValueError(f"{url} answers, but its /metrics are not those of a vLLM server")
        findings = [
            Finding(
                "problem",
                "the server keeps no statistics (--disable-log-stats), so there is nothing to "
                "explain; compression itself works without them",
            )
        ]
        return _report(url, page, {}, findings)
    before = None
    if summed(now.values()).get(("vllm:num_requests_waiting", ""), 0) > 0:
        sleep(INTERVAL)
        before, now = now, parse(_get(f"{url}/metrics"))
    return _report(url, page, now, explain(now, before, (page or {}).get("options", "")))


def _report(
    url: str, page: Mapping[str, Any] | None, now: Mapping[str, Metrics], findings: list[Finding]
) -> dict[str, Any]:
    page = page or {}
    return {
        "url": url,
        "model": page.get("model"),
        "options": page.get("options"),
        "metrics": _named(summed(now.values())),
        "engines": {name: _named(found) for name, found in now.items() if name != EVERYWHERE},
        "findings": [found._asdict() for found in findings],
        "warnings": [found.text for found in findings if found.level == "warning"],
        "problems": [found.text for found in findings if found.level == "problem"],
    }


def _named(metrics: Metrics) -> dict[str, float]:
    return {" ".join(filter(None, key)): value for key, value in metrics.items()}


def render(report: Mapping[str, Any]) -> str:
    """What :func:`examine` found, for people."""
    lines = [f"{report['url']}: {report['model'] or 'a vLLM server'}"]
    if report["options"]:
        lines.append(f"options: {report['options']}")
    marks = {"info": "", "warning": "warning: ", "problem": "PROBLEM: "}
    lines += [marks[found["level"]] + found["text"] for found in report["findings"]]
    return "\n".join(lines)


def _get(url: str, api_key: str | None = None) -> str:
    request = urllib.request.Request(url)
    if api_key:
        request.add_header("Authorization", f"Bearer {api_key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
            return str(reply.read().decode("utf-8", "replace"))
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answers HTTP {error.code} ({error.reason})") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"nothing answers at {url}: {reason}") from error


def _page(url: str, api_key: str | None) -> dict[str, Any] | None:
    """What the live page knows beside the metrics: the options. None where it may not be seen."""
    try:
        found = json.loads(_get(f"{url}/kv-compress/data?since=9e12", api_key))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def explain(
    now: Mapping[str, Metrics], before: Mapping[str, Metrics] | None = None, options: str = ""
) -> list[Finding]:
    """What metrics mean, and what to do about it.

    Args:
        now: by engine; several of them, of a data-parallel server, each have their own pool and
            queue.
        before: the same some seconds earlier; None: only what happened since the start is told.
        options: as the server resolved them, ``key=value`` with spaces between.
    """
    total = summed(now.values())
    if not any(name.startswith("kv_compress:") for name, _ in total):
        text = (
            "the server was started without --kv-compress: it is stock vLLM, and nothing is "
            "compressed"
        )
        return [Finding("problem", text)]
    known = dict(pair.split("=", 1) for pair in options.split() if "=" in pair)
    told = Told(total, None, known)
    found = [*_compressed(told), *_drafted(told)]
    engines = [name for name in now if name != EVERYWHERE] or [EVERYWHERE]
    for name in engines:
        told = Told(now[name], None if before is None else before.get(name, {}), known)
        own = [*_pool(told), *_waiting(told), *_pressure(told), *_slots(told)]
        if len(engines) > 1:
            own = [Finding(level, f"engine {name}: {text}") for level, text in own]
        found += own
    return found


def _compressed(told: Told) -> list[Finding]:
    requests, finished = told("compressed_requests_total"), told.finished()
    if not requests:
        if not finished:
            return [Finding("info", "no request has ended yet, and none was compressed")]
        least = told.options.get("min_prompt_tokens", "min_prompt_tokens")
        text = (
            f"{finished:,.0f} requests ended and none was compressed: they were shorter than "
            f"{least} tokens, ended with their first token, or asked for kv_compress=false"
        )
        return [Finding("warning", text)]
    counts = {trigger: told("compressions_total", trigger) for trigger in TRIGGERS}
    listed = ", ".join(f"{count:,.0f} {trigger}" for trigger, count in counts.items())
    found = [
        Finding(
            "info",
            f"{requests:,.0f} requests were compressed ({listed}), which freed "
            f"{told('freed_blocks_total'):,.0f} blocks",
        )
    ]
    kept, asked = told.mean("kept_ratio", "prefill"), told.number("ratio")
    if kept is not None:
        text = f"prompts kept {kept:.2f} of their blocks"
        if asked is None:
            found.append(Finding("info", text))
        elif kept * asked > LARGER:
            text += (
                f", and ratio={asked:g} asks for {1 / asked:.2f}: short prompts are mostly what is "
                "never evicted (sinks, recent, min_tokens_per_head, min_budget_tokens), or "
                "requests ask for less"
            )
            found.append(Finding("warning", text))
        else:
            found.append(Finding("info", f"{text}, as ratio={asked:g} asks for"))
    seconds = sum(told("compression_seconds_sum", trigger) for trigger in TRIGGERS)
    total = sum(counts.values())
    found.append(Finding("info", f"a compression took {1000 * seconds / total:.1f} ms on average"))
    return found


def _drafted(told: Told) -> list[Finding]:
    """What is accepted of speculative decoding."""
    drafted, accepted = (
        {packed: told(f"{name}_tokens_total", packed) for packed in PACKED}
        for name in ("draft", "accepted")
    )
    parts = [
        f"{accepted[packed] / drafted[packed]:.0%} of {drafted[packed]:,.0f} of {whose}"
        for packed, whose in (("no", "requests that were not packed"), ("yes", "packed ones"))
        if drafted[packed]
    ]
    if not parts:
        return []
    text = f"of drafted tokens were accepted: {', '.join(parts)}"
    other, own = ((accepted[packed], drafted[packed]) for packed in PACKED)
    if falls(other, own):
        return [Finding("warning", f"{text}; {REMEDY}")]
    return [Finding("info", text)]


def _pool(told: Told) -> list[Finding]:
    used, blocks = told("vllm:kv_cache_usage_perc"), told("vllm:cache_config_info")
    text = (
        f"{told('vllm:num_requests_running'):,.0f} requests run, "
        f"{told('packed_requests'):,.0f} of them packed; {used:.1%} of "
        f"{blocks:,.0f} blocks are in use, and {told('saved_blocks'):,.0f} more would be"
    )
    found = [Finding("info", text)]
    hits, misses = told("shared_hits_total"), told("shared_misses_total")
    if hits or misses:
        text = (
            f"{told('shared_contexts'):,.0f} contexts are held in {told('shared_blocks'):,.0f} "
            f"blocks; {hits:,.0f} requests took one instead of computing it, {misses:,.0f} "
            "computed one"
        )
        found.append(Finding("info", text))
    return found


def _waiting(told: Told) -> list[Finding]:
    waiting = told("vllm:num_requests_waiting")
    if not waiting:
        return [Finding("info", "no request waits")]
    reasons = []
    if told.rises("admission_refusals_total", "forecast"):
        reasons.append(
            "room is kept for what the running requests will grow to (forecast): a higher ratio, "
            "max_ratio, or more memory admits more"
        )
    if told.rises("admission_refusals_total", "slots"):
        reasons.append(
            "all places to observe prompts are taken (slots): many end at once; fewer "
            "--max-num-batched-tokens, or a larger min_prompt_tokens"
        )
    if told.rises("reserve_waits_total"):
        reasons.append(
            "compressions wait for free blocks to pack into: prompts so long that their packed "
            "copy does not fit beside them; prefill_peak_tokens, or a larger KV cache"
        )
    if told.rises("shared_waits_total"):
        reasons.append("another request is computing the context that they name")
    if not reasons:
        full = told("vllm:kv_cache_usage_perc") > 0.9
        reasons.append(
            "the KV cache is full"
            if full
            else "vLLM's own limits (--max-num-seqs, --max-num-batched-tokens), not compression"
        )
    level = "warning" if len(reasons) > 1 or "limits" not in reasons[0] else "info"
    return [Finding(level, f"{waiting:,.0f} requests wait: {'; '.join(reasons)}")]


def _pressure(told: Told) -> list[Finding]:
    found = []
    early, avoided = told("compressions_total", "pressure"), told("preemptions_avoided_total")
    preempted = told("preemptions_total")
    if early:
        text = (
            f"the KV cache ran short: {early:,.0f} early compressions avoided about "
            f"{avoided:,.0f} preemptions"
        )
        found.append(Finding("info", text))
    if preempted:
        text = f"vLLM preempted {preempted:,.0f} requests: " + (
            "the load exceeds the pool even so; a higher ratio, or max_ratio where it bounds "
            "what pressure may take"
            if early
            else "pressure took nothing: on_pressure is off, max_ratio is reached, or nothing was "
            "left to give"
        )
        found.append(Finding("warning", text))
    usual, dear = (told.mean("score_mass_lost", t) for t in ("prefill", "pressure"))
    if usual and dear and dear > 2 * usual:
        text = (
            f"compressions under pressure lose {dear:.3f} of the score mass, those of prompts "
            f"{usual:.3f}: answers may suffer; a larger KV cache, or a lower max_ratio"
        )
        found.append(Finding("warning", text))
    return found


def _slots(told: Told) -> list[Finding]:
    used, slots = told("observation_slots_used"), told("observation_slots")
    running = told("vllm:num_requests_running")
    listens = told.options.get("policy") == "echo" and told.options.get("decode") != "False"
    if not slots or used < slots:
        return []
    if listens and running > slots:
        text = (
            f"all {slots:,.0f} observation slots are in use and {running:,.0f} requests run: what "
            "the others decode is kept whole, which costs memory, not answers"
        )
        return [Finding("warning", text)]
    return [Finding("info", f"all {slots:,.0f} observation slots are in use")]

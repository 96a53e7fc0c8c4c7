# SPDX-License-Identifier: Apache-2.0
"""What a single request may ask for, in ``vllm_xargs`` (HTTP) or ``SamplingParams.extra_args``.

    kv_compress                true or false: false keeps everything
    kv_compress_ratio          like the option ratio
    kv_compress_budget_tokens  like the option budget_tokens
    kv_compress_mass           like the option mass
    kv_compress_policy         like the option policy, where allow_policies is set
    kv_compress_context_tokens compress once so many tokens of the prompt are computed; what follows
                               (a question) reads the compressed context
    kv_compress_context_stride like the option context_stride
    kv_compress_exact          like the option exact; kvzip needs a context
    kv_compress_protect        token positions that are never evicted: "0:120" or "0:120,300:340",
                               ends excluded, counted from the start of the prompt

Within the operator's limits ``min_ratio`` and ``max_ratio`` (``requests.py``). What a client sends
may be of any size: it is measured before it is parsed or shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from kvcompress_vllm.config.options import OPTIONS
from kvcompress_vllm.config.rules import integer, printable, shown
from kvcompress_vllm.records.budget import KEEP_ALL, Wish

PREFIX = "kv_compress"
SWITCH, RATIO = PREFIX, f"{PREFIX}_ratio"
BUDGET, POLICY = f"{PREFIX}_budget_tokens", f"{PREFIX}_policy"
MASS = f"{PREFIX}_mass"
CONTEXT, PROTECT = f"{PREFIX}_context_tokens", f"{PREFIX}_protect"
EXACT, STRIDE = f"{PREFIX}_exact", f"{PREFIX}_context_stride"
XARGS = "vllm_xargs"
KEYS = (SWITCH, RATIO, BUDGET, MASS, POLICY, CONTEXT, PROTECT, EXACT, STRIDE)
MOST_RANGES = 64
"""Protected ranges of a request; each takes a little work at every compression."""
MOST_TEXT = 4096
"""Characters and list items of all values of a request together."""
MOST_KEY = 64
"""Characters of a key that is shown or compared; ours are shorter."""
MOST_KEYS = 256
"""Keys among which misspelt ones are looked for letter by letter, which takes long."""
_BARE = tuple(key.removeprefix(f"{PREFIX}_") for key in KEYS[1:])
_OURS = re.compile(r"[\W_]*kv[\W_]*compress")


def request_wish(params: Any) -> Wish | None:
    """What a request asked for; None: nothing, all is as configured.

    Args:
        params: its ``SamplingParams``, or None.

    Raises:
        ValueError: an unknown key, a bad value, or keys that exclude each other.
    """
    given = getattr(params, "extra_args", None)
    return parse(given) if given else None


def parse(given: Mapping[str, Any]) -> Wish | None:
    """:func:`request_wish` of the ``extra_args`` themselves."""
    asked = _asked(given)
    if not asked:
        return None
    switch = asked.pop(SWITCH, True)
    # vLLM's protocol turns JSON's true and false into 1 and 0.
    if switch not in (0, 1):
        raise ValueError(f"{SWITCH}={_brief(switch)} is not accepted; it must be true or false")
    if asked and not switch:
        listed = ", ".join(f"{key}={_brief(value)}" for key, value in asked.items())
        raise ValueError(f"{listed} needs {SWITCH}=true")
    budgets = [f"{key}={_brief(asked[key])}" for key in (RATIO, BUDGET, MASS) if key in asked]
    if len(budgets) > 1:
        raise ValueError(f"{' and '.join(budgets)} exclude each other")
    protect = _ranges(asked.pop(PROTECT, ""))
    context = asked.pop(CONTEXT, None)
    if context is not None and not _POSITIVE[1](context):
        raise ValueError(f"{CONTEXT}={_brief(context)} is not accepted; it must be {_POSITIVE[0]}")
    for key, value in asked.items():
        option = OPTIONS[key.removeprefix(f"{PREFIX}_")]
        if not option.metadata["accepts"](value):
            raise ValueError(
                f"{key}={_brief(value)} is not accepted; it must be {option.metadata['accepted']}"
            )
    if not switch:
        return KEEP_ALL
    ratio = asked.get(RATIO)
    ratio = None if ratio is None else float(ratio)
    wish = Wish(
        ratio,
        asked.get(BUDGET),
        asked.get(POLICY),
        context,
        protect,
        asked.get(MASS),
        asked.get(EXACT),
        asked.get(STRIDE),
    )
    return None if wish == Wish() else wish


_POSITIVE = integer(1)


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys among all; refused where one is misspelt, or where they are too large to read. None
    is what tables have for a row that says nothing."""
    asked = {key: value for key, value in given.items() if key in KEYS and value is not None}
    wrong = next((key for key in _BARE if key in given), None) or misspelt(given)
    if wrong is not None:
        raise ValueError(f"unknown {shown_key(wrong)}={_brief(given[wrong])}; {meant(wrong)}")
    size = 0
    for key, value in asked.items():
        size += _size(value)
        if size > MOST_TEXT:
            raise ValueError(
                f"{key}={_brief(value)} is not accepted; it must be shorter: the kv_compress "
                f"values of a request may have {MOST_TEXT} characters together"
            )
    return asked


def misspelt(keys: Collection[Any]) -> str | None:
    """The first key that is none of ours but was meant to be: ``kvcompress_ratio``,
    ``KV-Compress-Ratio``, ``kv_comress``."""
    compare = len(keys) <= MOST_KEYS
    for key in keys:
        if not isinstance(key, str) or key in KEYS:
            continue
        text = key[:MOST_KEY].lower()
        if _OURS.match(text):
            return key
        near = compare and (text.startswith("kv") or "compres" in text)
        if near and difflib.get_close_matches(text, KEYS, n=1, cutoff=0.85):
            return key
    return None


def meant(key: str) -> str:
    """Which key a misspelt one is nearest to, and which there are."""
    words = re.sub(r"\W+", "_", key[:MOST_KEY].lower())
    if words in _BARE:
        words = f"{PREFIX}_{words}"
    near = difflib.get_close_matches(words, KEYS, n=1, cutoff=0.6)
    return "".join(f"did you mean {key}? " for key in near) + f"The keys are {', '.join(KEYS)}"


def shown_key(key: Any) -> str:
    """A key as error messages show it."""
    return printable(key if isinstance(key, str) else type(key).__name__, MOST_KEY)


def _size(value: Any) -> int:
    """What reading a value costs, in characters and items."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple):
        return 1
    if len(value) > MOST_TEXT:
        return len(value)
    return len(value) + sum(len(item) for item in value if isinstance(item, str))


def _brief(value: Any) -> str:
    """``shown``, except of what it would sort or walk through first."""
    if isinstance(value, Collection) and not isinstance(value, str):
        nested = (isinstance(item, Collection) and not isinstance(item, str) for item in value)
        if len(value) > 8 or any(nested):
            return f"a {type(value).__name__} of {len(value)}"
    return shown(value)


def _ranges(given: Any) -> tuple[tuple[int, int], ...]:
    """Protected positions: ascending, and where they touch or overlap one."""
    texts = given if isinstance(given, list | tuple) else [given]
    ranges: list[tuple[int, int]] = []
    for text in texts:
        for part in filter(None, text.split(",") if isinstance(text, str) else [None]):
            found = re.fullmatch(r"\s*(\d{1,9})\s*:\s*(\d{1,9})\s*", part)
            if found is None or int(found[1]) >= int(found[2]):
                raise _bad_ranges(given)
            ranges.append((int(found[1]), int(found[2])))
        if not isinstance(text, str):
            raise _bad_ranges(given)
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    if len(merged) > MOST_RANGES:
        raise _bad_ranges(given)
    return tuple(merged)


_RANGES = (
    f"at most {MOST_RANGES} ranges start:end of token positions, start < end, such as "
    '"0:120,300:340"'
)


def _bad_ranges(given: Any) -> ValueError:
    return ValueError(f"{PROTECT}={_brief(given)} is not accepted; it must be {_RANGES}")

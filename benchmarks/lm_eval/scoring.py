# SPDX-License-Identifier: Apache-2.0
"""Called by lm-eval, as ``facts.yaml`` says."""

from collections.abc import Mapping, Sequence


def process_results(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """A reply is right if it begins with the answer."""
    return {"right": float(results[0].strip().startswith(doc["answer"].strip()))}

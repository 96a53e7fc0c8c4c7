# SPDX-License-Identifier: Apache-2.0
"""Ask without a server.

python examples/offline.py [MODEL]
"""

import sys

from document import PROMPT, show

from kvcompress_vllm import LLM


def main(model: str) -> None:
    # As vllm.LLM, which would take additional_config={"kv_compress": {"ratio": 8}}.
    llm = LLM(
        model,
        kv_compress={"ratio": 8},
        max_model_len=2048,
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,  # enough for the bundled model; leave it out for others
    )
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens = 0, 16
    (output,) = llm.chat([{"role": "user", "content": PROMPT}], params)
    show(output.outputs[0].text, vars(output.kv_compress))

    # What one request wants otherwise: here, everything kept.
    params.extra_args = {"kv_compress": False}
    (output,) = llm.chat([{"role": "user", "content": PROMPT}], params)
    show(output.outputs[0].text, vars(output.kv_compress))


if __name__ == "__main__":  # the engine is a process of its own
    main(*sys.argv[1:] or ["models/tiny"])

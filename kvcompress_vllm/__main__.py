# SPDX-License-Identifier: Apache-2.0
"""``python -m kvcompress_vllm``."""

from kvcompress_vllm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())

# SPDX-License-Identifier: Apache-2.0
"""A file of requests in OpenAI's batch format, for ``vllm run-batch``: no server, one engine.

    python examples/batch_file.py write batch.jsonl tiny
    vllm run-batch -i batch.jsonl -o answers.jsonl --model models/tiny \\
        --served-model-name tiny --kv-compress ratio=8
    python examples/batch_file.py show answers.jsonl
"""

import json
import sys
from pathlib import Path

from document import PROMPT, show


def write(file: str, model: str) -> None:
    """One request at the ratio of the command line, one at its own."""
    with Path(file).open("w") as lines:
        for name, xargs in (("eight", {}), ("two", {"kv_compress_ratio": 2})):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": PROMPT}],
                "temperature": 0,
                "max_tokens": 16,
                "vllm_xargs": xargs,
            }
            request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.write(json.dumps({"custom_id": name, **request}) + "\n")


def show_answers(file: str) -> None:
    for line in Path(file).read_text().splitlines():
        answer = json.loads(line)
        body = answer["response"]["body"]
        print(answer["custom_id"], end=": ")
        show(body["choices"][0]["message"]["content"], body["usage"]["kv_compress"])


{"write": write, "show": show_answers}[sys.argv[1]](*sys.argv[2:])

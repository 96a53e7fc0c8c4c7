# SPDX-License-Identifier: Apache-2.0
"""Against a server that allows it: vllm serve MODEL --kv-compress ratio=4,allow_policies=loudest

SERVER=http://127.0.0.1:8000 pytest tests/test_http.py
"""

import os

import pytest
from openai import OpenAI

SERVER = os.environ.get("SERVER")
FACT = "The secret code for Quito is 84150."
DOCUMENT = " ".join(["Nothing happened on that day."] * 40 + [FACT] + ["It rained a little."] * 40)
QUESTION = "What is the secret code for Quito?"


@pytest.mark.skipif(not SERVER, reason="SERVER says which")
def test_it_keeps_what_the_question_needs():
    client = OpenAI(base_url=f"{SERVER}/v1", api_key="none")
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": f"{DOCUMENT}\n{QUESTION}"}],
        temperature=0,
        extra_body={"vllm_xargs": {"kv_compress_policy": "loudest", "kv_compress_ratio": 4}},
    )
    assert "84150" in reply.choices[0].message.content
    assert reply.usage.kv_compress["compressions"] >= 1

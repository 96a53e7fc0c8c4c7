# SPDX-License-Identifier: Apache-2.0
"""The anthropic client against /v1/messages.

vllm serve models/tiny --kv-compress ratio=8
python examples/anthropic_client.py
"""

from anthropic import Anthropic
from document import API_KEY, PROMPT, SERVER, show

client = Anthropic(base_url=SERVER, api_key=API_KEY)
model = client.models.list().data[0].id
message = client.messages.create(
    model=model,
    max_tokens=16,
    messages=[{"role": "user", "content": PROMPT}],
    extra_body={"temperature": 0, "vllm_xargs": {"kv_compress_ratio": 4}},
)
show(message.content[0].text, message.usage.kv_compress)

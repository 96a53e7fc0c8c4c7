# SPDX-License-Identifier: Apache-2.0
"""The openai client: a chat, a stream, and what one request asks for itself.

vllm serve models/tiny --kv-compress ratio=8
python examples/openai_client.py
"""

from document import API_KEY, PROMPT, SERVER, show
from openai import BadRequestError, OpenAI

client = OpenAI(base_url=f"{SERVER}/v1", api_key=API_KEY)
model = client.models.list().data[0].id
messages = [{"role": "user", "content": PROMPT}]

reply = client.chat.completions.create(model=model, messages=messages, temperature=0)
show(reply.choices[0].message.content, reply.usage.kv_compress)

# Another ratio for this request, streamed. The usage comes in the last chunk.
stream = client.chat.completions.create(
    model=model,
    messages=messages,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
    extra_body={"vllm_xargs": {"kv_compress_ratio": 2}},
)
text = ""
for chunk in stream:
    if chunk.choices:
        text += chunk.choices[0].delta.content or ""
    if chunk.usage:
        show(text, chunk.usage.kv_compress)

# What is not accepted is refused before anything is generated.
try:
    client.chat.completions.create(
        model=model, messages=messages, extra_body={"vllm_xargs": {"kv_compress_ratio": 0.5}}
    )
except BadRequestError as error:
    print(error.body["message"])

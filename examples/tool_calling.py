# SPDX-License-Identifier: Apache-2.0
"""A tool call from a compressed context.

    vllm serve models/tiny --kv-compress ratio=8 --enable-auto-tool-choice --tool-call-parser hermes
    python examples/tool_calling.py

The bundled model never learned to call tools, so it is made to (``tool_choice``): vLLM then lets it
write nothing but arguments that fit, and the value it finds in the document.
"""

import json

from document import API_KEY, PROMPT, SERVER, show
from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "open_doors",
        "strict": True,  # newer vLLM holds arguments to their schema only then
        "description": "Opens doors. Takes the code of each city.",
        "parameters": {
            "type": "object",
            "properties": {"Hobart": {"type": "string", "pattern": "^[0-9]{7}$"}},
            "required": ["Hobart"],
            "additionalProperties": False,
        },
    },
}

client = OpenAI(base_url=f"{SERVER}/v1", api_key=API_KEY)
reply = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": PROMPT}],
    tools=[TOOL],
    tool_choice="required",
    temperature=0,
    max_tokens=90,
    # Chat templates put tool definitions in front; the first 64 tokens stay whatever their scores.
    extra_body={"vllm_xargs": {"kv_compress_protect": "0:64"}},
)
(call,) = reply.choices[0].message.tool_calls
arguments = json.loads(call.function.arguments)
show(f"{call.function.name}({arguments})", reply.usage.kv_compress)

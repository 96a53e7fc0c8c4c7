# SPDX-License-Identifier: Apache-2.0
"""An answer that fits a JSON schema, from a compressed context.

    vllm serve models/tiny --kv-compress ratio=8 \\
        --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'
    python examples/json_schema.py

Without ``disable_any_whitespace`` a small model may write blanks until it runs out of tokens.
"""

from document import API_KEY, PROMPT, SERVER, show
from openai import OpenAI
from pydantic import BaseModel, Field


class Codes(BaseModel):
    Hobart: int = Field(ge=0)


client = OpenAI(base_url=f"{SERVER}/v1", api_key=API_KEY)
reply = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": PROMPT}],
    temperature=0,
    max_tokens=40,
    response_format={
        "type": "json_schema",
        "json_schema": {"name": "codes", "schema": Codes.model_json_schema(), "strict": True},
    },
)
codes = Codes.model_validate_json(reply.choices[0].message.content)
show(str(codes.Hobart), reply.usage.kv_compress)

# SPDX-License-Identifier: Apache-2.0
"""LangChain, through its package for the OpenAI API (pip install langchain-openai).

vllm serve models/tiny --kv-compress ratio=8
python examples/langchain_client.py
"""

from document import API_KEY, DOCUMENT, QUESTION, SERVER, show
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI

url = f"{SERVER}/v1"
model = ChatOpenAI(
    model=OpenAI(base_url=url, api_key=API_KEY).models.list().data[0].id,
    base_url=url,
    api_key=API_KEY,
    temperature=0,
    extra_body={"vllm_xargs": {"kv_compress_ratio": 4}},
)
chain = ChatPromptTemplate.from_messages([("user", "{document}\n{question}")]) | model
message = chain.invoke({"document": DOCUMENT, "question": QUESTION})
show(message.content, message.response_metadata["token_usage"]["kv_compress"])

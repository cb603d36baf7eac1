"""Use a server from LangChain: tools, streams, structured output, embeddings: python langchain_tools.py URL.

Prints JSON. The server's replies are those of ``test_server_clients.py``, in this order.
"""

from __future__ import annotations

import json
import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


@tool
def weather(city: str, days: int) -> str:
    """Tell the weather."""
    return f"{city}: sun for {days} days"


class Answer(BaseModel):
    """An answer."""

    right: bool


url = f"{sys.argv[1]}/v1"
model = ChatOpenAI(model="tiny", base_url=url, api_key="none", max_tokens=300, max_retries=0)
bound = model.bind_tools([weather])
talk = [HumanMessage("How is it in Ulm?")]
called = bound.invoke(talk)
results = [ToolMessage(weather.invoke(one["args"]), tool_call_id=one["id"]) for one in called.tool_calls]
answer = bound.invoke([*talk, called, *results])
whole = None
for part in bound.stream(talk):
    whole = part if whole is None else whole + part
structured = model.with_structured_output(Answer, method="function_calling").invoke("Is it?")
through_responses = ChatOpenAI(
    model="tiny", base_url=url, api_key="none", max_tokens=300, use_responses_api=True, max_retries=0
).bind_tools([weather])
called_again = through_responses.invoke(talk)
vectors = OpenAIEmbeddings(
    model="tiny", base_url=url, api_key="none", check_embedding_ctx_length=False
).embed_documents(["abc", "Hello"])
print(
    json.dumps(
        {
            "calls": [[one["name"], one["args"]] for one in called.tool_calls],
            "reason": called.response_metadata["finish_reason"],
            "answer": answer.content,
            "streamed": [[one["name"], one["args"]] for one in whole.tool_calls],
            "structured": structured.right,
            "responses": [[one["name"], one["args"]] for one in called_again.tool_calls],
            "vectors": vectors,
        }
    )
)

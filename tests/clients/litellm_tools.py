"""Use a server from LiteLLM: a call of a function, its answer and a stream: python litellm_tools.py URL.

Prints JSON. The server's replies are those of ``test_server_clients.py``, in this order.
"""

from __future__ import annotations

import json
import sys

import litellm

parameters = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
tools = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": parameters}}]
asked = {"model": "openai/tiny", "api_base": f"{sys.argv[1]}/v1", "api_key": "none", "tools": tools, "max_tokens": 300}
talk = [{"role": "user", "content": "How is it in Ulm?"}]
called = litellm.completion(messages=talk, **asked).choices[0]
(call,) = called.message.tool_calls
result = {"role": "tool", "tool_call_id": call.id, "content": "sun"}
answer = litellm.completion(messages=[*talk, called.message.model_dump(), result], **asked).choices[0]
whole = litellm.stream_chunk_builder(list(litellm.completion(messages=talk, stream=True, **asked)), messages=talk)
(streamed,) = whole.choices[0].message.tool_calls
print(
    json.dumps(
        {
            "calls": [[call.function.name, json.loads(call.function.arguments)]],
            "reason": called.finish_reason,
            "reasoning": called.message.reasoning_content,
            "answer": answer.message.content,
            "streamed": [[streamed.function.name, json.loads(streamed.function.arguments)]],
        }
    )
)

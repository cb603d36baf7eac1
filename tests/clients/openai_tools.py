"""Use a server from OpenAI's client, in coroutines: a loop of calls and an agent's stream: python openai_tools.py URL.

Prints JSON. The server's replies are those of ``test_server_clients.py``, in this order.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from openai import AsyncOpenAI

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}]


async def main() -> dict[str, Any]:
    """Call a function, send back what it returns, and do the first again as a stream."""
    client = AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none", max_retries=0)
    talk: Any = [{"role": "user", "content": "How is it in Ulm?"}]
    asked: Any = {"model": "tiny", "tools": TOOLS, "max_tokens": 300}
    called = (await client.chat.completions.create(messages=talk, **asked)).choices[0]
    (call,) = called.message.tool_calls or ()
    back = [*talk, called.message, {"role": "tool", "tool_call_id": call.id, "content": "sun"}]
    answer = (await client.chat.completions.create(messages=back, **asked)).choices[0]
    async with client.chat.completions.stream(messages=talk, **asked) as stream:
        async for _ in stream:
            pass
        whole = (await stream.get_final_completion()).choices[0]
    (streamed,) = whole.message.tool_calls or ()
    return {
        "calls": [[call.function.name, json.loads(call.function.arguments)]],
        "reason": called.finish_reason,
        "answer": answer.message.content,
        "streamed": [[streamed.function.name, streamed.function.parsed_arguments]],
    }


print(json.dumps(asyncio.run(main())))

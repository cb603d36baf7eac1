"""OpenAI's own client against ``melt-run serve``: python examples/openai_client.py URL PROMPT

URL is the server's with /v1, such as http://127.0.0.1:8000/v1; a key, if it needs one, is read from OPENAI_API_KEY.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI, OpenAIError


def main(url: str, prompt: str) -> None:
    """Print an answer at two depths, then stream one with early exit."""
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    model = client.models.list().data[0]
    most = int(getattr(model, "loops", 1))
    print(f"{model.id}, up to {most} loops per token")

    for loops in sorted({1, most}):  # fields beyond OpenAI's go into extra_body
        reply = client.completions.create(
            model=model.id, prompt=prompt, temperature=0, max_tokens=32, extra_body={"loops": loops}
        )
        choice = reply.choices[0]
        print(f"loops={loops}: {choice.text!r}, loops by token {choice.model_extra['depth']}")

    early = {"exit_threshold": 0.9} if most > 1 else {}
    options = {"include_usage": True}
    stream = client.completions.create(
        model=model.id,
        prompt=prompt,
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options=options,
        extra_body=early,
    )
    for part in stream:
        for choice in part.choices:
            print(f"{choice.text}({choice.model_extra['depth'][0]})", end="", flush=True)
        if part.usage is not None:
            print(f"\n{part.usage.completion_tokens} tokens after {part.usage.prompt_tokens} of the prompt")

    if getattr(model, "chat", False):
        messages = [{"role": "user", "content": prompt}]
        reply = client.chat.completions.create(model=model.id, messages=messages, temperature=0, max_tokens=32)
        print(f"chat: {reply.choices[0].message.content}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except OpenAIError as error:
        sys.exit(f"openai_client.py: {error}")

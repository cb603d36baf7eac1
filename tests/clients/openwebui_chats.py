"""Use a server through Open WebUI, as its page does: python openwebui_chats.py URL.

Prints JSON. The server's replies are those of ``test_server_clients.py``, in this order. Open WebUI's backend runs in
a process and a directory of its own, without accounts, Ollama or models for embeddings.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WAIT = 180.0  # seconds; a hang limit
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city", "days"],
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": PARAMETERS}}]
ASK = {"role": "user", "content": "How is it in Ulm?"}


class WebUI:
    """The backend at ``url``, for its one user."""

    def __init__(self, url: str):
        self.url, self.token = url, ""

    def call(self, path: str, body: Any = None) -> str:
        """Send a GET, or a POST with a JSON body, and return the answer's text."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            raise SystemExit(f"{path} was answered with {error.code}: {error.read().decode()[:2000]}") from None

    def chat(self, *messages: Any, **fields: Any) -> Any:
        """Return the answer to a chat in one piece."""
        body = {"model": "tiny", "messages": messages, "stream": False, **fields}
        return json.loads(self.call("/api/chat/completions", body))

    def task(self, name: str, *messages: Any) -> str:
        """Return what the model says to a task of the page, such as a chat's title."""
        body = {"model": "tiny", "messages": messages, "chat_id": "local:1"}
        return str(json.loads(self.call(f"/api/v1/tasks/{name}/completions", body))["choices"][0]["message"]["content"])


@contextmanager
def webui(server: str) -> Iterator[WebUI]:
    """Run Open WebUI beside a server."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as directory:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        options = {
            "WEBUI_AUTH": "False",
            "WEBUI_SECRET_KEY": "tests",
            "DATA_DIR": f"{directory}/data",
            "STATIC_DIR": f"{directory}/static",
            "OPENAI_API_BASE_URL": f"{server}/v1",
            "OPENAI_API_KEY": "none",
            "ENABLE_OLLAMA_API": "False",
            "OFFLINE_MODE": "True",
            "USE_SLIM_DOCKER": "true",  # no embeddings, no speech: nothing here needs them
        }
        serve = "from open_webui import app; app()"  # its command open-webui, wherever that is installed
        command = [sys.executable, "-c", serve, "serve", "--host", "127.0.0.1", "--port", str(port)]
        log = Path(directory) / "log"
        with log.open("w") as lines:
            process = subprocess.Popen(
                command, cwd=directory, env={**os.environ, **options}, stdout=lines, stderr=subprocess.STDOUT
            )
        try:
            found = WebUI(f"http://127.0.0.1:{port}")
            end = time.monotonic() + WAIT
            while True:
                try:
                    found.call("/health")
                    break
                except urllib.error.URLError:
                    if process.poll() is not None or time.monotonic() > end:
                        raise SystemExit(f"Open WebUI does not answer:\n{log.read_text()[-3000:]}") from None
                    time.sleep(0.5)
            found.token = json.loads(found.call("/api/v1/auths/signin", {"email": "", "password": ""}))["token"]
            yield found
        finally:
            process.terminate()
            process.wait(WAIT)


def streamed(text: str) -> tuple[str, Any]:
    """Return a stream's text and its usage."""
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    parts = [choice["delta"].get("content") or "" for event in events for choice in event.get("choices", ())]
    return "".join(parts), next((event["usage"] for event in reversed(events) if event.get("usage")), None)


def main() -> dict[str, Any]:
    """List the models, chat in one piece and as a stream, call a function, and name the chat."""
    with webui(sys.argv[1]) as page:
        models = [model["id"] for model in json.loads(page.call("/api/models"))["data"]]
        whole = page.chat(ASK)
        asked = {"model": "tiny", "messages": [ASK], "stream": True, "stream_options": {"include_usage": True}}
        text, usage = streamed(page.call("/api/chat/completions", asked))
        called = page.chat(ASK, tools=TOOLS)["choices"][0]
        (call,) = called["message"]["tool_calls"]
        back = [ASK, called["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sun"}]
        answer = page.chat(*back, tools=TOOLS)["choices"][0]["message"]["content"]
        params = {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "seed": 1, "stop": ["!"]}
        params |= {"max_tokens": 5, "frequency_penalty": 0.1, "presence_penalty": 0.1, "reasoning_effort": "low"}
        set_by_hand = page.chat(ASK, params=params)["usage"]["completion_tokens"]
        said = [ASK, {"role": "assistant", "content": "Sun."}]
        return {
            "models": models,
            "whole": whole["choices"][0]["message"]["content"],
            "used": whole["usage"]["completion_tokens"],
            "streamed": text,
            "used_streamed": usage and usage["completion_tokens"],
            "calls": [[call["function"]["name"], json.loads(call["function"]["arguments"])]],
            "reason": called["finish_reason"],
            "answer": answer,
            "set_by_hand": set_by_hand,
            "tasks": [page.task(name, *said) for name in ("title", "tags", "follow_up")],
        }


print(json.dumps(main()))

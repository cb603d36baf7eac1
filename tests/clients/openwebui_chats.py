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
from uuid import uuid4

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

    def turn(self, text: str, chat: str | None, parent: str | None, *tasks: str) -> dict[str, Any]:
        """Send what the page sends for a message, wait for the answer and for the tasks, and return the chat.

        The backend offers its own functions, and streams the answer into the chat, whose last message it is.
        """
        asked, said = str(uuid4()), str(uuid4())
        message = {"id": asked, "parentId": parent, "childrenIds": [], "role": "user", "content": text}
        body = {
            "model": "tiny",
            "stream": True,
            "session_id": "page",
            "chat_id": chat,
            "parent_id": parent,
            "user_message": message,
            "message_ids": [{"model_id": "tiny", "message_id": said}],
            "background_tasks": {f"{task}_generation": True for task in tasks},
        }
        chat = json.loads(self.call("/api/chat/completions", body))["chat_id"]
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            found = json.loads(self.call(f"/api/v1/chats/{chat}"))
            answer = found["chat"]["history"]["messages"][said]
            waits = (tasks and "followUps" not in answer) or ("tags" in tasks and not found["meta"].get("tags"))
            if "error" in answer or (answer.get("done") and not waits):
                return {**found, "answer": answer}
            time.sleep(0.2)
        raise SystemExit(f"the chat does not end: {json.dumps(found)[-2000:]}")


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


def with_its_functions(page: WebUI) -> dict[str, Any]:
    """Chat as the page does: the backend calls its own function, shows reasoning, and asks for title, tags and more."""
    chat = page.turn("How is it in Ulm?", None, None)
    done = page.turn("And on Monday?", chat["id"], chat["answer"]["id"], "follow_up", "title", "tags")
    parts: dict[str, Any] = {"reasoning": [], "calls": []}
    for part in done["answer"]["output"]:
        if part["type"] == "reasoning":
            parts["reasoning"].append(part["content"][0]["text"])
        if part["type"] == "function_call":
            parts["calls"].append([part["name"], json.loads(part["arguments"])])
    answers = [one["answer"]["content"] for one in (chat, done)]
    named = {"title": done["title"], "tags": done["meta"]["tags"], "follow_ups": done["answer"]["followUps"]}
    return {**parts, **named, "answers": answers}


def without_its_functions(page: WebUI) -> Any:
    """Chat as the page does with a model set to offer no functions and to loop three times; return its usage."""
    params = {"system": "Be brief.", "reasoning_effort": "low", "custom_params": {"loops": "3"}}
    meta = {"capabilities": {"builtin_tools": False, "usage": True}}
    page.call("/api/v1/models/create", {"id": "tiny", "name": "tiny", "params": params, "meta": meta})
    page.call("/api/models?refresh=true")
    return page.turn("How is it in Ulm?", None, None)["answer"]["usage"]


def as_responses(page: WebUI, server: str) -> None:
    """Set the connection to send OpenAI's responses."""
    page.call("/openai/verify", {"url": f"{server}/v1", "key": "none"})
    connection = {"OPENAI_API_BASE_URLS": [f"{server}/v1"], "OPENAI_API_KEYS": ["none"]}
    configs = {"OPENAI_API_CONFIGS": {"0": {"enable": True, "api_type": "responses"}}}
    page.call("/openai/config/update", {"ENABLE_OPENAI_API": True, **connection, **configs})
    page.call("/api/models?refresh=true")


def main() -> dict[str, Any]:
    """List the models, chat in one piece and as a stream, call a function, set what can be set, and use the page."""
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
        chats = with_its_functions(page)
        bare = without_its_functions(page)
        page.call("/api/v1/models/model/delete", {"id": "tiny"})
        as_responses(page, sys.argv[1])
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
            "page": chats,
            "bare": bare,
            "responses": with_its_functions(page),
        }


print(json.dumps(main()))

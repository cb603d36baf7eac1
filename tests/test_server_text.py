"""What the server answers without the model: tokens and texts, its version, its own description, and other origins."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from melt_runtime import Runtime, Scheduler
from melt_runtime.cli.main import app as program
from melt_runtime.server.app import Limits, build_app
from melt_runtime.server.docs import ROUTES
from melt_runtime.server.service import Service
from serving import WAIT, Server
from typer.testing import CliRunner

PAGE = "https://chat.example.org"


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=WAIT)


def test_a_texts_tokens_are_those_that_the_model_reads_and_give_the_text_again(
    server: Server, served_runtime: Runtime
) -> None:
    found = post(server, "/tokenize", model="tiny", prompt="Hello, world", return_token_strs=True).json()
    assert found["tokens"] == served_runtime.encode("Hello, world")
    assert (found["count"], found["max_model_len"]) == (12, served_runtime.manifest.max_seq_len)
    assert found["token_strs"] == list("Hello, world")
    assert post(server, "/detokenize", tokens=found["tokens"]).json() == {"prompt": "Hello, world"}


def test_the_tokens_of_a_chat_are_those_that_its_answer_follows(server: Server, served_runtime: Runtime) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    found = post(server, "/tokenize", messages=messages).json()["tokens"]
    assert found == served_runtime.chat_prompt(messages)
    shorter = post(server, "/tokenize", messages=messages, add_generation_prompt=False).json()["tokens"]
    assert shorter == found[: len(shorter)]
    assert len(shorter) < len(found)


def test_a_text_that_is_longer_than_the_cache_can_be_counted(server: Server, served_runtime: Runtime) -> None:
    count = 2 * served_runtime.manifest.max_seq_len
    assert post(server, "/tokenize", prompt="a" * count).json()["count"] == count


def test_special_tokens_have_text_and_ids_without_a_token_have_none(server: Server) -> None:
    assert post(server, "/detokenize", tokens=[0, 5, 10_000]).json()["prompt"].startswith("<pad>")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a" * 600_000}),
        ("/tokenize", {"prompt": "a", "model": "another"}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": [1 << 40]}),
        ("/detokenize", {"tokens": "abc"}),
        ("/detokenize", {"prompt": "abc"}),
    ],
)
def test_what_cannot_be_tokenized_is_refused(server: Server, path: str, body: dict[str, Any]) -> None:
    reply = post(server, path, **body)
    assert reply.status_code in (400, 404)
    assert reply.json()["error"]["message"]


def test_the_tokenizers_facts_name_the_end_token_and_the_chat_template(server: Server, served_runtime: Runtime) -> None:
    facts = httpx.get(server.url + "/tokenizer_info").json()
    assert (facts["eos_token"], facts["model_max_length"]) == ("<end>", served_runtime.manifest.max_seq_len)
    assert "message.role" in facts["chat_template"]


def test_the_version_is_the_installed_one(server: Server) -> None:
    assert httpx.get(server.url + "/version").json() == {"version": version("melt-export")}


def test_the_description_has_every_route_and_its_page_loads_nothing(served_runtime: Runtime) -> None:
    with Scheduler(served_runtime, 1) as scheduler:
        built = build_app(Service(served_runtime, scheduler, "tiny"), Limits())
    paths = {getattr(one, "path", "").replace(":path", "") for one in built.routes}
    assert paths == {"/", "/docs", "/openapi.json", *(route.path for route in ROUTES)}


def test_docs_are_a_page_and_openapi_for_everyone(served_package: Path) -> None:
    with Server(served_package, MELT_API_KEYS="secret") as server:
        page = httpx.get(server.url + "/docs", timeout=WAIT)
        described = httpx.get(server.url + "/openapi.json", timeout=WAIT).json()
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "://" not in page.text
    assert "<script" not in page.text
    for path in described["paths"]:
        assert path in page.text
    body = described["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    named = described["components"]["schemas"][body["$ref"].rpartition("/")[2]]
    assert {"model", "prompt"} <= set(named["required"])


def test_without_the_option_no_other_origin_may_read_an_answer(server: Server) -> None:
    reply = httpx.get(server.url + "/v1/models", headers={"Origin": PAGE})
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_the_named_origins_and_no_others_may_call_and_read_even_refusals(served_package: Path) -> None:
    with Server(served_package, "--cors-origin", PAGE, MELT_API_KEYS="secret") as server:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-other"}
        before = httpx.options(server.url + "/v1/completions", headers={"Origin": PAGE, **asked})
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == PAGE
        assert "x-other" in before.headers["access-control-allow-headers"]
        refused = httpx.get(server.url + "/v1/models", headers={"Origin": PAGE})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == PAGE
        for other in ("https://chat.example.org.evil.org", "http://chat.example.org", "null"):
            assert httpx.options(server.url + "/v1/completions", headers={"Origin": other, **asked}).status_code == 400
            reply = httpx.get(server.url + "/v1/models", headers={"Origin": other})
            assert reply.headers.get("access-control-allow-origin") is None


@pytest.mark.parametrize("origin", ["*", "null", "chat.example.org", "https://chat.example.org/", "https://a.org/b"])
def test_what_is_no_origin_is_refused_at_the_start(served_package: Path, origin: str) -> None:
    result = CliRunner().invoke(program, ["serve", str(served_package), "--cors-origin", origin])
    assert result.exit_code == 2
    assert "is no origin" in result.stderr

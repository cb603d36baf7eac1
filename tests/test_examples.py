"""The programs under examples/ do what they say; the demo has tests of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx
import pytest
from conftest import MakePackage
from melt_runtime import Runtime
from openai import OpenAI
from serving import WAIT, Server, eventually

EXAMPLES = Path(__file__).parent.parent / "examples"
PROBLEM, ANSWER = "4829173+3917458=", "8746631"
TURNS, CUTS = 40, 8
PATIENCE = 300.0  # seconds; Ray takes long to start where others compute
Program = subprocess.Popen[str]


def start(name: str, *arguments: object, **environment: str) -> Program:
    """An example, running."""
    return subprocess.Popen(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def device(package: Path, readings: Path, directory: Path, *options: str) -> Program:
    """The device's loop, running on one thread."""
    return start("device_loop.py", package, readings, directory, "--threads", 1, *options)


def said(program: Program) -> str:
    """What an example wrote by its end, which must be a good one."""
    out, error = program.communicate(timeout=PATIENCE)
    assert program.returncode == 0, error
    return out


@pytest.fixture(scope="module")
def addition(make_package: MakePackage) -> Path:
    return make_package(EXAMPLES / "addition-melt", max_batch=32)


def test_embedding_the_runtime_streams_an_answer_at_two_depths_without_pytorch(addition: Path) -> None:
    lines = said(start("embed.py", addition, PROBLEM)).splitlines()
    runtime = Runtime.load(addition)
    assert lines[0] == ANSWER
    assert lines[1] == f"with one loop: {runtime.generate(PROBLEM, loops=1).text}"
    assert lines[2].startswith(f"state: {runtime.state_bytes():,} bytes")


def test_embedding_the_runtime_needs_no_prompt_where_the_package_carries_one(addition: Path) -> None:
    assert said(start("embed.py", addition)).splitlines()[0] == ANSWER


def test_embedding_the_runtime_takes_twenty_lines_or_so() -> None:
    lines = (EXAMPLES / "embed.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) <= 20


def test_an_embedded_runtime_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    program = start("embed.py", tmp_path / "nothing", PROBLEM)
    _, error = program.communicate(timeout=WAIT)
    assert program.returncode == 1
    assert error.count("\n") == 1
    assert error.startswith("embed.py: ")


def test_a_logit_lens_shows_what_every_loop_would_say_and_draws_it(addition: Path, tmp_path: Path) -> None:
    picture = tmp_path / "lens.png"
    lines = said(start("logit_lens.py", addition, PROBLEM, picture)).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["loop", str(loop)] for loop in range(1, 5)]
    states = Runtime.load(addition).loops(PROBLEM)
    assert lines[-1].split()[-1] == Runtime.load(addition).tokenizer.decode([int(states.logits[-1, -1].argmax())])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_logit_lens_reads_a_chat_as_the_model_does_and_says_when_it_does_not(
    served_package: Path, served_runtime: Runtime
) -> None:
    for options in ([], ["--chat"]):
        output, error = start("logit_lens.py", served_package, "Hi", *options).communicate(timeout=WAIT)
        ids = (
            served_runtime.chat_prompt([{"role": "user", "content": "Hi"}]) if options else served_runtime.encode("Hi")
        )
        logits = served_runtime.loops(ids).logits
        assert served_runtime.tokenizer is not None
        likeliest = logits[-1].argmax(-1).tolist()
        texts = [served_runtime.tokenizer.decode([one], skip_special_tokens=False) for one in likeliest]
        shown = [repr(text)[1:-1].replace(" ", "·") or f"#{one}" for one, text in zip(likeliest, texts, strict=True)]
        assert output.splitlines()[-1].split()[2:] == shown
        assert ("--chat" in error) == (not options)


def test_the_official_client_streams_and_says_loops(addition: Path) -> None:
    with Server(addition, "--name", "addition") as server:
        lines = said(start("openai_client.py", f"{server.url}/v1", PROBLEM)).splitlines()
    runtime = Runtime.load(addition)
    early = runtime.generate(PROBLEM, exit_threshold=0.9)
    depth = early.depth[early.prompt_tokens - 1 :]
    assert lines[0] == "addition, up to 4 loops per token"
    assert lines[1].startswith(f"loops=1: '{runtime.generate(PROBLEM, loops=1).text}', loops by token [1, 1")
    assert lines[2] == f"loops=4: '{ANSWER}', loops by token {[4] * 8}"
    assert lines[3] == "".join(f"{text}({loops})" for text, loops in zip([*early.text, ""], depth, strict=False))
    assert lines[4] == f"{len(early.token_ids)} tokens after {len(PROBLEM)} of the prompt"


def test_the_official_client_chats_where_there_is_a_template(server: Server, served_runtime: Runtime) -> None:
    lines = said(start("openai_client.py", f"{server.url}/v1", "hello")).splitlines()
    prompt = served_runtime.chat_prompt([{"role": "user", "content": "hello"}])
    expected = f"chat: {served_runtime.generate(prompt, max_tokens=32).text}"
    assert "\n".join(lines).endswith("\n".join(expected.splitlines()))


@pytest.fixture(scope="module")
def application(served_package: Path) -> Iterator[Any]:
    """The web application, served by a thread: where, and the module."""
    import uvicorn

    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLES / "fastapi_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fastapi_app"] = module
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setenv("MELT_PACKAGE", str(served_package))
        server = uvicorn.Server(uvicorn.Config(module.app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        eventually(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/answers", module
        server.should_exit = True
        thread.join(WAIT)
    assert not module.app.state.scheduler.open
    del sys.modules["fastapi_app"]


def test_an_application_of_ones_own_streams_what_the_runtime_says(application: Any, served_runtime: Runtime) -> None:
    url, _ = application

    def ask(number: int) -> list[Any]:
        body = {"prompt": f"question {number}", "loops": 1 + number % 4, "max_tokens": 20}
        reply = httpx.post(url, json=body, timeout=WAIT)
        return [json.loads(line) for line in reply.text.splitlines()]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    for number, lines in enumerate(found):
        loops = 1 + number % 4
        expected = served_runtime.generate(f"question {number}", loops=loops, max_tokens=20)
        assert "".join(line["text"] for line in lines[:-1]) == expected.text
        assert {line["loops"] for line in lines[:-1]} == {loops}
        assert lines[-1] == {"finish_reason": expected.finish_reason}


def test_who_leaves_an_application_of_ones_own_frees_a_slot(application: Any, served_runtime: Runtime) -> None:
    url, module = application
    scheduler = module.app.state.scheduler
    endless = next(p for p in "abcdefgh" if served_runtime.generate(p, max_tokens=1024).finish_reason == "length")
    with httpx.stream("POST", url, json={"prompt": endless, "max_tokens": 1024}, timeout=WAIT) as reply:
        lines = reply.iter_lines()
        assert [set(json.loads(next(lines))) for _ in range(3)] == [{"text", "loops"}] * 3
    eventually(lambda: scheduler.metrics().requests["cancelled"] == 1 and scheduler.metrics().running == 0)


def test_an_application_of_ones_own_refuses_in_a_sentence(application: Any) -> None:
    url, _ = application
    reply = httpx.post(url, json={"prompt": ""}, timeout=WAIT)
    assert reply.status_code == 400
    assert reply.json() == {"error": "the prompt is empty; give at least one token"}


@pytest.fixture
def readings(tmp_path: Path) -> Path:
    """What the device reads, a line each."""
    path = tmp_path / "readings.txt"
    path.write_text("".join(f"{20 + turn % 7}.{turn % 10} degrees\n" for turn in range(TURNS)), encoding="utf-8")
    return path


def test_a_device_that_loses_its_power_at_any_moment_says_what_it_would_have_said(
    tiny_package: Path, readings: Path, tmp_path: Path
) -> None:
    through = tmp_path / "through"
    assert said(device(tiny_package, readings, through)) == f"{TURNS} turns are over\n"
    expected = (through / "answers.jsonl").read_bytes()
    assert len({json.loads(line)["answer"] for line in expected.splitlines()}) > TURNS / 2

    cut = tmp_path / "cut"
    answers = cut / "answers.jsonl"
    kills = 0
    for _ in range(CUTS):
        size = answers.stat().st_size if answers.exists() else 0
        program = device(tiny_package, readings, cut)
        eventually(lambda: program.poll() is not None or (answers.exists() and answers.stat().st_size > size))  # noqa: B023
        sleep(random.uniform(0, 0.1))
        program.kill()
        program.communicate(timeout=WAIT)
        kills += program.returncode == -signal.SIGKILL
        content = answers.read_bytes()
        assert expected.startswith(content[: content.rfind(b"\n") + 1])
        if len(content) >= len(expected):
            break
    assert kills >= 2, f"it was killed {kills} times before it was through: give it more turns"
    assert said(device(tiny_package, readings, cut)) == f"{TURNS} turns are over\n"
    assert answers.read_bytes() == expected
    assert [file.name for file in (cut / "sessions").iterdir()] == [f"turn-{TURNS:08d}"]


def test_a_device_whose_last_line_was_torn_runs_that_turn_again(
    tiny_package: Path, readings: Path, tmp_path: Path
) -> None:
    lines = readings.read_text(encoding="utf-8").splitlines(keepends=True)
    readings.write_text("".join(lines[:5]), encoding="utf-8")
    said(device(tiny_package, readings, tmp_path / "device"))
    answers = tmp_path / "device" / "answers.jsonl"
    torn = tmp_path / "device" / "sessions" / ".turn-00000006.partial-x"
    torn.mkdir()
    (torn / "turn-00000006").write_bytes(b"half")
    with answers.open("a", encoding="utf-8") as file:
        file.write('{"turn": 5, "read')
    readings.write_text("".join(lines[:8]), encoding="utf-8")
    said(device(tiny_package, readings, tmp_path / "device"))
    said(device(tiny_package, readings, tmp_path / "through"))
    assert answers.read_bytes() == (tmp_path / "through" / "answers.jsonl").read_bytes()
    assert [json.loads(line)["turn"] for line in answers.read_bytes().splitlines()] == list(range(8))
    assert [file.name for file in (tmp_path / "device" / "sessions").iterdir()] == ["turn-00000008"]


def test_a_device_waits_for_readings_that_are_still_to_come(tiny_package: Path, readings: Path, tmp_path: Path) -> None:
    lines = readings.read_text(encoding="utf-8").splitlines(keepends=True)
    readings.write_text(lines[0] + lines[1][:4], encoding="utf-8")  # the second is still being written
    answers = tmp_path / "device" / "answers.jsonl"
    program = device(tiny_package, readings, tmp_path / "device", "--follow")
    eventually(lambda: answers.exists() and answers.read_bytes().count(b"\n") == 1)
    with readings.open("a", encoding="utf-8") as file:
        file.write(lines[1][4:])
    eventually(lambda: answers.read_bytes().count(b"\n") == 2)
    program.kill()
    program.communicate(timeout=WAIT)
    assert [json.loads(line)["reading"] for line in answers.read_bytes().splitlines()] == [
        line.strip() for line in lines[:2]
    ]


# Ray ends a proxy that does not answer within 5 seconds, and starting takes longer where others compute.
UNHURRIED = {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "120" for check in ("READY", "HEALTH")}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install melt-export[ray]"
)
def test_two_replicas_behind_ray_serve_both_answer_and_stream(addition: Path, tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(
            [sys.executable, EXAMPLES / "ray_serve.py", addition, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(tmp_path), **UNHURRIED},
        )
    try:
        due = monotonic() + PATIENCE
        while program.poll() is None and "serving at" not in (tmp_path / "log").read_text() and monotonic() < due:
            sleep(0.1)
        assert program.poll() is None, (tmp_path / "log").read_text()
        body = {"model": "package", "prompt": PROBLEM, "temperature": 0}

        def ask(_: int) -> tuple[str, str]:
            reply = httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT)
            return reply.headers["x-replica"], reply.json()["choices"][0]["text"]

        found: set[tuple[str, str]] = set()
        rounds = 0
        with ThreadPoolExecutor(8) as pool:
            while len(found) < 2 and rounds < 20:
                found |= set(pool.map(ask, range(8)))
                rounds += 1
        assert {text for _, text in found} == {ANSWER}
        assert len({replica for replica, _ in found}) == 2
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT)
        parts = list(client.completions.create(model="package", prompt=PROBLEM, temperature=0, stream=True))
        assert "".join(part.choices[0].text for part in parts) == ANSWER
        assert len(parts) == len(ANSWER) + 1
        assert re.search(r"exit_threshold|loops", httpx.get(f"{url}/v1/models", timeout=WAIT).text)
    finally:
        program.terminate()
        code = program.wait(PATIENCE)
    assert code == 0, (tmp_path / "log").read_text()

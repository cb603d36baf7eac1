"""Pipelined answers with threads, deadlines, clients that go, a server that stops, stop strings, logprobs, forks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import MakeCheckpoint, MakePackage, write_tokenizer
from melt_runtime import DeadlineError, Request, Runtime, Scheduler, TextDelta
from melt_runtime.cli.main import app
from serving import WAIT, Server, eventually
from typer.testing import CliRunner

PROMPTS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9], [5, 6], [9, 9, 9, 1], [40, 2, 7], [12, 13, 14, 15, 16]]
ENDLESS = 900


@pytest.fixture(scope="module")
def package(make_package: MakePackage, make_looplm: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoopLM with a tokenizer of characters, and room for long answers in four slots."""
    checkpoint = tmp_path_factory.mktemp("service") / "checkpoint"
    checkpoint.mkdir()
    for file in make_looplm(max_position_embeddings=1024).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    write_tokenizer(checkpoint)
    return make_package(checkpoint, chunk=8, max_seq_len=1024, max_batch=4)


@pytest.fixture(scope="module")
def runtime(package: Path) -> Runtime:
    return Runtime.load(package, threads=1)


@pytest.fixture(scope="module")
def server(package: Path) -> Any:
    with Server(package, "--pipeline", "on", "--slots", 2) as running:
        yield running


def plain(runtime: Runtime, prompt: Any, **options: Any) -> Any:
    return runtime.generate(prompt, **{"ignore_eos": True, **options, "pipeline": "off"})


@pytest.mark.parametrize("pipeline", ["on", "auto"])
def test_threads_that_share_a_runtime_get_what_they_get_alone(runtime: Runtime, pipeline: str) -> None:
    asked: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 0.8, "seed": 2}
    expected = [plain(runtime, prompt, **asked) for prompt in PROMPTS]

    def streamed(prompt: list[int]) -> str:
        return "".join(runtime.stream(prompt, pipeline=pipeline, **asked))

    def in_session(prompt: list[int]) -> str:
        session = runtime.session(pipeline=pipeline, **asked)
        session.append(prompt)
        return session.generate().text

    def at_once(prompt: list[int]) -> str:
        return runtime.generate(prompt, pipeline=pipeline, **asked).text

    ways: list[Callable[[list[int]], str]] = [streamed, in_session, at_once]
    with ThreadPoolExecutor(6) as pool:
        work = [(way, prompt) for _ in range(2) for way in ways for prompt in PROMPTS]
        found = list(pool.map(lambda one: one[0](one[1]), work))
    assert found == [one.text for one in expected] * 6


def test_a_deadline_ends_a_pipelined_request_alone(runtime: Runtime) -> None:
    long = {"max_tokens": ENDLESS, "ignore_eos": True, "pipeline": "on"}
    with Scheduler(runtime, slots=2) as scheduler:
        late = scheduler.submit(Request(tuple(PROMPTS[0]), runtime.options(**long), deadline=0.05))
        other = scheduler.submit(Request(tuple(PROMPTS[1]), runtime.options(**{**long, "max_tokens": 60})))
        deltas: list[TextDelta] = []
        with pytest.raises(DeadlineError):
            deltas.extend(late)
        assert other.result() == plain(runtime, PROMPTS[1], max_tokens=60)
        after = scheduler.submit(Request(tuple(PROMPTS[2]), runtime.options(**{**long, "max_tokens": 30}))).result()
    assert after == plain(runtime, PROMPTS[2], max_tokens=30)
    expected = plain(runtime, PROMPTS[0], max_tokens=ENDLESS).token_ids
    assert [delta.token_id for delta in deltas] == list(expected[: len(deltas)])


@pytest.mark.parametrize("drain", [True, False])
def test_a_scheduler_that_closes_with_tokens_in_flight_ends_every_answer(runtime: Runtime, drain: bool) -> None:
    begun = threading.Semaphore(0)
    options = runtime.options(max_tokens=80 if drain else ENDLESS, ignore_eos=True, pipeline="on")
    scheduler = Scheduler(runtime, slots=3)
    handles = [
        scheduler.submit(Request(tuple(prompt), options), lambda event: begun.release()) for prompt in PROMPTS[:3]
    ]
    for _ in range(12):
        assert begun.acquire(timeout=WAIT)
    assert scheduler.close(drain=drain)
    expected = [plain(runtime, prompt, max_tokens=options.max_tokens) for prompt in PROMPTS[:3]]
    if drain:
        assert [handle.result() for handle in handles] == expected
        return
    for handle, whole in zip(handles, expected, strict=True):
        said = [delta.token_id for delta in _until_the_end(handle)]
        assert said == list(whole.token_ids[: len(said)])


def _until_the_end(handle: Any) -> list[TextDelta]:
    found: list[TextDelta] = []
    try:
        found.extend(handle)
    except Exception as error:
        assert type(error).__name__ == "CancelledError"  # noqa: PT017
    return found


def test_a_client_that_goes_takes_its_tokens_in_flight_with_it(server: Server, runtime: Runtime) -> None:
    client, rest = server.client(), {"ignore_eos": True}
    before = server.metrics()["melt_pipeline_tokens_total"]
    for _ in range(3):
        stream = client.completions.create(
            model="tiny", prompt="abc", max_tokens=ENDLESS, temperature=0, stream=True, extra_body=rest
        )
        for _ in range(7):
            next(iter(stream))
        stream.close()
        reply = client.completions.create(model="tiny", prompt="hello", max_tokens=30, temperature=0, extra_body=rest)
        assert reply.choices[0].text == plain(runtime, "hello", max_tokens=30).text
    eventually(lambda: server.metrics()["melt_requests_running"] == 0)
    assert server.metrics()["melt_pipeline_tokens_total"] > before


def test_a_server_that_is_told_to_stop_ends_its_pipelined_streams(package: Path, runtime: Runtime) -> None:
    with Server(package, "--pipeline", "on", "--slots", 2, "--drain", 60) as server:
        stream = server.client().completions.create(
            model="tiny", prompt="abc", max_tokens=300, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        parts = iter(stream)
        said = next(parts).choices[0].text
        server.process.send_signal(signal.SIGTERM)
        said += "".join(part.choices[0].text for part in parts)
        assert server.end() == 0
    assert said == plain(runtime, "abc", max_tokens=300).text


@pytest.mark.parametrize("value", [True, 1, None, "on", "yes", ["on"], {"mode": "on"}])
def test_a_request_cannot_choose_it_and_is_told_so(server: Server, value: Any) -> None:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "pipeline": value}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=WAIT)
    assert reply.status_code == 400
    assert "pipeline" in reply.json()["error"]["message"]


@pytest.mark.parametrize("value", ["yes", "", "On", "1", "on,off", "\x00", "o" * 5000])
def test_the_command_line_refuses_what_it_does_not_know(package: Path, value: str) -> None:
    for order in (["generate", str(package), "abc"], ["serve", str(package)], ["chat", str(package)]):
        result = CliRunner().invoke(app, [*order, "--pipeline", value])
        assert result.exit_code == 2, result.output
        assert "pipeline" in result.stderr
        assert "auto" in result.stderr
        assert len(result.stderr) < 1000


def test_a_stop_string_ends_the_answer_wherever_its_tokens_were_drafted(runtime: Runtime) -> None:
    """Every stop string of two to five characters of the answer: it begins in one draft and ends in another."""
    whole = plain(runtime, PROMPTS[0], max_tokens=24).text
    for size in range(2, 6):
        for start in range(0, len(whole) - size, 3):
            asked: dict[str, Any] = {"max_tokens": 24, "stop": [whole[start : start + size]], "ignore_eos": True}
            expected = plain(runtime, PROMPTS[0], **asked)
            assert expected.finish_reason == "stop"
            assert runtime.generate(PROMPTS[0], pipeline="on", **asked) == expected
            assert "".join(runtime.stream(PROMPTS[0], pipeline="on", **asked)) == expected.text


@pytest.mark.parametrize("slots", [1, 3])
def test_logprobs_are_those_of_plain_decoding(runtime: Runtime, slots: int) -> None:
    def deltas(pipeline: str) -> list[list[Any]]:
        asked = runtime.options(max_tokens=30, ignore_eos=True, pipeline=pipeline, temperature=0.7, seed=9)
        with Scheduler(runtime, slots=slots) as scheduler:
            handles = [scheduler.submit(Request(tuple(prompt), asked, logprobs=3)) for prompt in PROMPTS]
            return [[(delta.token_id, delta.logprobs) for delta in handle] for handle in handles]

    for piped, alone in zip(deltas("on"), deltas("off"), strict=True):
        assert [token for token, _ in piped] == [token for token, _ in alone]
        for (_, found), (_, expected) in zip(piped, alone, strict=True):
            assert found.token == pytest.approx(expected.token, abs=1e-5)
            assert [id for id, _ in found.top] == [id for id, _ in expected.top]


def test_a_session_is_copied_and_saved_between_the_tokens_of_a_stream(runtime: Runtime, tmp_path: Path) -> None:
    """Tokens in flight belong to no branch and to no file."""
    asked: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, "temperature": 0.9, "seed": 3}
    whole = plain(runtime, PROMPTS[0], **asked).token_ids
    session = runtime.session(pipeline="on", **asked)
    session.append(PROMPTS[0])
    stream, said = session.deltas(), list[int]()
    for count in range(1, 31):
        said.append(next(stream).token_id)
        if count % 4 == 1:
            session.save(tmp_path / "saved.melt")
            for one in (session.fork(), runtime.load_session(tmp_path / "saved.melt")):
                assert one.generate(max_tokens=30 - count).token_ids == whole[count:] if count < 30 else True
    assert tuple(said) == whole

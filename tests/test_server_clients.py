"""Clients that people use, each in a process of its own, against a server. One that is not installed is skipped.

``MELT_CLIENTS``: a Python that has them, such as that of a virtual environment; without it, this one is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_styles import QWEN_3
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Runtime
from scripted import scripted_server, with_template
from serving import WAIT, Server

PYTHON = os.environ.get("MELT_CLIENTS", sys.executable)
PROGRAMS = Path(__file__).parent / "clients"


def run_client(program: str, package: str, *arguments: object) -> Any:
    """Run a program of ``clients/`` and return the JSON of its last line. Skips the test if its package is missing."""
    if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True, timeout=WAIT).returncode:
        pytest.skip(f"{package} is not installed in {PYTHON}; MELT_CLIENTS names a Python that has it")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OPENAI_API_KEY": "none", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}
    command = [PYTHON, str(PROGRAMS / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * WAIT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def log_softmax(runtime: Runtime, ids: list[int]) -> np.ndarray:
    logits = runtime.loops(ids).logits
    assert logits is not None
    shifted = logits[-1].astype(np.float64) - logits[-1].max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def test_lm_eval_scores_and_continues_texts_and_needs_no_tokenizer_of_its_own(
    server: Server, served_runtime: Runtime
) -> None:
    found = run_client("lm_eval_scores.py", "lm_eval.models.openai_completions", server.url)
    assert found["tokenizer"] == "remote"
    pairs = [("abc d", "ef"), ("x", "yz."), ("The quick brown", " fox"), ("", "Hello")]
    for (score, greedy), (context, text) in zip(found["scores"], pairs, strict=True):
        before = served_runtime.encode(context) if context else [1]  # the end-of-text token
        ids = [*before, *served_runtime.encode(text)]
        says = log_softmax(served_runtime, ids)
        places = range(len(before), len(ids))
        assert score == pytest.approx(sum(says[at - 1, ids[at]] for at in places), abs=1e-3)
        assert greedy == all(says[at - 1].argmax() == ids[at] for at in places)
    ids = [1, *served_runtime.encode("Hello, world")]
    says = log_softmax(served_runtime, ids)
    assert found["rolling"] == [pytest.approx(sum(says[at - 1, ids[at]] for at in range(1, len(ids))), abs=1e-3)]
    assert found["texts"] == [served_runtime.generate("abc", max_tokens=5).text]


ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CALLED = ["weather", {"city": "Ulm", "days": 2}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm", "days": 2}}\n</tool_call>'
ASKED = f"<think>\nUlm it is.\n</think>\n\n{CALL}"


@pytest.fixture(scope="module")
def qwen(make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose chat template knows tools and reasoning."""
    checkpoint = make_checkpoint(vocab_size=104, max_position_embeddings=8192, alphabet=ALPHABET)
    made = with_template(checkpoint, tmp_path_factory.mktemp("qwen") / "model", QWEN_3.replace("\\n", "\n"))
    return make_package(made, max_batch=4)


def test_openais_client_calls_functions(qwen: Path) -> None:
    with scripted_server(qwen, [ASKED, "Sun.", ASKED]) as server:
        found = run_client("openai_tools.py", "openai", server.url)
    assert found == {"calls": [CALLED], "reason": "tool_calls", "answer": "Sun.", "streamed": [CALLED]}


def test_langchain_binds_tools_streams_and_embeds(qwen: Path) -> None:
    structured = '<tool_call>\n{"name": "Answer", "arguments": {"right": true}}\n</tool_call>'
    with scripted_server(qwen, [ASKED, "Sun.", ASKED, structured, ASKED]) as server:
        found = run_client("langchain_tools.py", "langchain_openai", server.url)
    vectors = found.pop("vectors")
    assert found == {
        "calls": [CALLED],
        "reason": "tool_calls",
        "answer": "Sun.",
        "streamed": [CALLED],
        "structured": True,
        "responses": [CALLED],
    }
    runtime = Runtime.load(qwen)
    for vector, text in zip(vectors, ["abc", "Hello"], strict=True):
        expected = runtime.loops(text, logits=False).hidden[-1].mean(axis=0)
        assert vector == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)


def test_open_webui_chats_calls_functions_and_names_chats(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    """Its 28 functions are 20,000 characters; its tasks ask for up to 1,000 tokens."""
    sizes = {"max_position_embeddings": 32768, "num_hidden_layers": 1, "chunk_size": 128}
    checkpoint = make_checkpoint(vocab_size=104, alphabet=ALPHABET, **sizes)
    made = with_template(checkpoint, tmp_path / "model", QWEN_3.replace("\\n", "\n"))
    package = make_package(made, max_batch=4, max_seq_len=32768)
    own_call = '<tool_call>\n{"name": "calculate_timestamp", "arguments": {"days_ago": 3}}\n</tool_call>'
    through_its_api = ["Sun.", "Sun.", CALL, "Sun.", "Sun"]
    on_its_page = ["Rain.", f"<think>\nWhen?\n</think>\n\n{own_call}", "<think>\nThen.\n</think>\n\nSnow."]
    on_its_page += ['{"follow_ups": ["And?"]}', '{"title": "Ulm"}', '{"tags": ["weather"]}']
    shown = {
        "answers": ["Rain.", "Snow."],
        "reasoning": ["When?", "Then."],
        "calls": [["calculate_timestamp", {"days_ago": 3}]],
        "follow_ups": ["And?"],
        "title": "Ulm",
        "tags": ["weather"],
    }
    with scripted_server(package, [*through_its_api, *on_its_page, "Sun.", *on_its_page]) as server:
        found = run_client("openwebui_chats.py", "open_webui", server.url)
        assert server.metrics()['melt_depth_loops_bucket{le="3"}'] > 0
        assert not [line for line in server.log() if line.get("status", 200) >= 400]
    bare = found.pop("bare")
    assert (bare["completion_tokens"], bare["prompt_tokens"] < 200) == (5, True)
    assert found == {
        "models": ["tiny"],
        "whole": "Sun.",
        "used": 5,
        "streamed": "Sun.",
        "used_streamed": 5,
        "calls": [CALLED],
        "reason": "tool_calls",
        "answer": "Sun.",
        "set_by_hand": 4,
        "page": shown,
        "responses": shown,
    }


def test_litellm_calls_functions_and_shows_reasoning(qwen: Path) -> None:
    with scripted_server(qwen, [ASKED, "Sun.", ASKED]) as server:
        found = run_client("litellm_tools.py", "litellm", server.url)
    assert found == {
        "calls": [CALLED],
        "reason": "tool_calls",
        "reasoning": "Ulm it is.",
        "answer": "Sun.",
        "streamed": [CALLED],
    }

"""A conversation in a file: kept, loaded, gone on with, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_chat
from conftest import MakePackage
from melt_runtime import BackendError, Runtime, SessionError
from melt_runtime.session import file as session_file
from melt_runtime.session.conversation import Conversation
from safetensors import safe_open
from safetensors.numpy import save_file
from test_chat import SAMPLED, chat_ids, continued, said
from test_run_cli import run

runtime, prompt = test_chat.runtime, test_chat.prompt


@pytest.mark.parametrize("options", [{}, SAMPLED, {"exit_threshold": 0.7, "loops": 3}], ids=str)
def test_a_loaded_conversation_goes_on_exactly_as_the_kept_one(
    runtime: Runtime, prompt: str, tmp_path: Path, options: dict[str, Any]
) -> None:
    kept = Conversation(runtime.session(max_tokens=9, **options), system="be brief")
    said(kept, prompt)
    kept.think(2)
    said(kept, "and")
    kept.save(tmp_path / "chat")
    loaded = Conversation(runtime.session(max_tokens=30, temperature=0.3, loops=1), system="something else")
    said(loaded, "what is not kept")
    loaded.load(tmp_path / "chat")
    assert loaded.messages == kept.messages
    assert loaded.loops == kept.loops
    for text in (prompt, "more"):
        assert said(loaded, text) == said(kept, text)
    assert loaded.session.tokens == kept.session.tokens
    assert loaded.session.depth == kept.session.depth
    assert np.array_equal(loaded.session.logits(), kept.session.logits())


def test_an_empty_conversation_may_be_kept(runtime: Runtime, prompt: str, tmp_path: Path) -> None:
    Conversation(runtime.session(max_tokens=5), system="be brief").save(tmp_path / "chat")
    loaded = Conversation(runtime.session())
    said(loaded, prompt)
    loaded.load(tmp_path / "chat")
    assert [message.content for message in loaded.messages] == ["be brief"]
    assert said(loaded, prompt) == runtime.generate(chat_ids(runtime, prompt, system="be brief"), max_tokens=5).text


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/chat"], ids=len)
def test_a_name_that_no_file_can_have_ends_no_conversation(tiny_package: Path, prompt: str, name: str) -> None:
    result = run("chat", tiny_package, "--max-tokens", 3, stdin=f"{prompt}\n/save {name}\n/load {name}\n{prompt}\n")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 2


def test_commands_keep_and_load(tiny_package: Path, prompt: str, tmp_path: Path) -> None:
    file = tmp_path / "a chat.session"
    options = ["--max-tokens", 6, "--temperature", 1, "--seed", 2]
    whole = run("chat", tiny_package, *options, stdin=f"{prompt}\n/save {file}\n{prompt}\n")
    rest = run("chat", tiny_package, stdin=f"never\n/load {file}\n{prompt}\n/history\n")
    assert rest.exit_code == 0, rest.output
    assert whole.stdout.splitlines()[1] == rest.stdout.splitlines()[-1]
    assert "kept: 2 messages" in whole.stderr
    assert "going on: 2 messages" in rest.stderr
    assert "never" not in rest.stderr


def test_a_file_of_another_package_is_refused_and_nothing_changes(
    runtime: Runtime, make_package: MakePackage, tiny_checkpoint: Path, tmp_path: Path, prompt: str
) -> None:
    other = Conversation(Runtime.load(make_package(tiny_checkpoint, max_seq_len=128)).session(max_tokens=3))
    said(other, prompt)
    other.save(tmp_path / "other")
    here, same = (Conversation(runtime.session(max_tokens=8)) for _ in range(2))
    said(here, prompt)
    said(same, prompt)
    with pytest.raises(SessionError, match=r"saved with another package than \S+; open the one it belongs to$"):
        here.load(tmp_path / "other")
    assert here.messages == same.messages
    assert said(here, "and") == said(same, "and")


def test_a_session_that_is_no_chats_is_refused(runtime: Runtime, tmp_path: Path, prompt: str) -> None:
    conversation = Conversation(runtime.session(max_tokens=3))
    said(conversation, prompt)
    messages = conversation.messages
    plain = runtime.session()
    plain.append(prompt)
    plain.save(tmp_path / "plain")
    with pytest.raises(SessionError, match="without messages"):
        conversation.load(tmp_path / "plain")
    plain.messages = messages[:1]
    plain.save(tmp_path / "odd")
    with pytest.raises(SessionError, match="in turn"):
        conversation.load(tmp_path / "odd")
    assert conversation.messages == messages


def test_messages_are_under_the_hash_and_must_be_text(runtime: Runtime, tmp_path: Path, prompt: str) -> None:
    path = tmp_path / "chat"
    conversation = Conversation(runtime.session(max_tokens=3))
    said(conversation, prompt)
    conversation.save(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(prompt.encode(), prompt[::-1].encode()))
    with pytest.raises(SessionError, match="its hash is not"):
        conversation.load(path)
    path.write_bytes(content)
    assert runtime.load_session(path).fork().messages == conversation.messages
    for wrong in ([{"role": "user", "content": 5}], [{"role": "user"}], ["user"], 7):
        path.write_bytes(content)
        rewrite(path, wrong)
        with pytest.raises(SessionError, match="cannot be"):
            conversation.load(path)


def rewrite(path: Path, messages: object) -> None:
    """Puts other messages into a file, with the hash they need."""
    with safe_open(path, framework="numpy") as file:
        metadata, arrays = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del metadata["sha256"]
    metadata["session"] = json.dumps({**json.loads(metadata["session"]), "messages": messages})
    metadata["sha256"] = session_file._digest(metadata, arrays)
    save_file(arrays, path, metadata)


def test_a_device_that_fails_while_loading_leaves_a_conversation_that_goes_on(
    runtime: Runtime, tmp_path: Path, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, same = (Conversation(runtime.session(max_tokens=8)) for _ in range(2))
    for one in (here, same):
        said(one, prompt)
    here.save(tmp_path / "chat")
    answer = here.messages[1].content

    def fails(*_: object) -> None:
        raise BackendError("it broke")

    with monkeypatch.context() as patch:
        patch.setattr(here.session.driver.state, "write_positions", fails)
        with pytest.raises(BackendError, match="it broke"):
            here.load(tmp_path / "chat")
    assert here.messages == same.messages
    expected = runtime.session(max_tokens=8)
    assert said(here, "and") == continued(expected, chat_ids(runtime, prompt, answer, "and"))


def test_a_loaded_conversation_names_the_system_message_that_it_drops(
    tiny_package: Path, prompt: str, tmp_path: Path
) -> None:
    for name, options in (("with", ["--system", "from the file"]), ("without", [])):
        run("chat", tiny_package, *options, "--max-tokens", 3, stdin=f"{prompt}\n/save {tmp_path}/{name}\n")
    script = f"/load {tmp_path}/with\n/system be brief\n/load {tmp_path}/without\n/load {tmp_path}/with\n"
    result = run("chat", tiny_package, "--system", "be brief", stdin=script)
    assert result.exit_code == 0, result.output
    dropped = [line for line in result.stderr.splitlines() if "dropped" in line]
    assert dropped == [
        "the system message so far is dropped: be brief; the file's is used: from the file",
        "the system message so far is dropped: be brief; the file has none",
    ]

"""A session in a file: whole, refused when changed, and continued with exactly the tokens that would have come."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_parts
import test_session
from conftest import MakePackage
from melt_runtime import ArgumentError, Runtime, Session, SessionError
from melt_runtime.session import file as session_file
from test_session import MORE, PROMPT, WAYS, opened

every_backend = test_parts.runtime
runtime = test_session.runtime
PAGE = Path(__file__).parent.parent / "docs" / "runtime.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.session"


def after_prompt(session: Session) -> None:
    """Nothing was drawn yet."""


def after_drawing(session: Session) -> None:
    session.generate(max_tokens=3)


def after_a_turn(session: Session) -> None:
    session.generate(max_tokens=3)
    session.append(MORE, chunk=3)


def after_going_back(session: Session) -> None:
    session.generate(max_tokens=5)
    session.rewind(8)


MOMENTS = (after_prompt, after_drawing, after_a_turn, after_going_back)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_loaded_session_goes_on_as_the_saved_one(
    every_backend: Runtime, path: Path, way: str, moment: Callable[[Session], None]
) -> None:
    session = opened(every_backend, loops=3, **WAYS[way])
    moment(session)
    session.save(path)
    loaded = every_backend.load_session(path)
    assert (loaded.tokens, loaded.depth, loaded.chunks) == (session.tokens, session.depth, session.chunks)
    for _ in range(2):
        assert loaded.generate(max_tokens=7) == session.generate(max_tokens=7)
        loaded.append(MORE)
        session.append(MORE)
    assert np.array_equal(loaded.logits(), session.logits())


def test_a_session_with_tokens_of_different_depth_is_saved_as_it_is(runtime: Runtime, path: Path) -> None:
    session = opened(runtime, exit_threshold=0.8)
    session.generate(max_tokens=6)
    assert len(set(session.depth)) > 1
    session.save(path)
    loaded = Session.load(runtime, path)
    assert loaded.generate(max_tokens=9) == session.generate(max_tokens=9)


CONTINUE = """
import json, sys
from melt_runtime import Runtime
session = Runtime.load(sys.argv[1]).load_session(sys.argv[2])
print(json.dumps([session.generate(max_tokens=9).token_ids, session.tokens]))
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("moment", [after_prompt, after_drawing])
def test_another_process_goes_on_as_this_one(
    runtime: Runtime, tiny_package: Path, path: Path, way: str, moment: Callable[[Session], None]
) -> None:
    session = opened(runtime, **WAYS[way])
    moment(session)
    session.save(path)
    command = [sys.executable, "-c", CONTINUE, str(tiny_package), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    drawn = session.generate(max_tokens=9).token_ids
    assert json.loads(result.stdout) == [list(drawn), list(session.tokens)]


def test_a_file_holds_the_used_rows_and_little_else(runtime: Runtime, path: Path) -> None:
    session = opened(runtime)
    session.save(path)
    rows = runtime.manifest.cache_bytes(len(PROMPT))
    assert rows < path.stat().st_size < rows + 6000 < runtime.state_bytes()


def test_biases_by_token_are_the_same_in_a_loaded_session(runtime: Runtime, path: Path) -> None:
    """JSON has no keys but texts."""
    session = runtime.session(max_tokens=8, ignore_eos=True, logit_bias={30: 3.0, 3: -100.0}, presence_penalty=0.5)
    session.append([5, 6, 7])
    session.save(path)
    assert runtime.load_session(path).generate().token_ids == session.generate().token_ids


def test_an_empty_session_can_be_saved(runtime: Runtime, path: Path) -> None:
    runtime.session(loops=2, stop=("ab", "c"), stop_ids={4, 5}).save(path)
    session = runtime.load_session(path)
    assert session.tokens == ()
    session.append(PROMPT)
    assert set(session.depth) == {2}
    assert (session.options["stop"], session.options["stop_ids"]) == (["ab", "c"], [4, 5])


def test_options_that_no_file_can_hold_are_refused(runtime: Runtime, path: Path) -> None:
    session = opened(runtime)
    session.options["stop_ids"] = object()
    with pytest.raises(ArgumentError, match="cannot be written"):
        session.save(path)
    assert not path.exists()


def test_a_session_of_another_package_is_refused(
    runtime: Runtime, make_package: MakePackage, tiny_checkpoint: Path, path: Path
) -> None:
    opened(runtime).save(path)
    other = Runtime.load(make_package(tiny_checkpoint, max_seq_len=128))
    with pytest.raises(SessionError, match="saved with another package"):
        other.load_session(path)


def test_engines_change_nothing_of_what_a_session_belongs_to(runtime: Runtime, package_copy: Path, path: Path) -> None:
    opened(runtime).save(path)
    manifest = package_copy / "manifest.json"
    other = Runtime.load(package_copy)
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "engines": {}}, indent=2) + "\n")
    assert other.load_session(path).tokens == tuple(PROMPT)


def test_a_changed_byte_anywhere_is_refused(runtime: Runtime, path: Path) -> None:
    session = opened(runtime)
    session.generate(max_tokens=2)
    session.save(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = {*range(0, header, 7), *range(header, len(content), 509), len(content) - 1}
    for place in sorted(places):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(SessionError):
            runtime.load_session(path)


def test_a_truncated_file_is_refused(runtime: Runtime, path: Path) -> None:
    opened(runtime).save(path)
    content = path.read_bytes()
    for length in (0, 4, 8, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(SessionError, match="damaged"):
            runtime.load_session(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(SessionError, match="damaged"):
        runtime.load_session(path)


def test_what_is_no_saved_session_is_refused(runtime: Runtime, tmp_path: Path, tiny_checkpoint: Path) -> None:
    for file, why in (
        (tmp_path / "missing", "there is no saved session"),
        (tmp_path, "there is no saved session"),
        (tiny_checkpoint / "model.safetensors", "its format is not"),
    ):
        with pytest.raises(SessionError, match=why):
            runtime.load_session(file)


def deep(count: int) -> list[Any]:
    """So many lists within each other."""
    value: list[Any] = []
    for _ in range(count):
        value = [value]
    return value


IMPOSSIBLE: dict[str, Callable[[session_file.Saved], dict[str, Any]]] = {
    "a token outside the vocabulary": lambda s: {"tokens": s.tokens + 50},
    "more depths than tokens": lambda s: {"depth": np.append(s.depth, 4)},
    "a token that ran no loop": lambda s: {"depth": s.depth * 0},
    "a token that ran too many loops": lambda s: {"depth": s.depth + 1024},
    "an option beyond the bound": lambda s: {"options": {"loops": 10**9}},
    "a drawn token outside the vocabulary": lambda s: {"pending": 50},
    "a drawn token that is none": lambda s: {"pending": "a"},
    "chunks that begin later": lambda s: {"chunk_starts": s.chunk_starts + 1},
    "chunks out of order": lambda s: {"chunk_starts": s.chunk_starts[::-1].copy()},
    "chunks that are too long": lambda s: {"chunk_starts": s.chunk_starts[:1], "chunk_settings": s.chunk_settings[:1]},
    "chunks without settings": lambda s: {"settings": []},
    "positions of fewer tokens": lambda s: {
        "positions": {name: values[:, :-1].copy() for name, values in s.positions.items()}
    },
    "positions of another type": lambda s: {
        "positions": {name: values.astype("f2") for name, values in s.positions.items()}
    },
    "a cache without positions": lambda s: {"positions": dict(list(s.positions.items())[1:])},
    "positions of something else": lambda s: {"positions": {**s.positions, "hidden": s.tokens}},
    "an unknown option": lambda s: {"options": {"looops": 1}},
    "an option out of range": lambda s: {"options": {"temperature": -1}},
    "a random state that is none": lambda s: {"random": {"state": 1}},
    "floats for tokens": lambda s: {"tokens": s.tokens.astype(float)},
    "a drawn token beyond 64 bits": lambda s: {"pending": 2**63},
    "a drawn token far beyond": lambda s: {"pending": 10**39},
    "a temperature beyond any float": lambda s: {"options": {"temperature": 10**39 * 10**39}},
    "a number of hundreds of digits": lambda s: {"options": {"temperature": 10**400}},
    "a number of thousands of digits": lambda s: {"options": {"seed": 10**4299}},
    "lists far within each other": lambda s: {"options": {"stop": deep(900)}},
    "an absurd number of loops": lambda s: {"options": {"loops": 10**9}},
    "a depth beyond any": lambda s: {"depth": s.depth * 10**9},
    "a random state beyond its bits": lambda s: {"random": {**s.random, "state": {"state": -1, "inc": 10**39}}},
    "an infinite threshold": lambda s: {"options": {"exit_threshold": float("inf")}},
    "a length that is not its own": lambda s: {"chunk_starts": np.array([0, 2**62])},
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_a_file_whose_hash_is_right_and_whose_session_cannot_be_is_refused(
    runtime: Runtime, path: Path, what: str
) -> None:
    opened(runtime).save(path)
    saved = session_file.read(path, runtime.package, runtime.options)
    session_file.write(path, replace(saved, **IMPOSSIBLE[what](saved)))
    with pytest.raises(SessionError, match="cannot be") as refusal:
        runtime.load_session(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_a_file_larger_than_any_session_of_the_package_is_not_read(runtime: Runtime, path: Path) -> None:
    opened(runtime).save(path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # it takes no room on the disk, and would take all of the memory
    with pytest.raises(SessionError, match="a session of this package has at most"):
        runtime.load_session(path)


def test_a_saved_session_is_its_owners_alone(runtime: Runtime, path: Path) -> None:
    opened(runtime).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    opened(runtime).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "a" * 5000], ids=len)
def test_a_name_that_no_file_can_have_is_refused(runtime: Runtime, tmp_path: Path, name: str) -> None:
    session = opened(runtime)
    for do in (session.save, runtime.load_session):
        with pytest.raises(SessionError):
            do(tmp_path / name)


def test_saving_never_takes_the_place_of_a_link_a_device_or_a_fifo(
    runtime: Runtime, path: Path, tmp_path: Path
) -> None:
    session, kept = opened(runtime), tmp_path / "kept"
    kept.write_text("kept")
    link, nowhere, fifo = tmp_path / "link", tmp_path / "nowhere", tmp_path / "fifo"
    link.symlink_to(kept)
    nowhere.symlink_to(tmp_path / "missing")
    os.mkfifo(fifo)
    for target in (link, nowhere, fifo, Path("/dev/null"), tmp_path):
        with pytest.raises(SessionError, match=re.escape(str(target))):
            session.save(target)
    assert kept.read_text() == "kept"
    assert link.is_symlink()
    assert nowhere.is_symlink()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_beside(
    runtime: Runtime, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(runtime)
    session.save(path)
    before = path.read_bytes()
    session.generate(max_tokens=2)

    def full(arrays: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(session_file, "save_file", full)
        with pytest.raises(SessionError, match="no space left"):
            session.save(path)
    with pytest.raises(SessionError, match="cannot be written"):
        session.save(path.parent / "missing" / "chat.session")
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    session.save(path)
    assert runtime.load_session(path).tokens == session.tokens
    assert os.listdir(path.parent) == [path.name]


def test_the_readmes_example_runs(tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Sessions\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace('"PACKAGE"', repr(str(tiny_package))), names)
    again, session = names["again"], names["session"]
    assert again.tokens[: len(session.tokens)] == session.tokens
    assert len(names["store"]) > 0

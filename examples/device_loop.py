"""A program for a device that runs for months: it answers readings, and a power cut costs at most one turn.

    python examples/device_loop.py PACKAGE READINGS DIRECTORY [--follow]

A turn reads a line of the file READINGS, appends it to the conversation, and writes the model's answer as a line of
DIRECTORY/answers.jsonl. After any interruption the program resumes, and the answers equal those of a run without
interruption, sampling included.

The order of a turn's steps ensures this. First the session is saved under the number of the next turn (completely or
not at all), then the answer's line is written and synced. The number of lines is the number of finished turns, so the
session to resume from is the one with that number. A line that a power cut left incomplete is dropped, and its turn
runs again from the same session.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from melt_runtime import MeltError, Runtime, Session

ANSWER_TOKENS = 24
OPTIONS = {"temperature": 0.8, "top_p": 0.95, "seed": 7, "ignore_eos": True, "max_tokens": ANSWER_TOKENS}
INSTRUCTION = "readings of a pump, and what they mean.\n"


def session_file(directory: Path, turn: int) -> Path:
    """Return the path of the session with which a turn begins."""
    return directory / "sessions" / f"turn-{turn:08d}"


def turns_done(answers: Path) -> int:
    """Return the number of complete answers, and cut off what follows the last complete line."""
    content = answers.read_bytes() if answers.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(answers, whole)
    return content.count(b"\n")


def begin(runtime: Runtime, directory: Path, turn: int) -> Session:
    """Load the session with which a turn begins, or make a new one. Raises SessionError."""
    if turn:
        return runtime.load_session(session_file(directory, turn))
    session = runtime.session(**OPTIONS)
    session.append(INSTRUCTION)
    return session


def tidy(directory: Path, turn: int) -> None:
    """Delete all sessions except one turn's, and incomplete files that a power cut left behind."""
    (directory / "sessions").mkdir(parents=True, exist_ok=True)
    for left in (directory / "sessions").iterdir():
        if left.is_dir():
            shutil.rmtree(left)
        elif left != session_file(directory, turn):
            left.unlink()


def answer(session: Session, reading: str, kept: int) -> str:
    """Run one turn. When the cache is full, forget all but the first ``kept`` tokens, the instruction."""
    prompt = session.runtime.encode(f"{reading}: ")
    if session.room < len(prompt) + ANSWER_TOKENS:
        session.truncate(kept)
    session.append(prompt)
    return session.generate().text


def readings(path: Path, start: int, follow: bool) -> Iterator[str]:
    """Yield the lines of a file from a number on. With ``follow`` wait for more at the end.

    An incomplete last line is left for later.
    """
    with path.open(encoding="utf-8") as file:
        number = 0
        while True:
            where = file.tell()
            line = file.readline()
            if line.endswith("\n"):
                number += 1
                if number > start:
                    yield line.rstrip("\n")
            elif follow:
                file.seek(where)
                time.sleep(0.5)
            else:
                return


def main(
    package: Annotated[Path, typer.Argument(help="A package with a tokenizer.")],
    source: Annotated[Path, typer.Argument(metavar="READINGS", help="A file of readings, a line each.")],
    directory: Annotated[Path, typer.Argument(help="Where session and answers are kept.")],
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more readings at the end of the file.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads to compute with; default: the physical cores.")] = None,
) -> None:
    """Answer readings until there are none, going on where the last run was stopped."""
    answers = directory / "answers.jsonl"
    turn = turns_done(answers)
    tidy(directory, turn)
    try:
        runtime = Runtime.load(package, threads=threads)
        session = begin(runtime, directory, turn)
        kept = len(runtime.encode(INSTRUCTION))
        with answers.open("a", encoding="utf-8") as file:
            for reading in readings(source, turn, follow):
                text = answer(session, reading, kept)
                session.save(session_file(directory, turn + 1))
                file.write(json.dumps({"turn": turn, "reading": reading, "answer": text}) + "\n")
                file.flush()
                os.fsync(file.fileno())
                session_file(directory, turn).unlink(missing_ok=True)
                turn += 1
    except MeltError as error:
        raise SystemExit(f"device_loop.py: {error}") from error
    print(f"{turn} turns are over")


if __name__ == "__main__":
    typer.run(main)

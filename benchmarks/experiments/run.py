"""Trains and measures every run of runs.py, and writes docs/experiments.json, docs/experiments.md and the plots.

    python benchmarks/experiments/run.py [--jobs 2] [--only PATTERN] [--quick]

Takes hours on two cores (docs/experiments.md says how many). It may be stopped at any moment: the same command resumes,
and finished runs are neither trained nor measured again. Each run is a process of melt-train with one thread. The
documents are rewritten after every run.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from melt_models.atomic import write_text
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from runs import Run, all_runs
from shared import machine, versions

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
_POLL = 1.0  # seconds


def directory(run: Run) -> Path:
    return Path(run.content["output"])


def result_of(run: Run) -> dict[str, Any] | None:
    """Return a run's result, or None if it is not finished or was trained with another file."""
    path = directory(run) / "result.json"
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result if result["content"] == json.loads(json.dumps(run.content)) else None


class Worker:
    """Trains and measures runs, each in its own processes, which hold ``lock`` as long as they live."""

    def __init__(self, quick: bool, lock: int):
        self.quick, self.lock, self.stopped = quick, lock, threading.Event()
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def __call__(self, run: Run) -> str | None:
        """Train and measure a run. Returns the error, or None."""
        place = directory(run)
        place.mkdir(parents=True, exist_ok=True)
        file = place / "run.yaml"
        write_text(file, yaml.safe_dump(run.content, sort_keys=False))
        train = ["-m", "melt_models.training.cli", "all", "--config", str(file), "--resume"]
        measure = [str(HERE / "measure.py"), run.name, "--root", str(place.parent)]
        for command in (train, measure + ["--quick"] * self.quick):
            code = self._call(command, place / "log.txt")
            if code:
                return f"{run.name}: {' '.join(command[:3])} ended with {code}; see {place / 'log.txt'}"
        return None

    def stop(self) -> None:
        """End the running processes."""
        self.stopped.set()

    def _call(self, arguments: list[str], log: Path) -> int:
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                pass_fds=(self.lock,),
                start_new_session=True,  # run.py handles an interrupt at the terminal and ends them
            )
            while process.poll() is None:
                if self.stopped.wait(_POLL):
                    process.terminate()
            return process.wait()


class Board:
    """Shows the progress of all runs: a bar on a terminal, else a line for every run that ends."""

    def __init__(self, runs: list[Run], done: int):
        self.all_steps, self.begun = sum(run.steps for run in runs), time.monotonic()
        self.steps, self.console = 0, Console(stderr=True)
        self.running: list[str] = []
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn())
        text = TextColumn("{task.fields[running]} · about {task.fields[left]} left", markup=False)
        self.progress = Progress(*columns, text, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("", total=done + len(runs), completed=done, running="", left="?")

    def starts(self, run: Run) -> None:
        self.running.append(run.name)
        self._show()

    def ends(self, run: Run, problem: str | None) -> None:
        self.running.remove(run.name)
        self.steps += run.steps
        self.progress.advance(self.task)
        self._show()
        if problem or not self.console.is_terminal:
            now = datetime.now().strftime("%H:%M:%S")
            self.console.print(f"{now} {problem or f'{run.name} is done'}; {self._left()} left", highlight=False)

    def _left(self) -> str:
        """Return the time left, assuming that a step takes as long as before; steps differ between runs."""
        if not self.steps:
            return "?"
        seconds = (time.monotonic() - self.begun) / self.steps * (self.all_steps - self.steps)
        return f"{seconds / 60:.0f} min"

    def _show(self) -> None:
        self.progress.update(self.task, running=", ".join(self.running), left=self._left())


def schedule(
    runs: list[Run], finished: set[str], work: Worker, jobs: int, board: Board
) -> Iterator[tuple[Run, str | None]]:
    """Call ``work`` on every run in order, ``jobs`` at a time and after the run that it needs. Yields finished runs.

    A run that cannot be trained is yielded with a sentence that says why.
    """
    waiting, failed = list(runs), set[str]()
    under_way: dict[Future[str | None], Run] = {}
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or under_way:
                ready = [run for run in waiting if run.needs is None or run.needs in finished]
                for run in ready[: jobs - len(under_way)]:
                    waiting.remove(run)
                    under_way[pool.submit(work, run)] = run
                    board.starts(run)
                if not under_way:
                    break
                done, _ = wait(under_way, timeout=_POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    run = under_way.pop(future)
                    problem = future.result()
                    (failed if problem else finished).add(run.name)
                    board.ends(run, problem)
                    yield run, problem
        finally:
            work.stop()
    for run in waiting:
        yield run, f"{run.name}: {run.needs}, which it needs, {'failed' if run.needs in failed else 'was not chosen'}"


def collect(runs: list[Run], quick: bool) -> dict[str, Any]:
    """Return docs/experiments.json with every finished result."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "quick": quick,
        "machine": machine(),
        "versions": versions(),
        "runs": [result for run in runs if (result := result_of(run)) is not None],
        "missing": [run.name for run in runs if result_of(run) is None],
    }


def record(runs: list[Run], docs: Path, quick: bool) -> str | None:
    """Rewrite the JSON file and the documents. Returns the error, or None."""
    content = json.dumps(collect(runs, quick), separators=(",", ":")).replace('{"name"', '\n{"name"')
    write_text(docs / "experiments.json", content + "\n")
    command = [sys.executable, str(HERE / "document.py"), "--docs", str(docs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"the documents were not written: {done.stderr.strip()[-500:]}" if done.returncode else None


def lock_of(root: Path) -> int:
    """Lock ``root`` until the last process of this command has ended. Exits if another command has locked it."""
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        print(f"{root} is in use: another run.py, or processes of one that was killed, are at work", file=sys.stderr)
        raise typer.Exit(2) from error
    return lock


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def main(
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    only: Annotated[str, typer.Option(help="Names to run, with * and ?; several with commas.")] = "*",
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of everything: checks that it works.")] = False,
    root: Annotated[Path | None, typer.Option(help="Where runs are written.")] = None,
    docs: Annotated[Path | None, typer.Option(help="Where the documents are written.")] = None,
) -> None:
    """Train, measure and document the experiments; go on where an earlier call was stopped."""
    root, docs = root and root.absolute(), docs and docs.absolute()
    os.chdir(REPOSITORY)  # records of a run then hold no paths of this machine
    root = root or Path("build", "experiments-quick" if quick else "experiments")
    docs = docs or (root / "docs" if quick else Path("docs"))
    runs = all_runs(root, quick)
    chosen = [run for run in runs if any(fnmatch.fnmatch(run.name, pattern) for pattern in only.split(","))]
    if not chosen:
        raise typer.BadParameter(f"no run is called {only}; there are {', '.join(run.name for run in runs)}")
    finished = {run.name for run in runs if result_of(run) is not None}
    todo = [run for run in chosen if run.name not in finished]
    worker, board = Worker(quick, lock_of(root)), Board(todo, len(chosen) - len(todo))
    docs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, interrupt)
    problems: list[str] = []
    try:
        with board.progress:
            for _, problem in schedule(todo, finished, worker, jobs, board):
                problems += [sentence for sentence in (problem, record(runs, docs, quick)) if sentence]
    except KeyboardInterrupt:
        board.console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    if not todo:
        problems += [sentence for sentence in (record(runs, docs, quick),) if sentence]
    for problem in problems:
        board.console.print(problem, highlight=False)
    if problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)

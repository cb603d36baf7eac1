"""Soak test: a server under mixed requests. Does a request fail, and does memory grow?

    python benchmarks/soak.py [--seconds 600 | --quick] [--json FILE] [--package DIR]

Starts ``melt-run serve`` on loopback with a small package (random weights, or an existing one). Clients ask without a
pause: short and long, streamed and whole, at all depths, greedy and sampled, several choices at once, streams that are
cut half way, and requests that must be refused. A request fails if its answer has the wrong status or the wrong number
of tokens, or is a stream without its end. The soak ends after a number of seconds, or of requests.

Hostile clients (``attacks.py``) join in the third quarter of the time. Meanwhile the 99th percentile of the other
clients may double, and afterwards memory must be within 5% of its size before.

Needs Linux, and pip install 'melt-export[export,serve]' httpx. ``serving_docs.py`` writes the figures to
docs/serving.md.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from attacks import PAUSE, Attacker
from common import command_line, loaded_machine, random_package, save, versions
from loop_step import in_child
from melt_runtime.machine import resident
from melt_runtime.package.reader import Package
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_LIBRARIES = ("melt-export", "onnxruntime", "fastapi", "uvicorn")
_MODEL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "total_ut_steps": 4,
    "chunk_size": 32,
    "max_position_embeddings": 1024,
}
_WAIT = 120.0  # seconds until a request counts as failed
_ENOUGH = 100  # failed requests that end the soak
_ATTACKED = (0.5, 0.75)  # share of the time at which attacks start and end
_SLOWER, _LARGER = 2.0, 0.05  # largest factor on the 99th percentile under attack, and growth of memory after it


@dataclass(frozen=True)
class Settings:
    """Settings of a soak.

    - ``seconds``: duration; ``most``: number of requests that ends it earlier.
    - ``clients``, ``attackers``: number of clients at once; the latter are hostile, for a quarter of the time.
    - ``slots``, ``threads``: of the server.
    - ``longest``: new tokens of a long answer.
    - ``seed``: of the mixture of requests.
    """

    seconds: float = 600.0
    most: int = 500_000
    clients: int = 6
    attackers: int = 2
    slots: int = 4
    threads: int = 1
    longest: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of request.

    - ``body``: fields of the request.
    - ``cut``: number of tokens after which the client leaves.
    - ``refused``: the status with which it must be refused.
    """

    name: str
    body: dict[str, Any]
    stream: bool = False
    cut: int | None = None
    refused: int | None = None


@dataclass
class Tally:
    """Results of the requests so far, shared by all threads."""

    asked: Counter[str] = field(default_factory=Counter)
    # For each stream that was not cut: its start, seconds to the first token, seconds to the end.
    seconds: list[tuple[float, float, float]] = field(default_factory=list)
    whole: list[tuple[float, float]] = field(default_factory=list)  # for each whole answer: its start and seconds
    attacks: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def mixture(draw: random.Random, settings: Settings, vocabulary: int, loops: int) -> Kind:
    """Draw a client's next request."""
    prompt = [draw.randrange(2, vocabulary) for _ in range(draw.choice((1, 3, 17, 90)))]
    count = draw.choice((1, 4, 16, settings.longest))
    body: dict[str, Any] = {
        "model": "soak",
        "prompt": prompt,
        "max_tokens": count,
        "loops": draw.randint(1, loops),
        "ignore_eos": True,
        "temperature": draw.choice((0, 0.8)),
    }
    if draw.random() < 0.4:
        body["exit_threshold"] = draw.choice((0.3, 0.6, 0.9))
    chance = draw.random()
    if chance < 0.05:
        wrong: dict[str, Any] = draw.choice(({"loops": 0}, {"prompt": [vocabulary]}, {"nonsense": 1}))
        return Kind("refused as they must be", body | wrong, refused=400)
    if chance < 0.10:
        return Kind("with two choices", body | {"n": 2, "seed": 1})
    if chance < 0.40:
        return Kind("in one piece", body)
    if chance < 0.55:
        body["max_tokens"] = settings.longest
        return Kind("streams cut by their client", body, stream=True, cut=draw.randint(1, settings.longest // 2))
    return Kind("streams", body, stream=True)


def ask(client: httpx.Client, kind: Kind, tally: Tally) -> None:
    """Send one request. Raises an error that says what is wrong with its answer."""
    begin = monotonic()
    if not kind.stream:
        reply = client.post("/v1/completions", json=kind.body)
        if reply.status_code != (kind.refused or 200):
            raise ValueError(f"status {reply.status_code}: {reply.text[:200]}")
        if kind.refused is None:
            counts = [len(choice["token_ids"]) for choice in reply.json()["choices"]]
            if counts != [kind.body["max_tokens"]] * kind.body.get("n", 1):
                raise ValueError(f"{counts} tokens instead of {kind.body['max_tokens']}")
            with tally.lock:
                tally.whole.append((begin, monotonic() - begin))
                tally.tokens += sum(counts)
        return
    count, first, done = 0, 0.0, False
    with client.stream("POST", "/v1/completions", json=kind.body | {"stream": True}) as reply:
        if reply.status_code != 200:
            raise ValueError(f"status {reply.status_code}: {reply.read()[:200]!r}")
        for line in reply.iter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                count += len(json.loads(line.removeprefix("data: "))["choices"])
                first = first or monotonic() - begin
            if kind.cut is not None and count >= kind.cut:
                break
    with tally.lock:
        tally.tokens += count
        if kind.cut is not None:
            return
        tally.seconds.append((begin, first, monotonic() - begin))
    if not done or count != kind.body["max_tokens"]:
        raise ValueError(f"a stream of {count} tokens instead of {kind.body['max_tokens']}, ended well: {done}")


def client_loop(
    url: str, settings: Settings, number: int, draw_kind: Callable[[random.Random], Kind], tally: Tally, due: float
) -> None:
    """Send requests until the time or the requests are used up, or too many failed."""
    draw = random.Random(settings.seed * 1000 + number)
    with httpx.Client(base_url=url, timeout=_WAIT) as client:
        while monotonic() < due:
            kind = draw_kind(draw)
            with tally.lock:
                if tally.asked.total() >= settings.most or len(tally.errors) >= _ENOUGH:
                    return
                tally.asked[kind.name] += 1
            try:
                ask(client, kind, tally)
            except Exception as error:
                with tally.lock:
                    tally.errors.append(f"{kind.name}: {error!r}")


def attacker_loop(url: str, settings: Settings, number: int, tally: Tally, start: float, due: float) -> None:
    """Attack from ``start`` to ``due``."""
    sleep(max(start - monotonic(), 0.0))
    attacker = Attacker(url, random.Random(settings.seed * 1000 - 1 - number))
    while monotonic() < due:
        try:
            name = attacker.attack()
        except Exception as error:
            with tally.lock:
                tally.errors.append(f"an attack: {error!r}")
        else:
            with tally.lock:
                tally.attacks[name] += 1
        sleep(PAUSE)
    attacker.close()


def attacked(tally: Tally, start: float, due: float) -> dict[str, Any]:
    """Return the other clients' 99th percentiles in seconds, without attacks and during attacks, ``start`` to
    ``due``."""
    found: dict[str, Any] = {}
    for name, values in (
        ("first_token", [(at, first) for at, first, _ in tally.seconds]),
        ("stream", [(at, whole) for at, _, whole in tally.seconds]),
        ("whole", tally.whole),
    ):
        beside = [value for at, value in values if start <= at < due]
        alone = [value for at, value in values if not start <= at < due]
        found[name] = {"alone": quantiles(alone)["p99"], "attacked": quantiles(beside)["p99"]}
    return found


@contextmanager
def serving(package: Path, settings: Settings) -> Iterator[tuple[str, int]]:
    """Start a server process and yield its URL and process id. Raises RuntimeError with its last line if it fails."""
    program = "from melt_runtime.cli.main import main; main()"
    options = [
        "serve",
        "--prefix-bytes",  # so few that the prefix cache is soon full
        1 << 20,
        package,
        "--name",
        "soak",
        "--port",
        0,
        "--slots",
        settings.slots,
        "--threads",
        settings.threads,
    ]
    with tempfile.TemporaryDirectory(prefix="melt-soak-") as name, (Path(name) / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program, *map(str, options)], stderr=log)
        try:
            url = None
            while url is None:
                lines = (Path(name) / "log").read_text(encoding="utf-8").splitlines()
                url = next((json.loads(line)["url"] for line in lines if '"listening"' in line), None)
                if process.poll() is not None:
                    raise RuntimeError(lines[-1] if lines else "the server did not start")
                sleep(0.1)
            with httpx.Client(base_url=url, timeout=_WAIT) as client:
                while not _ready(client):
                    sleep(0.1)
            yield url, process.pid
        finally:
            process.terminate()
            process.wait()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def size_of(process: int) -> int:
    """Return the resident memory of a process in bytes. Raises RuntimeError if it has ended."""
    size = resident("VmRSS", process)
    if size is None:
        raise RuntimeError("the server ended before the soak did")
    return size


def quantiles(values: list[float]) -> dict[str, float]:
    """Return median, 99th percentile (seconds) and number of values."""
    p50, p99 = np.percentile(values, (50, 99)).tolist() if values else (0.0, 0.0)
    return {"p50": p50, "p99": p99, "count": len(values)}


def memory(samples: list[tuple[float, int]], seconds: float) -> dict[str, Any]:
    """Summarise samples (second, bytes): up to 60 of them, medians of the second and last quarter, and their
    difference.

    The first quarter is left out, because memory has not settled yet.
    """
    quarters = [[size for at, size in samples if part <= at / seconds < part + 0.25] for part in (0.25, 0.75)]
    early, late = (float(np.median(quarter or [samples[-1][1]])) for quarter in quarters)
    every = -(-len(samples) // 60)
    return {
        "resident": [[round(at, 1), size] for at, size in samples[::every]],
        "settled_bytes": early,
        "last_bytes": late,
        "grown_bytes": late - early,
        "peak_bytes": max(size for _, size in samples),
    }


def run(settings: Settings, package: Path, advance: Callable[[float], None] = lambda seconds: None) -> dict[str, Any]:
    """Run a soak and return the section of the JSON file. ``advance`` is called with the elapsed seconds."""
    manifest = Package.open(package).manifest
    machine, tally = loaded_machine(), Tally()

    def kind(draw: random.Random) -> Kind:
        return mixture(draw, settings, manifest.vocab_size, manifest.loops)

    with serving(package, settings) as (url, process):
        begin = monotonic()
        arguments = (url, settings)
        # The first grammar loads the library that compiles grammars; it must not count as growth.
        first = {"model": "soak", "prompt": [5], "response_format": {"type": "json_object"}}
        httpx.post(f"{url}/v1/completions", json=first, timeout=_WAIT)
        start, due = (begin + part * settings.seconds for part in _ATTACKED)
        clients = [
            threading.Thread(target=client_loop, args=(*arguments, number, kind, tally, begin + settings.seconds))
            for number in range(settings.clients)
        ]
        attackers = [
            threading.Thread(target=attacker_loop, args=(*arguments, number, tally, start, due), daemon=True)
            for number in range(settings.attackers)
        ]
        for attacker in attackers:
            attacker.start()
        for client in clients:
            client.start()
        samples: list[tuple[float, int]] = []
        while any(client.is_alive() for client in clients):
            samples.append((monotonic() - begin, size_of(process)))
            advance(samples[-1][0])
            sleep(min(1.0, settings.seconds / 60))
        seconds = monotonic() - begin
        state = httpx.get(f"{url}/v1/state", timeout=_WAIT).json()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine,
        "versions": versions(*_LIBRARIES),
        "settings": asdict(settings),
        "seconds": seconds,
        "requests": dict(sorted(tally.asked.items())),
        "errors": len(tally.errors),
        "first_errors": tally.errors[:10],
        "tokens": tally.tokens,
        "attacks": dict(sorted(tally.attacks.items())),
        "honest": attacked(tally, start, due),
        "first_token": quantiles([first for _, first, _ in tally.seconds]),
        "stream": quantiles([whole for _, _, whole in tally.seconds]),
        "whole": quantiles([whole for _, whole in tally.whole]),
        "state_bytes": state["state_bytes"],
        "left_running": state["running"] + state["waiting"],
        "memory": memory(samples, seconds),
    }


def with_tokenizer(directory: Path, shape: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    """Write a package as ``random_package`` does, with a tokenizer of characters for grammars and stop strings."""
    for line in random_package(directory, shape, options):
        if (directory / "checkpoint").is_dir():
            characters = ["<pad>", "<end>", "<unk>", *map(chr, range(32, 127))]
            vocabulary = {token: at for at, token in enumerate(characters)}
            tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
            tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
            tokenizer.add_special_tokens(["<pad>", "<end>", "<unk>"])
            tokenizer.save(str(directory / "checkpoint" / "tokenizer.json"))
        yield line


def show(report: dict[str, Any], console: Console) -> None:
    """Print the results as tables."""
    console.print(
        f"{sum(report['requests'].values()):,} requests in {report['seconds']:.0f} s, {report['errors']} failed; "
        f"{report['tokens']:,} tokens; memory {report['memory']['grown_bytes'] / 1e6:+.2f} MB"
    )
    table = Table("", "p50", "p99", "answers")
    for name in ("first_token", "stream", "whole"):
        row = report[name]
        table.add_row(name, f"{row['p50'] * 1e3:.1f} ms", f"{row['p99'] * 1e3:.1f} ms", f"{row['count']:,}")
    console.print(table)
    if report["attacks"]:
        console.print(f"{sum(report['attacks'].values()):,} attacks: {report['attacks']}")
        for name, row in report["honest"].items():
            console.print(f"{name}, p99: {row['alone'] * 1e3:.1f} ms alone, {row['attacked'] * 1e3:.1f} ms attacked")
    for error in report["first_errors"]:
        console.print(error)


def broken(report: dict[str, Any]) -> list[str]:
    """Return a sentence for each promise that the soak broke."""
    grown, settled = report["memory"]["grown_bytes"], report["memory"]["settled_bytes"]
    found = [f"{report['errors']} requests failed"] if report["errors"] else []
    found += [f"memory grew by {grown / settled:.1%}"] if grown > _LARGER * settled else []
    return found + [
        f"{name}: attacks made the 99th percentile {row['attacked'] / row['alone']:.1f} times as long"
        for name, row in report["honest"].items()
        if row["attacked"] > _SLOWER * row["alone"] > 0
    ]


def main(
    package: Annotated[Path | None, typer.Option(help="Serve this package instead of one of our own.")] = None,
    seconds: Annotated[float, typer.Option(help="How long.", min=4)] = Settings.seconds,
    quick: Annotated[
        bool, typer.Option("--quick", help="Half a minute: shows that all of it works, and says nothing of figures.")
    ] = False,
    clients: Annotated[int, typer.Option(help="Clients that ask at once.", min=1)] = Settings.clients,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'soak' of this JSON file.")
    ] = None,
) -> None:
    """Serve mixed requests for a while; fails if one of them did."""
    settings = Settings(seconds=30.0 if quick else seconds, clients=clients)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="melt-soak-") as name:
        if package is None:
            for line in in_child(with_tokenizer, Path(name), _MODEL, {"max_batch": 8}):
                console.print(line)
            package = Path(name) / "package"
        with console.status("asking") as status:
            report = run(settings, package, lambda at: status.update(f"asking: {at:.0f} of {settings.seconds:.0f} s"))
    report["command"] = command_line("soak.py", sys.argv[1:])
    show(report, Console())
    if json_file is not None:
        save(json_file, "soak", report)
    wrong = ["requests failed"] * bool(report["errors"]) if quick else broken(report)
    for sentence in wrong:
        console.print(sentence)
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)

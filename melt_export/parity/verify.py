"""Runs a checkpoint in PyTorch and its package in the runtime, and compares them at every loop."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
from melt_models.checkpoint import Weights, read_config
from melt_models.errors import shown
from melt_runtime import LoopDriver, LoopSettings, Runtime
from melt_runtime.cli.inspect import activations_of
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package.files import working_directory
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.reader import Package, manifest_hash
from melt_runtime.package.specs import StateSpec
from melt_runtime.progress import Step as Progress
from melt_runtime.progress import no_progress
from torch import Tensor

from ..errors import ParityError
from ..quantization.kv_cache_scales import CacheNumbers
from ..quantization.matmul_weights import EMBEDDING
from ..quantization.stored_values import as_packaged, stored_embedding
from ..reference.depth import default_depth, default_threshold
from ..reference.pytorch import LOGIT_COLUMNS, LoopTrace, open_reference
from .distances import Distances, common_prefix
from .exact_match import checkpoint_accuracy, package_accuracy, read_problems
from .expected import DECODE_STEPS, LARGE_BYTES, Case, Expected, Traces, expected_of, weigh_partings
from .float32_package import float32_package, wide_package
from .quality import LARGE_TOKENS, TOKENS, held_out, limits_of, measure, reference_logits
from .report import Accuracy, GenerationResult, Limits, ParityReport, StateError, tolerance_of

_SHAPE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_LIBRARIES = ("torch", "transformers", *ONNX_RUNTIMES, "numpy")


@np.errstate(invalid="ignore", over="ignore")  # NaN and Inf of a model are in the report, and need no warning
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
    large = sum(spec.bytes for spec in manifest.files.values()) > LARGE_BYTES
    held = held_out(package, manifest, eval_text, LARGE_TOKENS if large else TOKENS) if manifest.quantized else None
    tokens = (16 if large else 256) if tokens is None else tokens
    expected = expected_of(checkpoint, manifest, tokens, package=package, seed=seed, progress=progress)
    if held is not None:
        progress("PyTorch: held-out text", 0, 0)
        unquantized = reference_logits(checkpoint, held, manifest)
        right = None if problems is None else checkpoint_accuracy(checkpoint, opened, problems, progress)
    activations, float_kl = activations_of(manifest), None
    report = ParityReport(
        manifest.precision, manifest.dialect, manifest.loops, "ONNX Runtime, CPU", tolerance_of(manifest)
    )
    table = Weights(checkpoint).tensor(EMBEDDING)
    if manifest.weights:
        table = stored_embedding(package, table)  # now: a twin's links keep onnx_ir from reading the package
    with ExitStack() as stack:
        directory, write_twin = package, None
        if manifest.precision == "bf16":
            progress("widening bf16 to fp32", 0, 0)
            report.arithmetic = "ONNX Runtime, CPU, float32 arithmetic over the package's bf16 weights"
            write_twin = float32_package
        elif activations == "int8":
            report.arithmetic = (
                "ONNX Runtime, CPU, quantized weights multiplied with float activations; the package itself multiplies "
                "them with 8-bit activations, which the quality is of"
            )
            write_twin = wide_package
        elif activations == "float":
            report.arithmetic = "ONNX Runtime, CPU, as shipped: quantized weights multiplied with float activations"
        if write_twin is not None:
            directory = stack.enter_context(working_directory(package.parent, ".melt-twin-"))
            write_twin(package, directory)
        progress("package: loop by loop", 0, 0)
        low_memory = large and manifest.precision == "fp16"
        runtime = Runtime.load(directory, backend="onnxruntime", check_hashes=False, low_memory=low_memory)
        compare(runtime, expected, report, progress)
        _compare_embeddings(runtime, table, report)
        limits = limits_of(manifest) if limits is None else limits
        if held is not None and activations == "int8":
            float_kl = measure(runtime, held, unquantized, manifest.loops, limits, progress).kl
        del runtime
    weigh_partings(
        report,
        expected,
        lambda: open_reference(checkpoint, prepare=as_packaged(package) if manifest.quantized else None),
    )
    if held is not None:
        runtime = Runtime.load(package, backend="onnxruntime", check_hashes=False)
        quality = measure(runtime, held, unquantized, manifest.loops, limits, progress)
        report.quality = replace(quality, activations=activations, float_kl=float_kl)
        if problems is not None and right is not None:
            accuracy = Accuracy(len(problems), package_accuracy(runtime, problems, progress), right)
            report.quality = replace(report.quality, accuracy=accuracy)
    report.manifest_sha256 = manifest_hash(package)
    report.libraries = installed_versions(_LIBRARIES)
    report.write(package)
    return report


def compare(runtime: Runtime, expected: Expected, report: ParityReport, progress: Progress = no_progress) -> None:
    """The package's side of a comparison, and what differs, into the report. Raises BackendError."""
    errors, numbers = Distances(expected.own.tie), CacheNumbers.of(runtime.package)
    for case, traces in expected.cases:
        _compare_case(runtime, case, traces, report.loops, errors, numbers)
    report.take(errors, expected.own)

    if expected.threshold is not None:
        driver = runtime.driver(1)
        driver.append([expected.prompt], LoopSettings(report.loops, expected.threshold, expected.chunk))
        decided = [pair for pair in zip(driver.depth[0], expected.depths, strict=True) if pair[1] is not None]
        report.exit_threshold, report.exit_tokens = expected.threshold, len(decided)
        report.exit_same_depth = sum(got == depth for got, depth in decided)

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
        margin, token = (run.margins[same], got[same]) if same < len(run.tokens) else (0.0, None)
        report.generations.append(GenerationResult(len(run.prompt), run.chunk, len(run.tokens), same, margin, token))
        progress("package: greedy tokens", len(expected.runs), 1)


def require_parity(report: ParityReport) -> None:
    """Raises ParityError naming the first disagreements."""
    failures = report.failures()
    if failures:
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        raise ParityError("the package does not match its checkpoint: " + "; ".join(failures[:3]) + more)


def _same_model(manifest: Manifest, checkpoint: Path) -> None:
    """Raises ParityError if the checkpoint is of another shape or depth than the package."""
    config = read_config(checkpoint)
    said = config.to_dict()
    pairs = {name: (manifest.model.get(name), said.get(name)) for name in _SHAPE}
    if said["model_type"] == manifest.model.get("model_type"):  # else it may have no loops
        pairs["loops"] = (manifest.loops, default_depth(config))  # type: ignore[arg-type]
        pairs["exit_threshold"] = (manifest.exit_threshold, default_threshold(config))  # type: ignore[arg-type]
    for name, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise ParityError(
                f"the package was not made from {checkpoint}: {name} is {shown(mine)} in the package "
                f"and {shown(theirs)} in the checkpoint"
            )


def _compare_case(
    runtime: Runtime, case: Case, traces: Traces, loops: int, errors: Distances, numbers: CacheNumbers | None
) -> None:
    """Runs a case's prompts as one ragged batch and compares every loop of every chunk."""
    driver = runtime.driver(len(case.prompts))
    settings = LoopSettings(loops, chunk=case.chunk)
    position = [0] * driver.batch
    steps = [[[tokens[i]] if i < len(tokens) else [] for tokens in case.tokens] for i in range(DECODE_STEPS)]
    for tokens in (case.prompts, *steps):
        for chunk in driver.chunks(tokens, case.chunk):
            for loop, _ in enumerate(driver.loops(chunk, settings)):
                for slot, count in enumerate(chunk.counts):
                    if count:
                        got = _trace(driver, slot, int(count), loop + 1, numbers)
                        errors.compare_trace(got, traces[slot][position[slot]][loop])
            for slot, count in enumerate(chunk.counts):
                position[slot] += int(count > 0)


def _trace(driver: LoopDriver, slot: int, count: int, loop: int, numbers: CacheNumbers | None) -> LoopTrace:
    """One sequence's part of the chunk that just ran a loop, its rows still open."""
    state = driver.state
    latent = None
    if driver.manifest.has_latent:
        latent = state.read("latent", (slice(None), slot, slice(count)))
    caches = [s for s in driver.manifest.states if s.kind != "swap"]

    def rows(part: str) -> np.ndarray:
        stored = np.stack([_open_rows(driver, s, loop - 1, slot, count) for s in caches if s.input.startswith(part)])
        return stored if numbers is None else numbers.widened(part, stored)

    columns = np.zeros((driver.batch, min(count, LOGIT_COLUMNS)), np.int64)
    columns[slot] = np.arange(count)[-LOGIT_COLUMNS:]
    return LoopTrace(
        loop,
        state.read("hidden", (slot, slice(count))),
        latent,
        state.exit_probability()[slot, :count],
        rows("key"),
        rows("value"),
        state.logits(columns)[slot],
    )


def _compare_embeddings(runtime: Runtime, table: Tensor, report: ParityReport) -> None:
    """Looks up every token of the vocabulary, table (vocab, d): the prompts hold few of them."""
    manifest = runtime.manifest
    state, worst = runtime.driver(1).state, 0.0
    for at in range(0, manifest.vocab_size, manifest.chunk):
        rows = table[at : at + manifest.chunk].float()
        state.embed(np.arange(at, at + len(rows))[None])
        got = state.read("hidden", (0, slice(len(rows)))).astype(np.float32)
        scale = np.maximum(np.abs(rows.numpy()).max(-1), 1e-30)
        error = float((np.abs(got - rows.numpy()).max(-1) / scale).max())
        worst = max(worst, error if np.isfinite(error) else float("inf"))
    report.states.append(StateError("embedding", 1, worst, report.tolerance.relative))


def _open_rows(driver: LoopDriver, spec: StateSpec, loop: int, slot: int, count: int) -> np.ndarray:
    """The rows that the open chunk wrote, in the loop's own cache where it has one: (kv_heads, count, head_dim)."""
    if spec.kind == "read_only":
        return driver.state.read(spec.output, (slot, slice(None), slice(count)))
    start = int(driver.lengths[slot])
    rows = (slot, slice(None), slice(start, start + count))
    return driver.state.read(spec.input, (loop, *rows) if spec.kind == "per_loop" else rows)

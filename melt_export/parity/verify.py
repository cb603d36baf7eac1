"""Comparison of a checkpoint in PyTorch with its package in the runtime, at every loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from melt_models.errors import shown
from melt_runtime import LoopDriver, LoopSettings, Runtime
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package.manifest import Manifest
from melt_runtime.package.reader import Package, manifest_hash
from melt_runtime.package.specs import StateSpec
from melt_runtime.progress import Step as Progress
from melt_runtime.progress import no_progress
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import ParityError
from ..quantization.kv_cache_scales import CacheScales, cache_order
from ..quantization.matmul_weights import EMBEDDING
from ..quantization.stored_values import packaged_reference, stored_embedding
from ..reference.depth import default_depth, default_threshold
from ..reference.pytorch import LOGIT_COLUMNS, LoopTrace, reference_of
from .distances import Distances, common_prefix
from .exact_match import read_problems
from .expected import DECODE_STEPS, LARGE_BYTES, Case, Expected, Traces, expected_of, measure_ties
from .quality import LARGE_TOKENS, TOKENS, QualityCheck, held_out, limits_of
from .report import GenerationResult, Limits, ParityReport, StateError, tolerance_of
from .staggered import COST_TOKENS, lanes_of, staggered_cost
from .target import CPU, target_of

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
    checkpoint: Path | Checkpoint,
    *,
    backend: str = CPU,
    device: int = 0,
    loops: int | None = None,
    tokens: int | None = None,
    seed: int = 0,
    eval_text: Path | None = None,
    eval_answers: Path | None = None,
    limits: Limits | None = None,
    progress: Progress = no_progress,
) -> ParityReport:
    """Compare a package, run by a backend of this machine, with its checkpoint in PyTorch, and write parity.json.

    Loop by loop: hidden, latent, cache positions, exit probability and logits, for a ragged batch of prompts and for
    chunk size 1; every run of tokens that decode staggered; exit depths at a threshold that splits the tokens; then
    ``tokens`` greedy tokens for several prompts.
    PyTorch computes on the CPU and is freed before the package is loaded, so the two never share memory. A quantized
    package is compared with the values that it stores, and then measured against the checkpoint itself. One that can
    decode staggered is also measured against its own plain decoding.

    - ``backend``, ``device``: what runs the package (see ``target_of``), and the NVIDIA device by index.
    - ``loops`` None: as many as the package was trained for.
    - ``tokens`` None: 256, or 16 for a large package, whose tokens take PyTorch seconds each.
    - ``eval_text`` None: a built-in text to measure a quantized package on.
    - ``eval_answers``: problems to count the answers of a quantized package on, and those of staggered decoding.
    - ``limits`` None: the usual ones, of a quantized package's loss.

    Raises CheckpointError, PackageError, BackendError, ArgumentError for a text or a backend that cannot be used,
    ParityError if the two have different shapes.
    """
    opened = Package.open(package, check_hashes=False)
    target, source = target_of(opened, backend, device), Checkpoint.of(checkpoint)
    if opened.manifest.shared_caches:
        source = source.sharing(opened.manifest.loops)
    _same_model(opened.manifest, source)
    manifest = replace(opened.manifest, max_batch=target.max_batch)
    manifest = manifest if loops is None else replace(manifest, loops=loops)
    manifest.check_depth(manifest.loops, 1.0)
    large = sum(spec.bytes for spec in manifest.files.values()) > LARGE_BYTES
    check, problems = None, [] if eval_answers is None else read_problems(eval_answers, opened)
    if manifest.quantized:
        held = held_out(package, manifest, eval_text, LARGE_TOKENS if large else TOKENS)
        check = QualityCheck(held, problems, limits_of(manifest) if limits is None else limits)
    tokens = (16 if large else 256) if tokens is None else tokens
    table = source.weights.tensor(EMBEDDING)
    if manifest.weights:
        table = stored_embedding(package, table)  # before a linked copy keeps onnx_ir from reading the package
    lanes = lanes_of(opened.manifest, manifest.loops)
    expected = expected_of(
        packaged_reference(source, opened), manifest, tokens, lanes=lanes, seed=seed, progress=progress
    )
    if check is not None:
        check.take_reference(reference_of(source.load()), opened, manifest, progress)

    float_kl = None
    with target.comparable(large and manifest.precision == "fp16", progress) as (runtime, arithmetic):
        tolerance = tolerance_of(manifest)
        report = ParityReport(
            manifest.precision, manifest.dialect, manifest.loops, arithmetic, tolerance, backend=target.backend
        )
        progress("package: loop by loop", 0, 0)
        compare(runtime, expected, report, progress)
        if lanes > 1:
            text = held_out(package, manifest, eval_text, LARGE_TOKENS if large else COST_TOKENS)
            report.staggered = staggered_cost(runtime, text, problems, manifest.loops, progress)
        _compare_embeddings(runtime, table, report)
        if check is not None and target.activations == "int8":
            float_kl = check.measure(runtime, manifest.loops, progress).kl
        del runtime
    measure_ties(report, expected, lambda: packaged_reference(source, opened))
    if check is not None:
        runtime = target.load()
        quality = check.measure(runtime, manifest.loops, progress)
        accuracy = check.accuracy(runtime, progress)
        report.quality = replace(quality, activations=target.activations, float_kl=float_kl, accuracy=accuracy)
    report.manifest_sha256 = manifest_hash(package)
    report.libraries = installed_versions(_LIBRARIES)
    report.write(package)
    return report


def compare(runtime: Runtime, expected: Expected, report: ParityReport, progress: Progress = no_progress) -> None:
    """Run the package's side of a comparison and add the differences to the report. Raises BackendError."""
    errors, cache_scales = Distances(expected.own.tie), CacheScales.of(runtime.package)
    for case, traces in expected.cases:
        _compare_case(runtime, case, traces, report.loops, errors, cache_scales)
    if expected.staggered is not None:
        expected.staggered.compare_package(runtime, errors)
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
    """Raise ParityError naming the first disagreements."""
    failures = report.failures()
    if failures:
        more = f" (and {len(failures) - 3} more)" if len(failures) > 3 else ""
        raise ParityError("the package does not match its checkpoint: " + "; ".join(failures[:3]) + more)


def _same_model(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise ParityError if the checkpoint has another shape or depth than the package."""
    said = checkpoint.config.to_dict()
    pairs = {name: (manifest.model.get(name), said.get(name)) for name in _SHAPE}
    if said["model_type"] == manifest.model.get("model_type"):
        pairs["loops"] = (manifest.loops, default_depth(checkpoint.config))
        pairs["exit_threshold"] = (manifest.exit_threshold, default_threshold(checkpoint.config))
    for name, (mine, theirs) in pairs.items():
        if mine != theirs:
            raise ParityError(
                f"the package was not made from {checkpoint.directory}: {name} is {shown(mine)} in the package "
                f"and {shown(theirs)} in the checkpoint"
            )


def _compare_case(
    runtime: Runtime, case: Case, traces: Traces, loops: int, errors: Distances, cache_scales: CacheScales | None
) -> None:
    """Run a case's prompts as one batch and compare every loop of every chunk."""
    driver = runtime.driver(len(case.prompts))
    settings = LoopSettings(loops, chunk=case.chunk)
    position = [0] * driver.batch
    steps = [[[tokens[i]] if i < len(tokens) else [] for tokens in case.tokens] for i in range(DECODE_STEPS)]
    for tokens in (case.prompts, *steps):
        for chunk in driver.chunks(tokens, case.chunk):
            for loop, control in enumerate(driver.loops(chunk, settings)):
                driver.state.coda(control)
                for slot, count in enumerate(chunk.counts):
                    if count:
                        got = _trace(driver, slot, int(count), loop + 1, cache_scales)
                        errors.compare_trace(got, traces[slot][position[slot]][loop])
            for slot, count in enumerate(chunk.counts):
                position[slot] += int(count > 0)


def _trace(driver: LoopDriver, slot: int, count: int, loop: int, cache_scales: CacheScales | None) -> LoopTrace:
    """Return one sequence's part of the chunk that just ran a loop, while the chunk is still open."""
    state = driver.state
    latent = None
    if driver.manifest.has_latent:
        latent = state.read("latent", (slice(None), slot, slice(count)))
    named = {state.input: state for state in driver.manifest.caches}
    order, exits = cache_order(named), state.exit_probability()

    def rows(part: str) -> np.ndarray:
        caches = [named[name.replace("key", part)] for name in order]
        stored = np.stack([_open_rows(driver, cache, loop - 1, slot, count) for cache in caches])
        return stored if cache_scales is None else cache_scales.widened(part, stored)

    columns = np.zeros((driver.batch, min(count, LOGIT_COLUMNS)), np.int64)
    columns[slot] = np.arange(count)[-LOGIT_COLUMNS:]
    return LoopTrace(
        loop,
        state.read("hidden", (slot, slice(count))),
        latent,
        None if exits is None else exits[slot, :count],
        rows("key"),
        rows("value"),
        state.logits(columns)[slot],
    )


def _compare_embeddings(runtime: Runtime, table: Tensor, report: ParityReport) -> None:
    """Look up every token of the vocabulary, of which the prompts hold few. Raises CheckpointError."""
    manifest = runtime.manifest
    if manifest.has_prelude or manifest.injects:
        return  # the graph gives what the prelude makes of the rows
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
    """Return the open chunk's keys or values, of the loop's own cache if it has one: (kv_heads, count, head_dim)."""
    start = 0 if spec.gives_rows else int(driver.lengths[slot])
    rows = (slot, slice(None), slice(start, start + count))
    return driver.state.read(spec.output if spec.gives_rows else spec.input, (loop, *rows) if spec.by_loop else rows)

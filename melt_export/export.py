"""The steps of an export, from a checkpoint directory to a package directory."""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from melt_models import MeltConfig
from melt_models.atomic import new_directory
from melt_models.checkpoint import Weights
from melt_models.configuration import LoopedConfig
from melt_runtime.backends.choose import too_old
from melt_runtime.backends.devices import onnxruntime_version
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package.files import FileSpec
from melt_runtime.package.manifest import Manifest, version_for
from melt_runtime.package.specs import CODA, NOISE, PRECISIONS, GraphSpec, StateSpec
from melt_runtime.progress import Step as Progress
from melt_runtime.progress import no_progress

from .checkpoint import Checkpoint
from .errors import ExportError
from .graph.dialects import DIALECTS
from .graph.external_weights import attach_weights, external_bytes, write_weights
from .graph.onnxruntime_optimizer import optimize
from .graph.placeholder_weights import with_placeholder_weights
from .graph.trace import (
    TORCH_DTYPES,
    TracedGraph,
    coda_graph,
    embed_graph,
    lm_head_graph,
    loop_states,
    trace_loop_step,
)
from .options import ExportOptions
from .package_files import check_graph, copy_companions, hash_files, plain, save_graph, write_manifest
from .parity.exit_calibration import calibrated_exit, check_exit
from .parity.shared_caches import sharing_loss
from .quantization.calibration import calibration_tokens, hessians
from .quantization.kv_cache import calibrated, quantize_caches
from .quantization.kv_cache_scales import CacheScales
from .quantization.matmul_weights import (
    Statistics,
    check_patterns,
    halve_embedding,
    quantize_embedding,
    quantize_matmuls,
    weights_in_more_bits,
)
from .quantization.options import BITS
from .quantization.sensitivity import sensitivities
from .reference.depth import default_depth, default_threshold
from .reference.pytorch import reference_of
from .sizes import Sizes, package_sizes

_CACHE_SHARE = 4  # uses one of so many calibration sequences: scales need fewer than a Hessian
_LIBRARIES = ("melt-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", *ONNX_RUNTIMES)


@contextmanager
def building(
    checkpoint: Path | Checkpoint,
    output: Path,
    options: ExportOptions,
    *,
    force: bool = False,
    progress: Progress = no_progress,
) -> Iterator[Path]:
    """Build a package beside ``output`` and yield its directory, for verification.

    It gets the name ``output`` when the block ends without an error; until then whatever has that name is untouched.
    Raises CheckpointError, ExportError, PackageError, TargetExistsError, OSError.
    """
    with new_directory(output, force=force) as directory:
        build_package(checkpoint, directory, options, progress)
        yield directory


def build_package(
    checkpoint: Path | Checkpoint, directory: Path, options: ExportOptions, progress: Progress = no_progress
) -> Manifest:
    """Write all files of a package into an empty directory. Raises the errors of ``building``."""
    opened = Checkpoint.of(checkpoint)
    if options.share_caches is not None:
        opened = opened.sharing(default_depth(opened.own))
    sizes = package_sizes(opened.config, options)
    check_options(opened, options)
    copy_companions(opened, directory)
    statistics, cache_scales = _calibrate(opened, sizes, options, progress)
    graphs, states = trace_graphs(opened, sizes, options, statistics.raised, progress)
    if cache_scales is not None:
        graphs, states = quantize_caches(graphs, states, cache_scales)
    weights_record = quantize_graphs(graphs, options, statistics, opened.config.tie_word_embeddings)
    _write_weights(graphs, opened.weights, options, directory, progress)
    specs = {name: save_graph(name, graph, directory) for name, graph in graphs.items()}
    for name in ("loop_step", *(name for name in ("embed", CODA) if name in specs and len(specs[name].inputs) > 1)):
        _optimize(directory / specs[name].file, options, progress)
    files = hash_files(directory, progress)
    manifest = manifest_of(opened, sizes, options, states, specs, weights_record, files)
    if options.share_caches is not None:
        loss = sharing_loss(opened, directory, manifest, options.eval_text, progress)
        manifest = replace(manifest, shared_caches=loss)
    write_manifest(manifest, directory)
    if options.exit is not None:
        found = calibrated_exit(directory, manifest, options.exit, opened.weights, progress)
        manifest = manifest.with_exit(found)
        write_manifest(manifest, directory)
    return manifest


def check_options(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Raise ExportError if ONNX Runtime, the dialect or the checkpoint's weights do not support the options."""
    old = too_old(options.dialect, onnxruntime_version())
    if old:
        raise ExportError(old)
    DIALECTS[options.dialect].check(checkpoint.config)
    if options.weights is not None:
        check_patterns(options.weights, checkpoint.weights)
        if options.weights.embedding is not None:
            options.weights.for_embedding(checkpoint.config.hidden_size)
    if options.exit is not None:
        check_exit(checkpoint.directory, default_depth(checkpoint.config), options.exit)


def _calibrate(
    checkpoint: Checkpoint, sizes: Sizes, options: ExportOptions, progress: Progress
) -> tuple[Statistics, CacheScales | None]:
    """Load the model once, run it over the calibration text for everything that quantization needs, and free it."""
    weights, cache = options.weights, options.cache
    gptq = weights is not None and weights.method == "gptq"
    if not gptq and cache is None:
        return Statistics(), None
    model = checkpoint.load()
    statistics, scales = Statistics(), None
    tokens_of = functools.cache(functools.partial(calibration_tokens, checkpoint))  # both may read one text
    if weights is not None and gptq:
        tokens, cost = tokens_of(weights.calibration), {}
        if weights.share:
            grid = weights.grid(BITS[weights.kind])
            cost = sensitivities(model, tokens, sizes.loops, sizes.chunk, grid, progress)
        raised = weights_in_more_bits(model, weights, cost)
        statistics = Statistics(hessians(model, tokens, sizes.loops, sizes.chunk, progress), raised)
    if cache is not None:
        tokens = tokens_of(cache.calibration)[::_CACHE_SHARE]
        reference, bits = reference_of(model), BITS[cache.kind]
        scales = calibrated(reference, tokens, sizes.loops, sizes.chunk, sizes.max_seq_len, bits, progress)
    return statistics, scales


def trace_graphs(
    checkpoint: Checkpoint, sizes: Sizes, options: ExportOptions, apart: Container[str], progress: Progress
) -> tuple[dict[str, TracedGraph], list[StateSpec]]:
    """Trace the graphs, without weights, and list the states of all stages."""
    dialect, dtype, rows = DIALECTS[options.dialect], PRECISIONS[options.precision], sizes.cache_rows
    config = checkpoint.config
    model = with_placeholder_weights(checkpoint.without_weights(), TORCH_DTYPES[dtype])
    states = loop_states(config, dialect, dtype, rows)
    prelude, coda = (dialect.stage_states(config, stage, dtype, rows) for stage in ("prelude", CODA))
    progress("tracing loop_step", 0, 0)
    graphs = {
        "embed": embed_graph(model, dialect, dtype, prelude, rows, apart),
        "loop_step": trace_loop_step(model, dialect, dtype, states, rows, apart),
    }
    if config.norm_after_coda:
        graphs[CODA] = coda_graph(model, dialect, dtype, coda, rows, apart)
    graphs["lm_head"] = lm_head_graph(model, dialect, dtype)
    return graphs, [*states, *prelude, *coda]


def quantize_graphs(
    graphs: dict[str, TracedGraph], options: ExportOptions, statistics: Statistics, tied: bool
) -> dict[str, Any]:
    """Quantize the graphs' matmuls in place, if asked for. Returns the manifest's entry."""
    if options.weights is None:
        return {}
    operator, dtype = DIALECTS[options.dialect].quantized_matmul, TORCH_DTYPES[PRECISIONS[options.precision]]
    assert operator is not None
    if options.weights.embedding is not None:
        quantize_embedding(graphs["embed"].model, options.weights, statistics, tied=tied)
    elif options.precision == "fp32":
        halve_embedding(graphs["embed"].model)
    raised: list[str] = []
    for name, graph in graphs.items():
        if name != "embed" or len(graph.inputs) > 1:
            raised += quantize_matmuls(graph.model, options.weights, statistics, operator, dtype)
    return {**options.weights.record(), "raised": raised}


def _write_weights(
    graphs: dict[str, TracedGraph], weights: Weights, options: ExportOptions, directory: Path, progress: Progress
) -> None:
    """Write the weights file and refer to it in the graphs."""
    models = [graph.model for graph in graphs.values()]
    attach_weights(models, weights, TORCH_DTYPES[PRECISIONS[options.precision]])
    total = external_bytes(models)
    write_weights(models, directory, lambda done: progress("writing weights", total, done))


def _optimize(graph: Path, options: ExportOptions, progress: Progress) -> None:
    """Have ONNX Runtime fuse the operators of a graph with layers, in the dialect for ONNX Runtime."""
    if DIALECTS[options.dialect].fuses and options.precision == "fp32":
        progress(f"optimising {graph.stem}", 0, 0)
        optimize(graph)
        check_graph(graph)


def manifest_of(
    checkpoint: Checkpoint,
    sizes: Sizes,
    options: ExportOptions,
    states: list[StateSpec],
    graphs: dict[str, GraphSpec],
    weights_record: dict[str, Any],
    files: dict[str, FileSpec],
) -> Manifest:
    """Build the manifest of a package with these other files."""
    config = checkpoint.config
    return Manifest(
        dialect=options.dialect,
        precision=options.precision,
        max_seq_len=sizes.max_seq_len,
        cache_rows=sizes.cache_rows,
        max_batch=options.max_batch,
        chunk=sizes.chunk,
        loops=sizes.loops,
        exit_threshold=default_threshold(config),
        vocab_size=config.vocab_size,
        model=plain(config.to_dict()),
        states=tuple(states),
        graphs=graphs,
        files=files,
        untrained=tuple(config.untrained) if isinstance(config, MeltConfig) else (),
        libraries=installed_versions(_LIBRARIES),
        format_version=version_for(states, graphs),
        weights=weights_record,
        cache={} if options.cache is None else options.cache.record(),
        start=_start(config),
    )


def _start(config: LoopedConfig) -> dict[str, Any]:
    """Return the manifest's entry on where the loops start; empty for the embedding."""
    if config.start_state == "embedding":
        return {}
    return {"state": config.start_state, "std": config.start_std, "generator": NOISE}

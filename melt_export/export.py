"""The steps of an export, from a checkpoint directory to a package directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from melt_models import MeltConfig
from melt_models.atomic import new_directory
from melt_models.checkpoint import open_checkpoint
from melt_models.configuration import LoopedConfig
from melt_models.convert import COMPANIONS, TOKENIZER, check_companions
from melt_runtime.backends.choose import too_old
from melt_runtime.backends.devices import onnxruntime_version
from melt_runtime.errors import PackageError
from melt_runtime.machine import ONNX_RUNTIMES, installed_versions
from melt_runtime.package.example_prompt import EXAMPLE_PROMPT, read_example_prompt
from melt_runtime.package.files import FileSpec, file_hash
from melt_runtime.package.manifest import MANIFEST, Manifest, version_for
from melt_runtime.package.manifest_schema import read_manifest
from melt_runtime.package.specs import MAX_LOOPS, PRECISIONS, GraphSpec
from melt_runtime.progress import Step as Progress
from melt_runtime.progress import no_progress
from melt_runtime.text.end_tokens import GENERATION, configured_ends
from melt_runtime.text.tokenizer import TextTokenizer

from .errors import ExportError
from .graph.dialects import DIALECTS
from .graph.external_weights import attach_weights, external_bytes, write_weights
from .graph.onnxruntime_optimizer import optimize
from .graph.placeholder_weights import with_placeholder_weights
from .graph.trace import TORCH_DTYPES, TracedGraph, embed_graph, lm_head_graph, loop_states, trace_loop_step
from .options import ExportOptions
from .quantization.calibration import calibration_tokens, hessians
from .quantization.kv_cache import calibrated, quantize_caches
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

_MAX_DEFAULT_SEQ_LEN = 4096
_LOOPLM_CHUNK = 128  # a LoopLM's results do not depend on its chunk
_CACHE_SHARE = 4  # uses one of so many calibration sequences: scales need fewer than a Hessian
_LIBRARIES = ("melt-export", "torch", "transformers", "onnx", "onnxscript", "onnx-ir", *ONNX_RUNTIMES)


@contextmanager
def building(
    checkpoint: Path, output: Path, options: ExportOptions, *, force: bool = False, progress: Progress = no_progress
) -> Iterator[Path]:
    """Build a package beside ``output`` and yield its directory, for verification.

    It gets the name ``output`` when the block ends without an error; until then whatever has that name is untouched.
    Raises CheckpointError, ExportError, PackageError, TargetExistsError, OSError.
    """
    with new_directory(output, force=force) as directory:
        build_package(checkpoint, directory, options, progress)
        yield directory


def build_package(
    checkpoint: Path, directory: Path, options: ExportOptions, progress: Progress = no_progress
) -> Manifest:
    """Write all files of a package into an empty directory. Raises the errors of ``building``."""
    old = too_old(options.dialect, onnxruntime_version())
    if old:
        raise ExportError(old)
    model, weights = open_checkpoint(checkpoint)
    config: LoopedConfig = model.config
    loops = default_depth(config)
    if loops > MAX_LOOPS:
        raise ExportError(f"the checkpoint runs {loops:,} loops per token; a package runs {MAX_LOOPS:,} at most")
    wanted = config.chunk_size if isinstance(config, MeltConfig) else _LOOPLM_CHUNK
    chunk, max_seq_len, cache_rows = sizes(wanted, config.max_position_embeddings, options)
    if options.weights is not None:
        check_patterns(options.weights, weights)
    copy_companions(checkpoint, directory, config)

    quantized = options.weights
    seen, raised = Statistics(), frozenset[str]()
    if quantized is not None and quantized.method == "gptq":
        tokens = calibration_tokens(checkpoint, config, quantized.calibration)
        cost = {}
        if quantized.share:
            cost = sensitivities(checkpoint, tokens, loops, chunk, quantized.grid(BITS[quantized.kind]), progress)
        raised = weights_in_more_bits(model, quantized, cost)
        seen = Statistics(hessians(checkpoint, tokens, loops, chunk, progress), cost)
    numbers = None
    if options.cache is not None:
        tokens = calibration_tokens(checkpoint, config, options.cache.calibration)[::_CACHE_SHARE]
        bits = BITS[options.cache.kind]
        numbers = calibrated(checkpoint, tokens, loops, chunk, max_seq_len, bits, progress)
    dialect, dtype = DIALECTS[options.dialect], PRECISIONS[options.precision]
    dialect.check(config)
    with_placeholder_weights(model, TORCH_DTYPES[dtype])
    states = loop_states(config, dialect, dtype, cache_rows)
    progress("tracing loop_step", 0, 0)
    graphs: dict[str, TracedGraph] = {
        "embed": embed_graph(model, dialect, dtype),
        "loop_step": trace_loop_step(model, dialect, dtype, states, cache_rows, raised),
        "lm_head": lm_head_graph(model, dialect, dtype),
    }

    if numbers is not None:
        graphs["loop_step"], states = quantize_caches(graphs["loop_step"], states, numbers)
    models = [graph.model for graph in graphs.values()]
    record: dict[str, Any] = {}
    if quantized is not None:
        record = quantized.record()
        if quantized.embedding is not None:
            quantize_embedding(graphs["embed"].model, quantized, seen, tied=config.tie_word_embeddings)
        elif options.precision == "fp32":
            halve_embedding(graphs["embed"].model)
        for name in ("loop_step", "lm_head"):
            assert dialect.quantized_matmul is not None
            labels = quantize_matmuls(
                graphs[name].model, quantized, seen, dialect.quantized_matmul, TORCH_DTYPES[dtype], raised
            )
            record["raised"] = [*record.get("raised", ()), *labels]
    attach_weights(models, weights, TORCH_DTYPES[dtype])
    total = external_bytes(models)
    write_weights(models, directory, lambda done: progress("writing weights", total, done))
    specs = {name: _save_graph(name, graph, directory) for name, graph in graphs.items()}
    if dialect.fuses and options.precision == "fp32":
        progress("optimising loop_step", 0, 0)
        optimize(directory / specs["loop_step"].file)
        _check_graph(directory / specs["loop_step"].file)
    manifest = Manifest(
        dialect=options.dialect,
        precision=options.precision,
        max_seq_len=max_seq_len,
        cache_rows=cache_rows,
        max_batch=options.max_batch,
        chunk=chunk,
        loops=loops,
        exit_threshold=default_threshold(config),
        vocab_size=config.vocab_size,
        model=_plain(config.to_dict()),
        states=tuple(states),
        graphs=specs,
        files=_hash_files(directory, progress),
        untrained=tuple(config.untrained) if isinstance(config, MeltConfig) else (),
        libraries=installed_versions(_LIBRARIES),
        format_version=version_for(states),
        weights=record,
        cache={} if options.cache is None else options.cache.record(),
    )
    text = manifest.to_json()
    try:
        read_manifest(text)  # checks the manifest as the runtime will
    except PackageError as error:
        raise ExportError(f"no runtime would open this package: {error}") from error
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def sizes(chunk_size: int, positions: int, options: ExportOptions) -> tuple[int, int, int]:
    """Return chunk, max_seq_len and cache_rows of a package.

    Raises ExportError if they exceed the checkpoint's positions.
    """
    max_seq_len = options.max_seq_len or min(positions, _MAX_DEFAULT_SEQ_LEN)
    if max_seq_len > positions:
        raise ExportError(f"--max-seq-len {max_seq_len} is more than the checkpoint's {positions} positions")
    chunk = min(options.chunk or chunk_size, max_seq_len)
    # In a batch of different lengths a full sequence must have room for the longest chunk's padding.
    return chunk, max_seq_len, max_seq_len + (chunk if options.max_batch > 1 else 0)


def copy_companions(checkpoint: Path, directory: Path, config: LoopedConfig) -> None:
    """Copy the tokenizer and the other files of ``COMPANIONS``.

    Raises CheckpointError for files that ``check_companions`` refuses, ExportError for files that no runtime reads.
    """
    check_companions(checkpoint, config)
    copied = [name for name in COMPANIONS if (checkpoint / name).is_file()]
    try:
        if TOKENIZER in copied:
            TextTokenizer.load(checkpoint)
        configured_ends(checkpoint / GENERATION if GENERATION in copied else None, config.to_dict())
        if EXAMPLE_PROMPT in copied:
            read_example_prompt(checkpoint / EXAMPLE_PROMPT)
    except PackageError as error:
        raise ExportError(str(error).removesuffix("; export the package again.")) from error
    for name in copied:
        shutil.copyfile(checkpoint / name, directory / name)


def _save_graph(name: str, graph: TracedGraph, directory: Path) -> GraphSpec:
    """Write an ONNX file and check it with onnx.checker, shapes included. Raises ExportError."""
    file = f"{name}.onnx"
    graph.model.graph.name = name
    graph.model.producer_name, graph.model.producer_version = "melt-export", version("melt-export")
    ir.save(graph.model, directory / file)
    _check_graph(directory / file)
    return GraphSpec(file, graph.inputs, graph.outputs)


def _check_graph(path: Path) -> None:
    """Raise ExportError if onnx.checker finds a fault."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} does not pass onnx.checker: {error}") from error


def _hash_files(directory: Path, progress: Progress) -> dict[str, FileSpec]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    return {
        path.relative_to(directory).as_posix(): FileSpec(
            file_hash(path, lambda done: progress("hashing files", total, done)), path.stat().st_size
        )
        for path in files
    }


def _plain(value: Any) -> Any:
    """Convert a configuration to plain JSON values. Raises ExportError."""
    try:
        text = json.dumps(value, allow_nan=False, default=str)
    except ValueError as error:
        raise ExportError(f"the configuration cannot be written as JSON: {error}") from error
    return json.loads(text)

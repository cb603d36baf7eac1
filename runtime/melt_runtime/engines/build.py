"""Build an engine from a package. All its graphs become plans, so that decoding stays on the device.

With embedding and head as plans too, hidden states stay in device memory, and one CUDA graph can hold a whole token.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, BackendError
from ..package.engine_spec import WEIGHTS, EngineSpec, ProfileSpec, plan_path
from ..package.files import FileSpec, file_hash, new_file
from ..package.manifest import Manifest
from ..package.manifest_facts import lane_shape
from ..package.reader import Package, source_hash
from ..progress import Step, no_progress
from .library import Library, current_capability, open_library
from .monitor import make_monitor, signals_deferred
from .network import add_candidates, add_profiles, allow_decomposition, parse, quantize_matmuls
from .network_checks import inspect_network, inspect_operators, require_small
from .profiles import length_buckets, make_profiles
from .store import keep_engine, new_engine

# TensorRT-RTX's support matrix: oldest compute capability per type. float16 and float32 run on all, from 7.5.
_OLDEST_DEVICE = {"bf16": 8.0, "int4": 8.0, "int8": 8.0, "fp8": 8.9}


@dataclass(frozen=True)
class EngineOptions:
    """The options of an engine build. Raises ArgumentError.

    ``flavour``: "tensorrt" or "tensorrt-rtx". ``weights``: None for the package's, or "int4", "int8", "fp8" for the
    loop step's. ``max_batch``: None for the package's. ``compute_capabilities``: TensorRT-RTX only, the devices to
    build for ("8.9"); empty: Ampere and newer, or all with fp8 if asked for. ``workspace``: most MiB of scratch memory;
    None: the library's choice. ``weight_streaming``: allow weights in host memory. ``timing_cache``: a file of
    TensorRT's kernel timings, read and updated.
    """

    flavour: str = "tensorrt-rtx"
    weights: str | None = None
    max_batch: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    workspace: int | None = None
    weight_streaming: bool = False
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights not in WEIGHTS:
            raise ArgumentError(f"weights {self.weights!r} is not one of {', '.join(WEIGHTS)}")
        if self.workspace is not None and self.workspace < 1:
            raise ArgumentError(f"workspace is {self.workspace} MiB; it must be 1 or more")

    def recorded(self) -> dict[str, Any]:
        """Return the options that the manifest records, to build the same engine again."""
        options = {
            "max_batch": self.max_batch,
            "compute_capability": list(self.compute_capabilities),
            "workspace": self.workspace,
            "weight_streaming": self.weight_streaming,
        }
        return {name: value for name, value in options.items() if value}


def engine_name(options: EngineOptions, precision: str) -> str:
    """Return the engine's folder name: flavour, precision and, if different, weights: "tensorrt-rtx-fp16-int4"."""
    return "-".join(part for part in (options.flavour, precision, options.weights) if part)


def build_engine(package: Package, options: EngineOptions, progress: Step = no_progress) -> EngineSpec:
    """Build an engine into a package; it replaces one of the same name once it is complete.

    Raises ArgumentError, BackendError, PackageError, OSError.
    """
    manifest = package.manifest
    library = open_library(options.flavour)
    check_package(manifest, options, library)
    name = engine_name(options, manifest.precision)
    profiles, buckets = plan_shapes(manifest, options)
    builder = library.builder()
    with new_engine(package.directory, name) as directory:
        files = {}
        for graph in manifest.graphs:
            plan = directory / plan_path(package.directory, name, graph).name
            _build_plan(package, graph, options, library, builder, profiles, plan, progress)
            progress(f"hashing {graph}", plan.stat().st_size, 0)
            files[graph] = FileSpec(file_hash(plan), plan.stat().st_size)
        spec = EngineSpec(
            flavour=options.flavour,
            version=library.version,
            compute_capabilities=target_capabilities(options, library),
            precision=manifest.precision,
            weights=options.weights,
            dialect=manifest.dialect,
            profiles=profiles,
            buckets=buckets,
            options=options.recorded(),
            source=source_hash(manifest),
            files=files,
        )
        keep_engine(package.directory, name, directory, spec)
    return spec


def check_package(manifest: Manifest, options: EngineOptions, library: Library) -> None:
    """Raise ArgumentError or BackendError if the package cannot be built with these options."""
    if manifest.weights and options.weights is not None:
        raise ArgumentError(f"this package's weights are {manifest.weights['kind']} already; leave out --weights")
    check_options(manifest.dialect, manifest.precision, manifest.max_batch, options, library)


def check_options(dialect: str, precision: str, max_batch: int, options: EngineOptions, library: Library) -> None:
    """Raise ArgumentError or BackendError for options that dialect, precision or library do not allow."""
    if dialect == "onnxruntime":
        raise ArgumentError(
            "this package is in the onnxruntime dialect, which no other library reads; export the checkpoint with "
            "--dialect standard (or portable, for TensorRT before 10.15)"
        )
    if dialect == "standard" and not library.updates_caches:
        raise BackendError(
            f"{library.title} {library.version} cannot update caches in place (10.15 and newer can); "
            "export the checkpoint with --dialect portable"
        )
    if options.max_batch is not None and not 1 <= options.max_batch <= max_batch:
        raise ArgumentError(f"max_batch is {options.max_batch}; the package was exported for 1 to {max_batch}")
    if options.weights is not None and precision == "fp32":
        raise ArgumentError(f"{options.weights} weights are multiplied in fp16 or bf16; this package is fp32")
    if options.weights == "fp8" and not hasattr(library.module.DataType, "FP8"):
        raise BackendError(f"{library.title} {library.version} has no fp8")
    if options.compute_capabilities and options.flavour != "tensorrt-rtx":
        raise ArgumentError("TensorRT builds for the device it runs on; only tensorrt-rtx takes --compute-capability")
    unknown = next((c for c in options.compute_capabilities if c not in library.capabilities), None)
    if unknown is not None:
        raise ArgumentError(
            f"{library.title} {library.version} does not build for compute capability {unknown}; "
            f"it does for {', '.join(library.capabilities)}"
        )
    for kind in (precision, options.weights):
        oldest = _OLDEST_DEVICE.get(kind or "", 0.0)
        too_old = next((c for c in options.compute_capabilities if float(c) < oldest), None)
        if too_old is not None:
            raise ArgumentError(f"{kind} needs compute capability {oldest} or newer, not {too_old}")
    if options.timing_cache is not None and options.flavour == "tensorrt-rtx":
        raise ArgumentError(
            "TensorRT-RTX times nothing while it builds; its kernels are compiled on the device, at first use"
        )
    if options.weight_streaming and not hasattr(library.module.BuilderFlag, "WEIGHT_STREAMING"):
        raise BackendError(f"{library.title} {library.version} has no weight streaming")


def plan_shapes(manifest: Manifest, options: EngineOptions) -> tuple[tuple[ProfileSpec, ...], tuple[int, ...]]:
    """Return the profiles and attention lengths of a package's engine."""
    buckets = length_buckets(manifest.cache_rows)
    heads = int(manifest.model.get("num_attention_heads", 1))
    return make_profiles(
        options.max_batch or manifest.max_batch, manifest.chunk, heads, buckets, lane_shape(manifest)
    ), buckets


def target_capabilities(options: EngineOptions, library: Library) -> tuple[str, ...]:
    """Return the devices an engine is for: as requested, this machine's (TensorRT), or those with fp8
    (TensorRT-RTX)."""
    if options.flavour == "tensorrt-rtx":
        if options.compute_capabilities or options.weights != "fp8":
            return options.compute_capabilities
        return tuple(c for c in library.capabilities if float(c) >= _OLDEST_DEVICE["fp8"])
    here = current_capability()
    return (here,) if here else ()


def _build_plan(
    package: Package,
    graph: str,
    options: EngineOptions,
    library: Library,
    builder: Any,
    profiles: tuple[ProfileSpec, ...],
    plan: Path,
    progress: Step,
) -> None:
    manifest, title, file = package.manifest, f"building {graph}", package.path(graph)
    progress(f"reading {graph}", 0, 0)
    inspect_operators(file)
    network = parse(library, builder, file)
    savings = None
    if manifest.caches_of(graph):
        if manifest.precision == "fp32":
            allow_decomposition(network)
        if options.weights is not None:
            progress(f"quantizing {graph}", 0, 0)
            savings = quantize_matmuls(network, file, options.weights, manifest.states[0].dtype)
    inspect_network(network, graph, manifest, options.weights if savings else None)
    if graph == "lm_head":
        add_candidates(network, manifest.vocab_size)

    config = _configure(options, library, builder)
    add_profiles(network, config, manifest.graphs[graph], profiles)
    monitor = make_monitor(library, title, progress)
    config.progress_monitor = monitor
    library.messages.clear()
    with signals_deferred(monitor):
        built = builder.build_serialized_network(network.network, config)
    if monitor.interrupted is not None:
        raise monitor.interrupted
    if built is not None:
        monitor.complete()
    else:
        raise BackendError(f"{library.title} {library.version} cannot build {graph}: {library.messages.reason()}")
    if savings and options.weights:
        require_small(built.nbytes, savings.weight_bytes, savings.saved_bytes, options.weights)
    elif graph == "loop_step" and manifest.weights:
        stored = sum(spec.bytes for name, spec in manifest.files.items() if name.endswith(".data"))
        require_small(built.nbytes, stored, stored, str(manifest.weights["kind"]))
    with plan.open("wb") as output:
        output.write(memoryview(built))
        output.flush()
        os.fsync(output.fileno())
    if options.timing_cache is not None:
        _save_timings(options.timing_cache, config)


def _save_timings(path: Path, config: Any) -> None:
    """Replace the timing cache file atomically."""
    with new_file(path) as made:
        made.write_bytes(memoryview(config.get_timing_cache().serialize()))


def _configure(options: EngineOptions, library: Library, builder: Any) -> Any:
    """Make a builder configuration, without TF32, which would round float32 matmuls."""
    module, config = library.module, builder.create_builder_config()
    config.clear_flag(module.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.weight_streaming:
        config.set_flag(module.BuilderFlag.WEIGHT_STREAMING)
    if options.flavour == "tensorrt-rtx":
        wanted = target_capabilities(options, library)
        config.num_compute_capabilities = len(wanted)
        for index, capability in enumerate(wanted):
            if not config.set_compute_capability(library.capabilities[capability], index):
                raise BackendError(f"{library.title} refuses compute capability {capability}")
    if options.timing_cache is not None:
        content = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
    return config

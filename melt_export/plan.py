"""What an export would write, need and compare, from the checkpoint's shape alone. Nothing is written.

Bytes of weights and state are exact, because the graphs are traced and quantized as an export does, without reading the
weights. Those of the graphs are estimates, because an export has operators fused and caches quantized. Memory and time
are estimates from the shape; this machine's speed is measured for a moment. Memory leaves out the mapped pages of the
checkpoint, which the system takes back when it needs them.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from time import perf_counter

import torch
from melt_runtime.machine import available_memory
from melt_runtime.package.example_prompt import EXAMPLE_PROMPT
from melt_runtime.package.manifest import MANIFEST, PARITY, Manifest
from melt_runtime.package.specs import PRECISIONS, GraphSpec, StateSpec
from melt_runtime.progress import Step as Progress
from melt_runtime.progress import no_progress

from .checkpoint import Checkpoint
from .export import check_options, manifest_of, quantize_graphs, trace_graphs
from .graph.external_weights import WEIGHTS_FILE, attach_weights, graph_bytes, stored_bytes
from .graph.trace import TORCH_DTYPES, TracedGraph
from .options import ExportOptions
from .parity.expected import DECODE_STEPS, LARGE_BYTES
from .parity.quality import LARGE_TOKENS, TOKENS
from .parity.report import tolerance_of
from .parity.staggered import lanes_of
from .quantization.kv_cache import quantized_states
from .quantization.matmul_weights import Statistics
from .quantization.options import BITS
from .reference.depth import default_depth
from .reference.float32_matmul import ORDERS
from .reference.pytorch import linear_layers
from .sizes import Sizes, package_sizes

_BASE_BYTES = 500_000_000  # PyTorch, transformers, onnx and ONNX Runtime, loaded
_IN_FLIGHT_BYTES = 1 << 28  # of weights while they are written
_CALIBRATION_TOKENS = 32 * 256
_GREEDY_PROMPTS = 4
_WRITE_BYTES_S = 2.5e8  # read, cast or quantize, write and hash
_GPTQ_VALUES_S, _RTN_VALUES_S = 4e6, 5e7  # weights of matmuls that are rounded
_PYTORCH_OVERHEAD_S = 2e-3  # per layer and pass, beyond the arithmetic


@dataclass(frozen=True)
class Phase:
    """A step of the export: its seconds, and the peak of memory in it, in bytes. Both are estimates."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Plan:
    """What an export would do.

    - ``files``: of the package, with their bytes, of graphs about; None where only the export can tell.
    - ``manifest``: as the package's, without files.
    - ``disk_bytes``: free space that the export needs beside the output, about; ``free_bytes``: that there is.
    - ``compared``: what the comparison with PyTorch would cover, in sentences; none if it is skipped.
    """

    manifest: Manifest
    files: dict[str, int | None]
    weights_bytes: int
    phases: tuple[Phase, ...]
    disk_bytes: int
    free_bytes: int
    compared: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """The largest peak of all steps."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def seconds(self) -> float:
        """The time of all steps."""
        return sum(phase.seconds for phase in self.phases)

    def state_bytes(self, tokens: int, batch: int) -> int:
        """Return the bytes of the state of ``batch`` sequences of so many tokens, at any number of loops."""
        return self.manifest.resized(tokens).state_bytes(batch)

    def lacking(self) -> list[str]:
        """Return in sentences what this machine lacks for the export."""
        found, memory = [], available_memory()
        if self.disk_bytes > self.free_bytes:
            found.append(f"the disk has {self.free_bytes:,} bytes free, and about {self.disk_bytes:,} are needed")
        if memory is not None and self.peak_bytes > memory:
            found.append(f"{memory:,} bytes of memory are available, and about {self.peak_bytes:,} are needed")
        return found


def plan_export(
    checkpoint: Checkpoint,
    output: Path,
    options: ExportOptions,
    *,
    verified: bool = True,
    tokens: int | None = None,
    progress: Progress = no_progress,
) -> Plan:
    """Plan an export without writing anything. Raises the errors of the export that its first steps would raise.

    ``verified``: whether the package is compared with PyTorch, ``tokens``: greedy tokens per prompt (None: as an
    export).
    """
    if options.share_caches is not None:
        checkpoint = checkpoint.sharing(default_depth(checkpoint.own))
    sizes = package_sizes(checkpoint.config, options)
    check_options(checkpoint, options)
    began = perf_counter()
    graphs, states = trace_graphs(checkpoint, sizes, options, frozenset(), progress)
    if options.cache is not None:
        states = quantized_states(states, BITS[options.cache.kind])
    record = quantize_graphs(graphs, options, Statistics(), checkpoint.config.tie_word_embeddings)
    traced = perf_counter() - began
    weights_bytes = _weights_bytes(checkpoint, graphs, options)
    manifest = _manifest(checkpoint, sizes, options, states, graphs, record)
    tokens = (16 if weights_bytes > LARGE_BYTES else 256) if tokens is None else tokens
    work = _Work(checkpoint, manifest, options, weights_bytes)
    phases = [Phase("trace", traced, _BASE_BYTES), *work.calibration(), work.writing()]
    if verified:
        phases.append(work.comparison(tokens))
    place = output.absolute().parent
    while not place.exists():
        place = place.parent
    files = _files(checkpoint, graphs, weights_bytes, verified)
    return Plan(
        manifest,
        files,
        weights_bytes,
        tuple(phases),
        sum(size or 0 for size in files.values()) + (work.copy_bytes if verified else 0),
        shutil.disk_usage(place).free,
        tuple(_compared(manifest, tokens, weights_bytes)) if verified else (),
    )


def _weights_bytes(checkpoint: Checkpoint, graphs: dict[str, TracedGraph], options: ExportOptions) -> int:
    """Return the bytes of the weights file. Weights that get 8 bits instead of 4 by ``int8_share`` are assumed to use
    all of it."""
    models = [graph.model for graph in graphs.values()]
    attach_weights(models, checkpoint.weights, TORCH_DTYPES[PRECISIONS[options.precision]])
    found = stored_bytes(models)
    if options.weights is not None and options.weights.share:
        in_loop = stored_bytes([graphs["loop_step"].model])
        found += int(options.weights.share * in_loop)
    return found


def _manifest(
    checkpoint: Checkpoint,
    sizes: Sizes,
    options: ExportOptions,
    states: list[StateSpec],
    graphs: dict[str, TracedGraph],
    record: dict[str, object],
) -> Manifest:
    specs = {name: GraphSpec(f"{name}.onnx", graph.inputs, graph.outputs) for name, graph in graphs.items()}
    return manifest_of(checkpoint, sizes, options, states, specs, record, {})


def _files(
    checkpoint: Checkpoint, graphs: dict[str, TracedGraph], weights_bytes: int, verified: bool
) -> dict[str, int | None]:
    from melt_models.convert import COMPANIONS

    copied = {name: checkpoint.directory / name for name in (*COMPANIONS, EXAMPLE_PROMPT)}
    found: dict[str, int | None] = {f"{name}.onnx": graph_bytes(graph.model) for name, graph in graphs.items()}
    found[WEIGHTS_FILE] = weights_bytes
    found |= {name: path.stat().st_size for name, path in copied.items() if path.is_file()}
    return found | {MANIFEST: None} | ({PARITY: None} if verified else {})


class _Work:
    """Estimates of the time and memory of each step, from sizes and a moment's measurement of this machine."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, options: ExportOptions, weights_bytes: int):
        self._options, self._manifest, self._weights_bytes = options, manifest, weights_bytes
        layers = linear_layers(checkpoint.without_weights())
        self._matmuls = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
        core = {name: shape for name, shape in self._matmuls.items() if not name.startswith("lm_head")}
        self._core = sum(map(prod, core.values()))
        self._largest = 4 * max(prod(stored.shape) for stored in checkpoint.weights.values())
        self._layers = checkpoint.config.num_hidden_layers
        self._flops, self._bytes_s = _speed()
        # A bf16 package is compared through a copy in float32.
        self.copy_bytes = 2 * weights_bytes if options.precision == "bf16" else 0

    def calibration(self) -> list[Phase]:
        """Return what quantization runs over its calibration text; nothing for plain rounding."""
        weights, loops = self._options.weights, self._manifest.loops
        gptq = weights is not None and weights.method == "gptq"
        if not gptq and self._options.cache is None:
            return []
        runs = (1 if self._options.cache is not None else 0) + ((2 if weights and weights.share else 1) if gptq else 0)
        passes = runs * self._flops_time(_CALIBRATION_TOKENS) * loops
        peak = _BASE_BYTES + self._hessian_bytes() + 4 * self._largest
        if weights is not None and weights.share:  # gradients keep every weight that was widened to float32
            peak = max(peak, _BASE_BYTES + 4 * self._core * loops + 4 * self._largest)
        return [Phase("calibrate", passes, peak)]

    def _hessian_bytes(self) -> int:
        """Return the bytes of GPTQ's Hessians, which stay until the weights are written.

        Matmuls of a layer share that of an input: query, key and value one, gate and up another.
        """
        weights = self._options.weights
        if weights is None or weights.method != "gptq":
            return 0
        inputs = {size for size, _ in self._matmuls.values()}
        return 4 * self._layers * (3 * min(inputs) ** 2 + max(inputs) ** 2)

    def writing(self) -> Phase:
        """Return writing of graphs and weights, with rounding by GPTQ."""
        weights = self._options.weights
        seconds = self._weights_bytes / _WRITE_BYTES_S
        if weights is not None:
            rate = _GPTQ_VALUES_S if weights.method == "gptq" else _RTN_VALUES_S
            seconds += sum(map(prod, self._matmuls.values())) / rate
        hessians = self._hessian_bytes()
        copies = 7 if hessians else 3  # of the weight that is being rounded or cast
        held = min(_IN_FLIGHT_BYTES, self._weights_bytes) + hessians + copies * self._largest
        return Phase("write", seconds, _BASE_BYTES + held)

    def comparison(self, tokens: int) -> Phase:
        """Return the comparison with PyTorch, and that of quality where weights or caches are quantized."""
        manifest, loops = self._manifest, self._manifest.loops
        chunk = min(manifest.chunk, 128)
        traced = 2 * chunk + 8 + 4 * DECODE_STEPS
        orders = 2 + len(ORDERS) if manifest.precision == "fp32" else 1
        seconds = orders * loops * self._flops_time(traced)
        seconds += 2 * _GREEDY_PROMPTS * tokens * loops * self._pass_time()
        if manifest.quantized:
            held = LARGE_TOKENS if self._weights_bytes > LARGE_BYTES else TOKENS
            seconds += 3 * loops * self._flops_time(held)
        in_half = manifest.precision != "fp32" and self._weights_bytes <= LARGE_BYTES
        held_weights = self._weights_bytes * (3 if in_half else 1) + self.copy_bytes
        states = manifest.state_bytes(min(manifest.max_batch, 3))
        return Phase("compare", seconds, _BASE_BYTES + int(1.1 * held_weights) + 2 * states + 2 * self._largest)

    def _flops_time(self, tokens: int) -> float:
        """Return the seconds of one loop over many tokens."""
        return 2 * self._core * tokens / self._flops + self._layers * _PYTORCH_OVERHEAD_S

    def _pass_time(self) -> float:
        """Return the seconds of one loop over one token."""
        return 4 * self._core / self._bytes_s + self._layers * _PYTORCH_OVERHEAD_S


def _speed() -> tuple[float, float]:
    """Measure this machine with PyTorch's threads: float32 operations per second, and bytes per second of a matrix
    that is multiplied with a vector."""
    square, long = torch.ones(1024, 1024), torch.ones(4096, 8192)
    row = torch.ones(1, 4096)
    flops = min(_seconds(lambda: square @ square) for _ in range(5))
    read = min(_seconds(lambda: row @ long) for _ in range(5))
    return 2 * square.numel() * 1024 / flops, 4 * long.numel() / read


def _seconds(run: object) -> float:
    began = perf_counter()
    run()  # type: ignore[operator]
    return perf_counter() - began


def _compared(manifest: Manifest, tokens: int, weights_bytes: int) -> list[str]:
    """Say what the comparison covers."""
    limits = tolerance_of(manifest)
    truth = "float64" if manifest.precision == "fp32" else "float32"
    loops = "1 loop" if manifest.loops == 1 else f"each of {manifest.loops} loops"
    batch = min(manifest.max_batch, 3 if manifest.state_bytes(3) < LARGE_BYTES else 2)
    parts = ["hidden", *(["latent"] if manifest.has_latent else []), "keys, values", "logits"]
    parts += ["exit probability"] if manifest.has_exit_gate else []
    found = [
        f"{', '.join(parts)} after {loops} against PyTorch in {truth}, {batch} at once and token by token; relative "
        f"error up to {limits.relative:g}, KL {limits.kl:g}",
        f"{tokens} greedy tokens for {_GREEDY_PROMPTS} prompts"
        + (", all the same" if limits.same_tokens else ", reported"),
    ]
    if manifest.cache_loops is None and manifest.has_exit_gate:
        found.append("exit depths at a threshold that splits the tokens")
    if lanes_of(manifest, manifest.loops) > 1:
        found.append("staggered decoding, against PyTorch's and against plain decoding")
    if manifest.quantized:
        held = LARGE_TOKENS if weights_bytes > LARGE_BYTES else TOKENS
        found.append(f"quality against the checkpoint in float32 on up to {held} tokens of held-out text")
    return found

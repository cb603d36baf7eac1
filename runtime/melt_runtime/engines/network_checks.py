"""Checks that refuse a network which would build and run, but give wrong results or be slow: parsers drop things
silently."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BackendError
from ..package.manifest import Manifest
from ..package.onnx_file import read_operators
from ..package.specs import GraphSpec, StateSpec, TensorSpec
from .network import Network
from .quantize import worth_it

# TensorRT's names of tensor types.
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}
# How much larger than its weights a plan may be, for kernels and tables, before its weights count as widened.
_KERNEL_BYTES = 16 << 20


def inspect_network(network: Network, name: str, manifest: Manifest, weights: str | None = None) -> None:
    """Check a package's graph after parsing. Raises BackendError that says what is wrong.

    Every input and output exists with its type and shape, and every input is used. In a graph with layers of the
    standard dialect, each cache is written by a KV_CACHE_UPDATE whose output is a network output, and each attention is
    the fused operator over an updated cache, masked, as long as the mask is wide.
    """
    graph = manifest.graphs[name]
    _check_tensors(name, graph.inputs, network.inputs())
    _check_tensors(name, graph.outputs, network.outputs())
    _check_inputs_used(network, name, graph)
    caches = manifest.caches_of(name)
    if not caches:
        return
    if manifest.dialect == "standard":
        _check_caches_updated(network, name, caches)
        _check_attention_fused(network, name, len(caches) // 2, decomposable=manifest.precision == "fp32")
    if weights is not None:
        _check_matmuls_quantized(network, name, weights)


def inspect_operators(file: Path) -> None:
    """Refuse operators with inputs that the parser silently ignores. Raises BackendError, PackageError.

    Of Attention, the parser reads query, key, value and mask. Ignoring ``nonpad_kv_seqlen`` or a past would attend to
    stale positions.
    """
    for operator in read_operators(file):
        if operator.kind == "Attention" and any(operator.inputs[4:]):
            ignored = ", ".join(name for name in operator.inputs[4:] if name)
            raise BackendError(
                f"{file.name}: the parser ignores {ignored}, an input of {operator.name}; lengths must be in its mask"
            )


def require_small(plan_bytes: int, weight_bytes: int, saved_bytes: int, weights: str) -> None:
    """Refuse a plan whose quantized weights were widened again. Raises BackendError.

    ``weight_bytes``: expected bytes of all weights. ``saved_bytes``: saved by quantizing.
    """
    if plan_bytes > weight_bytes + saved_bytes // 2 + _KERNEL_BYTES:
        raise BackendError(
            f"the {weights} weights did not stay {weights}: the plan has {plan_bytes:,} bytes where {weight_bytes:,} "
            f"of weights were expected; this library does not support them on this path"
        )


def engine_dtype(dtype: Any) -> str:
    """Return the package's name of a library DataType, or the library's own."""
    name = str(dtype).rpartition(".")[2]
    return next((ours for ours, theirs in _DTYPES.items() if theirs == name), name)


def _check_tensors(name: str, wanted: tuple[TensorSpec, ...], found: dict[str, Any]) -> None:
    for spec in wanted:
        tensor = found.get(spec.name)
        if tensor is None:
            raise BackendError(f"{name}: the parsed network has lost {spec.name}")
        dtype = str(tensor.dtype).rpartition(".")[2]
        if dtype != _DTYPES[spec.dtype]:
            raise BackendError(f"{name}: {spec.name} is {dtype} in the parsed network, {spec.dtype} in the package")
        shape = tuple(tensor.shape)
        fits = len(shape) == len(spec.shape) and all(
            size == (-1 if isinstance(dim, str) else dim) for size, dim in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise BackendError(f"{name}: {spec.name} is {shape} in the parsed network, {spec.shape} in the package")
    extra = set(found) - {spec.name for spec in wanted}
    if extra:
        raise BackendError(f"{name}: the parsed network has {', '.join(sorted(extra))}, which the manifest lacks")


def _check_inputs_used(network: Network, name: str, graph: GraphSpec) -> None:
    dropped = next((w for w in network.library.messages.warnings if "unused input" in w.lower()), None)
    if dropped is not None:
        raise BackendError(f"{name}: the parser ignores an operator's input: {' '.join(dropped.split())}")
    needed = network.needed()
    unused = next((spec.name for spec in graph.inputs if spec.name not in needed), None)
    if unused is not None:
        raise BackendError(f"{name}: no output depends on the input {unused}; the parser dropped it")


def _check_caches_updated(network: Network, name: str, caches: Sequence[StateSpec]) -> None:
    """Check each cache: network input -> KV_CACHE_UPDATE at ``lengths`` -> network output, so that both share a
    buffer."""
    updates = {layer.get_output(0).name: layer for layer in network.layers("KV_CACHE_UPDATE")}
    for state in caches:
        layer = updates.pop(state.output, None)
        if layer is None:
            raise BackendError(f"{name}: {state.output} is not the output of a KV_CACHE_UPDATE")
        cache, index = layer.get_input(0), layer.get_input(2)
        if cache.name != state.input:
            raise BackendError(f"{name}: {state.output} updates {cache.name}, not {state.input}: no shared buffer")
        if not _reads(network, index, "lengths"):
            raise BackendError(f"{name}: {state.output} is written at {index.name}, not at lengths")
    if updates:
        raise BackendError(f"{name}: a KV_CACHE_UPDATE writes {next(iter(updates))}, which is no cache")


def _check_attention_fused(network: Network, name: str, layers: int, *, decomposable: bool) -> None:
    attentions = list(network.layers("ATTENTION_INPUT"))
    if len(attentions) != layers:
        raise BackendError(f"{name}: {len(attentions)} fused attentions for {layers} layers; the rest fell apart")
    written = {layer.get_output(0).name for layer in network.layers("KV_CACHE_UPDATE")}
    for layer in attentions:
        attention = layer.attention
        if attention.mask is None or attention.mask.name != "attention_mask" or attention.causal:
            raise BackendError(f"{name}: {layer.name} ignores attention_mask: it would see stale positions")
        for part, index in (("keys", 1), ("values", 2)):
            tensor = layer.get_input(index)
            origin = network.origin(tensor)
            if origin is None or origin.get_output(0).name not in written:
                raise BackendError(f"{name}: the {part} of {layer.name} are not an updated cache")
            if tuple(tensor.shape)[2] != -1:
                raise BackendError(f"{name}: {layer.name} attends to the whole buffer, whatever the mask's width")
        if attention.decomposable != decomposable:
            raise BackendError(f"{name}: {layer.name} is {'' if attention.decomposable else 'not '}decomposable")


def _check_matmuls_quantized(network: Network, name: str, weights: str) -> None:
    for layer, source in network.matmuls():
        shape = tuple(source.get_output(0).shape)
        if network.kind(source) == "DEQUANTIZE":
            kind = str(source.get_input(0).dtype).rpartition(".")[2].lower()
            if kind != weights:
                raise BackendError(f"{name}: {layer.name} multiplies with {kind} weights, not {weights}")
        elif worth_it(shape, weights):
            raise BackendError(f"{name}: the weights of {layer.name} are not {weights}")


def _reads(network: Network, tensor: Any, name: str) -> bool:
    """Return whether a tensor is the network input ``name``, possibly cast or reshaped."""
    while tensor.name != name:
        layer = network.producers.get(tensor.name)
        if layer is None or network.kind(layer) not in ("CAST", "SHUFFLE", "IDENTITY"):
            return False
        tensor = layer.get_input(0)
    return True

"""A parsed network, as the build looks at it: who makes a tensor, who reads it, and the changes made before a build."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BackendError
from ..package.engine_spec import ProfileSpec
from ..package.onnx_file import read_initializers
from ..package.specs import GraphSpec
from .library import Library
from .profiles import resolve
from .quantize import Quantized, quantize, stored, worth_it

CANDIDATES = 256  # how many of the likeliest tokens the head picks out; TensorRT's limit is 3,840

_CLASSES = {
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "ATTENTION_INPUT": "IAttentionInputLayer",
}
# What a tensor passes through without becoming another: the parser puts these between a constant and its product, and
# between a cache and its attention.
_TRANSPARENT = ("SHUFFLE", "SLICE", "CAST", "ELEMENTWISE", "IDENTITY")


@dataclass(frozen=True)
class Savings:
    """``weight_bytes``: all weights of a graph as they are stored now; ``saved_bytes``: what quantizing them saved."""

    weight_bytes: int
    saved_bytes: int


class Network:
    """An INetworkDefinition with its wiring. Tensors are told apart by name."""

    def __init__(self, library: Library, builder: Any, network: Any):
        self.library, self.builder, self.network = library, builder, network
        self.keep: list[Any] = []  # arrays that the network points into until it is built
        self.map_wires()

    def map_wires(self) -> None:
        """Reads who makes and who reads every tensor."""
        self.producers: dict[str, Any] = {}
        self.readers: dict[str, list[tuple[Any, int]]] = defaultdict(list)
        for layer in self.layers():
            for index in range(layer.num_outputs):
                self.producers[layer.get_output(index).name] = layer
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None:
                    self.readers[tensor.name].append((layer, index))

    def layers(self, kind: str | None = None) -> Iterator[Any]:
        """All layers, or those of a LayerType, which then have the methods of their class."""
        wanted = None if kind is None else getattr(self.library.module.LayerType, kind, None)
        if kind is not None and wanted is None:
            return
        for index in range(self.network.num_layers):
            layer = self.network.get_layer(index)
            if wanted is None or layer.type == wanted:
                if kind in _CLASSES:
                    layer.__class__ = getattr(self.library.module, _CLASSES[kind])
                yield layer

    def kind(self, layer: Any) -> str:
        """A layer's LayerType by name."""
        return str(layer.type).rpartition(".")[2]

    def inputs(self) -> dict[str, Any]:
        """The network's input tensors by name."""
        return {t.name: t for t in (self.network.get_input(i) for i in range(self.network.num_inputs))}

    def outputs(self) -> dict[str, Any]:
        """The network's output tensors by name."""
        return {t.name: t for t in (self.network.get_output(i) for i in range(self.network.num_outputs))}

    def origin(self, tensor: Any) -> Any:
        """The layer that a tensor comes from, past slices, casts, scalings and reshapes; None for an input."""
        while tensor is not None:
            layer = self.producers.get(tensor.name)
            if layer is None or self.kind(layer) not in _TRANSPARENT:
                return layer
            tensor = layer.get_input(0)
        return None

    def needed(self) -> set[str]:
        """The names of all tensors that an output depends on."""
        seen: set[str] = set()
        waiting = list(self.outputs())
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            layer = self.producers.get(name)
            if layer is not None:
                tensors = (layer.get_input(index) for index in range(layer.num_inputs))
                waiting += [tensor.name for tensor in tensors if tensor is not None]
        return seen

    def products(self) -> Iterator[tuple[Any, Any]]:
        """Every matrix product with a stored weight: its layer, and the CONSTANT or DEQUANTIZE that it reads."""
        for layer in self.layers("MATRIX_MULTIPLY"):
            origin = self.origin(layer.get_input(1))
            if origin is not None and self.kind(origin) in ("CONSTANT", "DEQUANTIZE"):
                yield layer, origin


def parse(library: Library, builder: Any, file: Path) -> Network:
    """Parses an ONNX file into a strongly typed network. Raises BackendError with the parser's own words."""
    module = library.module
    library.messages.clear()
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(file)):
        reasons = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = f"{reasons[0].desc()} ({_node(reasons[0])})" if reasons else library.messages.reason()
        raise BackendError(f"{library.title} {library.version} cannot read {file.name}: {' '.join(reason.split())}")
    parsed = Network(library, builder, network)
    parsed.keep.append(parser)  # weights that were read from the file are the parser's
    return parsed


def _node(error: Any) -> str:
    """Which node a parser's error is about; old parsers do not say."""
    if not hasattr(error, "node_name"):
        return f"node {error.node()}"
    return f"{error.node_operator()} {error.node_name()}"


def add_profiles(network: Network, config: Any, graph: GraphSpec, profiles: tuple[ProfileSpec, ...]) -> None:
    """Adds an optimisation profile each. Raises BackendError where the library refuses one."""
    for profile in profiles:
        made = network.builder.create_optimization_profile()
        for tensor in graph.inputs:
            if any(isinstance(dim, str) for dim in tensor.shape):
                made.set_shape(tensor.name, *resolve(tensor.shape, profile))
        if config.add_optimization_profile(made) < 0:
            raise BackendError(
                f"{network.library.title} refuses the profile {profile.name}: {network.library.messages.reason()}"
            )


def allow_decomposition(network: Network) -> None:
    """Lets every attention become plain products: there is no fused kernel for float32."""
    for layer in network.layers("ATTENTION_INPUT"):
        layer.attention.decomposable = True


def add_candidates(network: Network, vocab: int) -> int:
    """Gives the head three more outputs, and returns k: what the runtime needs instead of a whole row of logits.

    top_logits and top_ids (batch, chunk, k): the k largest logits, descending, float32, and their ids, int32; log_sum
    (batch, chunk, 1): the logarithm of the sum of exp of all. Raises BackendError where the library refuses.
    """
    module, made = network.library.module, network.network
    logits = network.outputs()["logits"]
    k, last = min(CANDIDATES, vocab), 1 << (len(tuple(logits.shape)) - 1)

    def combine(left: Any, right: Any, operation: str) -> Any:
        return made.add_elementwise(left, right, getattr(module.ElementWiseOperation, operation)).get_output(0)

    def unary(tensor: Any, operation: str) -> Any:
        return made.add_unary(tensor, getattr(module.UnaryOperation, operation)).get_output(0)

    def reduced(tensor: Any, operation: str) -> Any:
        return made.add_reduce(tensor, getattr(module.ReduceOperation, operation), last, True).get_output(0)

    top = made.add_topk(logits, module.TopKOperation.MAX, k, last)
    if top is None:
        raise BackendError(f"{network.library.title} has no top {k}: {network.library.messages.reason()}")
    largest = reduced(logits, "MAX")
    sums = reduced(unary(combine(logits, largest, "SUB"), "EXP"), "SUM")
    outputs = (top.get_output(0), top.get_output(1), combine(unary(sums, "LOG"), largest, "SUM"))
    for name, tensor in zip(("top_logits", "top_ids", "log_sum"), outputs, strict=True):
        tensor.name = name
        made.mark_output(tensor)
    network.map_wires()
    return k


def quantize_matmuls(network: Network, file: Path, kind: str, dtype: str) -> Savings:
    """Stores the weights of the matrix products as int4, int8 or fp8, behind a DEQUANTIZE back to ``dtype``.

    The weights are read from the ONNX file, where the parser's names find them. Raises BackendError for a model that
    has nothing to quantize, PackageError.
    """
    initializers = read_initializers(file)
    total = sum(weight.bytes for weight in initializers.values())
    saved = 0
    done: dict[str, Any] = {}
    for layer, constant in list(network.products()):
        weight = initializers.get(constant.name)
        if weight is None or not worth_it(weight.shape, kind):
            continue
        if weight.name not in done:
            quantized = quantize(weight.read(), kind, dtype)
            done[weight.name] = _dequantize(network, weight.name, quantized, dtype)
            saved += weight.bytes - quantized.data.nbytes - 2 * quantized.scales.size
        _replace_source(network, layer, constant.get_output(0).name, done[weight.name])
    if not done:
        raise BackendError(f"{file.name} has no matrix product whose sizes {kind} weights fit")
    network.map_wires()
    return Savings(total - saved, saved)


def _dequantize(network: Network, name: str, weight: Quantized, dtype: str) -> Any:
    """CONSTANT -> DEQUANTIZE. Returns its output tensor, (in, out)."""
    module = network.library.module
    wide = {"float16": module.DataType.HALF, "bfloat16": module.DataType.BF16}[dtype]
    narrow = getattr(module.DataType, weight.kind.upper())
    scales = stored(weight.scales, dtype)
    network.keep += [weight.data, scales]
    count = weight.shape[0] * weight.shape[1]
    made = network.network
    data = made.add_constant(weight.shape, module.Weights(narrow, weight.data.ctypes.data, count))
    scale = made.add_constant(scales.shape, module.Weights(wide, scales.ctypes.data, scales.size))
    layer = made.add_dequantize(data.get_output(0), scale.get_output(0), wide)
    layer.axis = 0 if weight.kind == "int4" else 1  # blocks are known by the shape of the scales
    data.name, scale.name, layer.name = f"{name}/{weight.kind}", f"{name}/scale", f"{name}/dequantize"
    return layer.get_output(0)


def _replace_source(network: Network, layer: Any, old: str, new: Any) -> None:
    """Where a product reads the tensor ``old``, directly or through a reshape, it reads ``new``."""
    index, reader = 1, layer
    while reader.get_input(index).name != old:
        reader, index = network.producers[reader.get_input(index).name], 0
    reader.set_input(index, new)

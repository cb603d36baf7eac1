"""A parsed TensorRT network: its wiring, and the changes made before a build."""

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

CANDIDATES = 256  # top tokens that the head selects; TensorRT's limit is 3,840

_CLASSES = {
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "ATTENTION_INPUT": "IAttentionInputLayer",
}
# Layers that pass a tensor's values on: the parser puts them between a constant and its matmul, and
# between a cache and its attention.
_TRANSPARENT = ("SHUFFLE", "SLICE", "CAST", "ELEMENTWISE", "IDENTITY")


@dataclass(frozen=True)
class Savings:
    """Bytes of a graph's weights. ``weight_bytes``: all, as now stored. ``saved_bytes``: saved by quantizing."""

    weight_bytes: int
    saved_bytes: int


class Network:
    """An INetworkDefinition with its wiring. Tensors are identified by name."""

    def __init__(self, library: Library, builder: Any, network: Any):
        self.library, self.builder, self.network = library, builder, network
        self.keep: list[Any] = []  # arrays that must live until the network is built
        self.map_wires()

    def map_wires(self) -> None:
        """Map every tensor to its producer and readers."""
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
        """Yield all layers, or those of a LayerType, cast to its class."""
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
        """Return the name of a layer's LayerType."""
        return str(layer.type).rpartition(".")[2]

    def inputs(self) -> dict[str, Any]:
        """Return the network's input tensors by name."""
        return {t.name: t for t in (self.network.get_input(i) for i in range(self.network.num_inputs))}

    def outputs(self) -> dict[str, Any]:
        """Return the network's output tensors by name."""
        return {t.name: t for t in (self.network.get_output(i) for i in range(self.network.num_outputs))}

    def origin(self, tensor: Any) -> Any:
        """Return the layer that a tensor comes from, skipping slices, casts, scalings and reshapes; None for an
        input."""
        while tensor is not None:
            layer = self.producers.get(tensor.name)
            if layer is None or self.kind(layer) not in _TRANSPARENT:
                return layer
            tensor = layer.get_input(0)
        return None

    def needed(self) -> set[str]:
        """Return the names of all tensors that an output depends on."""
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

    def matmuls(self) -> Iterator[tuple[Any, Any]]:
        """Yield every matmul with a stored weight: its layer, and the CONSTANT or DEQUANTIZE layer of the weight."""
        for layer in self.layers("MATRIX_MULTIPLY"):
            origin = self.origin(layer.get_input(1))
            if origin is not None and self.kind(origin) in ("CONSTANT", "DEQUANTIZE"):
                yield layer, origin


def parse(library: Library, builder: Any, file: Path) -> Network:
    """Parse an ONNX file into a strongly typed network. Raises BackendError with the parser's reason."""
    module = library.module
    library.messages.clear()
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(file)):
        reasons = [parser.get_error(index) for index in range(parser.num_errors)]
        reason = f"{reasons[0].desc()} ({_node(reasons[0])})" if reasons else library.messages.reason()
        raise BackendError(f"{library.title} {library.version} cannot read {file.name}: {' '.join(reason.split())}")
    parsed = Network(library, builder, network)
    parsed.keep.append(parser)  # the parser owns the weights read from the file
    return parsed


def _node(error: Any) -> str:
    """Name the node of a parser's error; old parsers give only its number."""
    if not hasattr(error, "node_name"):
        return f"node {error.node()}"
    return f"{error.node_operator()} {error.node_name()}"


def add_profiles(network: Network, config: Any, graph: GraphSpec, profiles: tuple[ProfileSpec, ...]) -> None:
    """Add the optimisation profiles. Raises BackendError if the library refuses one."""
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
    """Let attention be decomposed into matmuls, because there is no fused kernel for float32."""
    for layer in network.layers("ATTENTION_INPUT"):
        layer.attention.decomposable = True


def add_candidates(network: Network, vocab: int) -> int:
    """Add the top candidates to the head's outputs, so that not all logits must leave the device. Return k.

    top_logits, top_ids (batch, chunk, k): the k largest logits, descending, float32, and their int32 ids. log_sum
    (batch, chunk, 1): log of the sum of exp over all logits. Raises BackendError if the library refuses.
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
    """Store the matmuls' weights as int4, int8 or fp8, dequantized to ``dtype``. Return the savings.

    The weights are read from the ONNX file by the parser's names. Raises BackendError if there is nothing to quantize,
    PackageError.
    """
    initializers = read_initializers(file)
    total = sum(weight.bytes for weight in initializers.values())
    saved = 0
    done: dict[str, Any] = {}
    for layer, constant in list(network.matmuls()):
        weight = initializers.get(constant.name)
        if weight is None or not worth_it(weight.shape, kind):
            continue
        if weight.name not in done:
            quantized = quantize(weight.read(), kind, dtype)
            done[weight.name] = _dequantize(network, weight.name, quantized, dtype)
            saved += weight.bytes - quantized.data.nbytes - 2 * quantized.scales.size
        _replace_source(network, layer, constant.get_output(0).name, done[weight.name])
    if not done:
        raise BackendError(f"{file.name} has no matmul whose sizes {kind} weights fit")
    network.map_wires()
    return Savings(total - saved, saved)


def _dequantize(network: Network, name: str, weight: Quantized, dtype: str) -> Any:
    """Add CONSTANT -> DEQUANTIZE. Return its output tensor (in, out)."""
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
    layer.axis = 0 if weight.kind == "int4" else 1  # the scales' shape gives the block size
    data.name, scale.name, layer.name = f"{name}/{weight.kind}", f"{name}/scale", f"{name}/dequantize"
    return layer.get_output(0)


def _replace_source(network: Network, layer: Any, old: str, new: Any) -> None:
    """Make a matmul read ``new`` instead of ``old``, directly or through reshapes."""
    index, reader = 1, layer
    while reader.get_input(index).name != old:
        reader, index = network.producers[reader.get_input(index).name], 0
    reader.set_input(index, new)

"""Lowering of the Export IR to ONNX, one function per PyTorch operator.

A loop step has about thirty operators. ``torch.onnx`` supports a thousand, and reading its table takes longer than the
rest of a small export. An operator without an entry in ``_LOWERINGS`` is refused by name: write its function and add it
there.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype
from torch import Tensor, fx
from torch.export.graph_signature import InputKind

from ..errors import ExportError
from .cleanup import CHECKPOINT_NAME, SCOPE, TRANSPOSED

_LAST = 2**63 - 1  # ONNX's end of a slice without one

torch.library.define("melt_export::onnx_node", "(Tensor?[] inputs, str spec, int[] like) -> Tensor[]")


@torch.library.register_fake("melt_export::onnx_node")
def _(inputs: list[Tensor | None], spec: str, like: list[int]) -> list[Tensor]:
    return [torch.empty_like(tensor) for index in like if (tensor := inputs[index]) is not None]


def onnx_node(
    op_type: str,
    inputs: Sequence[Tensor | None],
    like: Sequence[int],
    attributes: dict[str, int | float | str],
    *,
    domain: str = "",
    version: int = 1,
) -> list[Tensor]:
    """Put any ONNX node into a traced graph. The call can be traced, not run.

    ``like``: for each output the index of the input whose shape and type it has.
    """
    spec = json.dumps({"op_type": op_type, "attributes": attributes, "domain": domain, "version": version})
    return torch.ops.melt_export.onnx_node(list(inputs), spec, list(like))


def lower(
    program: torch.export.ExportedProgram, inputs: Sequence[tuple[str, Sequence[int | str]]], opset: int
) -> ir.Graph:
    """Convert an exported program to an ONNX graph, without weight data and without names of nodes and outputs.

    ``inputs``: name and shape of each input; named dimensions are strings. Raises ExportError.
    """
    translation = _Translation(program, inputs, opset)
    for node in _live(program.graph):
        translation.translate(node)
    results: Any = program.graph.output_node().args[0]
    translation.graph.outputs.extend(translation.values[result] for result in results)
    return translation.graph


def _live(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes on which an output depends, in order. This drops assertions about shapes."""
    waiting, live = [graph.output_node()], set()
    while waiting:
        node = waiting.pop()
        if node not in live:
            live.add(node)
            waiting += node.all_input_nodes
    return [node for node in graph.nodes if node in live and node.op == "call_function"]


class _Translation:
    """An ONNX graph under construction, and the ONNX value of each Export IR node."""

    def __init__(
        self, program: torch.export.ExportedProgram, inputs: Sequence[tuple[str, Sequence[int | str]]], opset: int
    ):
        self.program = program
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset})
        self.values: dict[fx.Node, Any] = {}
        self.dimensions: dict[str, str] = {}  # symbol of the Export IR -> name of the dimension
        self.constants: dict[tuple[str, bytes], ir.Value] = {}
        self.scope = ""
        self.node: fx.Node  # the node that is being translated
        named = iter(inputs)
        placeholders = program.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                self._input(node, *next(named))
            elif node.users:
                assert spec.target is not None
                self._weight(node, spec.target, spec.kind)

    def _input(self, node: fx.Node, name: str, shape: Sequence[int | str]) -> None:
        for size, dimension in zip(node.meta["val"].shape, shape, strict=True):
            if isinstance(dimension, str):
                self.dimensions[str(size)] = dimension
        value = self._typed(ir.Value(name=name), node.meta["val"])
        self.graph.inputs.append(value)
        self.values[node] = value

    def _weight(self, node: fx.Node, name: str, kind: InputKind) -> None:
        """Add an initializer: a weight by its checkpoint name, without data; a buffer or constant with its values."""
        value = self._typed(ir.Value(name=name), node.meta["val"])
        if kind == InputKind.PARAMETER:
            value.meta[CHECKPOINT_NAME] = name
        else:
            found = self.program.constants.get(name)
            value.const_value = TorchTensor(self.program.state_dict[name] if found is None else found, name=name)
        self.graph.initializers[name] = value
        self.values[node] = value

    def _typed(self, value: ir.Value, meta: Tensor) -> ir.Value:
        value.type = ir.TensorType(from_torch_dtype(meta.dtype))
        value.shape = ir.Shape(
            [size if isinstance(size, int) else self.dimensions.get(str(size)) for size in meta.shape]
        )
        return value

    def translate(self, node: fx.Node) -> None:
        """Translate one operator. Raises ExportError for an unknown one."""
        lowering = _LOWERINGS.get(node.target)  # type: ignore[arg-type]
        if lowering is None:
            raise ExportError(f"the graph has the operator {node.target}, which graph/lowering.py does not know")
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(stack.values()), ("",))[0]
        self.scope = "" if path.startswith("_") else path.removeprefix("model.")
        self.node = node
        arguments = fx.map_arg(node.args, lambda argument: self.values[argument])
        named = fx.map_arg(node.kwargs, lambda argument: self.values[argument])
        self.values[node] = lowering(self, *arguments, **named)  # type: ignore[misc]

    def emit(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Append a node whose output has the type of the Export IR node: for the last node of a lowering."""
        value = self.append(op_type, inputs, 1, attributes, domain)[0]
        return self._typed(value, self.node.meta["val"]) if isinstance(self.node.meta["val"], Tensor) else value

    def helper(self, op_type: str, *inputs: ir.Value, like: torch.dtype, **attributes: Any) -> ir.Value:
        """Append an intermediate node of a lowering, with an output of type ``like`` and unknown shape."""
        value = self.append(op_type, inputs, 1, attributes)[0]
        value.type = ir.TensorType(from_torch_dtype(like))
        return value

    def append(
        self, op_type: str, inputs: Sequence[ir.Value | None], count: int, attributes: dict[str, Any], domain: str = ""
    ) -> Sequence[ir.Value]:
        for value in inputs:
            if value is not None and TRANSPOSED in value.meta and op_type != "MatMul":
                raise ExportError(f"{op_type} reads {value.name}, which is stored transposed for a MatMul")
        node = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=count)
        node.meta[SCOPE] = self.scope
        self.graph.append(node)
        return node.outputs

    def constant(self, content: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        """Return an initializer with these values; equal ones are shared."""
        tensor = TorchTensor(torch.tensor(content, dtype=dtype))
        key = (f"{tensor.dtype} {tensor.shape}", tensor.tobytes())
        if key not in self.constants:
            value = ir.Value(name=f"constant.{len(self.constants)}", const_value=tensor)
            value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape)
            self.graph.initializers[str(value.name)] = self.constants[key] = value
        return self.constants[key]

    def operand(self, value: Any, dtype: torch.dtype) -> ir.Value:
        """Return a tensor or number as an operand of the given type."""
        if not isinstance(value, ir.Value):
            return self.constant(value, dtype)
        if value.dtype == from_torch_dtype(dtype):
            return value
        return self.helper("Cast", value, like=dtype, to=int(from_torch_dtype(dtype)))

    def vector(self, *sizes: int | ir.Value) -> ir.Value:
        """Return sizes, some of them one-element tensors known only at run time, as one int64 tensor."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes))
        parts = [self.constant([size]) if isinstance(size, int) else size for size in sizes]
        return parts[0] if len(parts) == 1 else self.helper("Concat", *parts, like=torch.int64, axis=0)

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["val"].dtype


def _elementwise(op_type: str) -> Callable[..., ir.Value]:
    """Return the lowering of an operator whose operands have the type of its result."""

    def lowering(to: _Translation, *operands: Any) -> ir.Value:
        return to.emit(op_type, *(to.operand(operand, to.dtype) for operand in operands))

    return lowering


def _less_or_equal(to: _Translation, left: ir.Value, right: Any) -> ir.Value:
    return to.emit("LessOrEqual", left, right)


def _where(to: _Translation, condition: ir.Value, yes: Any, no: Any) -> ir.Value:
    return to.emit("Where", condition, to.operand(yes, to.dtype), to.operand(no, to.dtype))


def _cast(to: _Translation, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    return x if x.dtype == from_torch_dtype(dtype) else to.emit("Cast", x, to=int(from_torch_dtype(dtype)))


def _clamp(to: _Translation, x: ir.Value, low: float | None = None, high: float | None = None) -> ir.Value:
    bounds = [None if bound is None else to.constant(bound, to.dtype) for bound in (low, high)]
    return to.emit("Clip", x, *(bounds if high is not None else bounds[:1]))


def _full(to: _Translation, size: list[int], value: float, **_: Any) -> ir.Value:
    return to.constant(torch.full(size, value).tolist(), to.dtype)


def _zeros_like(to: _Translation, x: ir.Value, **_: Any) -> ir.Value:
    return to.emit("Expand", to.constant(0, to.dtype), to.helper("Shape", x, like=torch.int64))


def _arange(to: _Translation, end: int | ir.Value, **_: Any) -> ir.Value:
    last = to.constant(end) if isinstance(end, int) else to.helper("Squeeze", end, like=torch.int64)
    return to.emit("Range", to.constant(0), last, to.constant(1))


def _linear(to: _Translation, x: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    """Multiply by a weight that the file holds transposed, (in, out)."""
    if TRANSPOSED not in weight.meta:
        assert weight.shape is not None
        if CHECKPOINT_NAME not in weight.meta or weight.uses():
            raise ExportError(f"{weight.name} is read by a product and by something else")
        weight.meta[TRANSPOSED] = True
        weight.shape = ir.Shape(list(weight.shape)[::-1])
    product = to.emit("MatMul", x, weight)
    return product if bias is None else to.emit("Add", product, bias)


def _silu(to: _Translation, x: ir.Value) -> ir.Value:
    return to.emit("Mul", x, to.emit("Sigmoid", x))


def _mean(to: _Translation, x: ir.Value, axes: list[int], keepdim: bool = False) -> ir.Value:
    return to.emit("ReduceMean", x, to.constant(axes), keepdims=int(keepdim), noop_with_empty_axes=0)


def _select(to: _Translation, x: ir.Value, axis: int, index: int) -> ir.Value:
    return to.emit("Gather", x, to.constant(index), axis=axis)


def _embedding(to: _Translation, table: ir.Value, index: ir.Value) -> ir.Value:
    return to.emit("Gather", table, index, axis=0)


def _slice(to: _Translation, x: ir.Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> ir.Value:
    ends = to.vector(0 if start is None else start), to.vector(_LAST if end is None else end)
    return to.emit("Slice", x, *ends, to.constant([axis]), to.constant([step]))


def _stack(to: _Translation, tensors: list[ir.Value], axis: int = 0) -> ir.Value:
    if len(tensors) == 1:
        return to.emit("Unsqueeze", tensors[0], to.constant([axis]))
    rows = [to.helper("Unsqueeze", tensor, to.constant([axis]), like=to.dtype) for tensor in tensors]
    return to.emit("Concat", *rows, axis=axis)


def _chunk(to: _Translation, x: ir.Value, chunks: int, axis: int = 0) -> Sequence[ir.Value]:
    parts = to.append("Split", [x], chunks, {"axis": axis, "num_outputs": chunks})
    for part, meta in zip(parts, to.node.meta["val"], strict=True):
        to._typed(part, meta)
    return parts


def _unbind(to: _Translation, x: ir.Value, axis: int = 0) -> Sequence[ir.Value]:
    metas = to.node.meta["val"]
    parts = []
    for index, meta in enumerate(metas):
        [part] = to.append("Gather", [x, to.constant(index)], 1, {"axis": axis})
        parts.append(to._typed(part, meta))
    return parts


def _transpose(to: _Translation, x: ir.Value, first: int, second: int) -> ir.Value:
    order = list(range(to.node.meta["val"].dim()))
    order[first], order[second] = order[second], order[first]
    return to.emit("Transpose", x, perm=order)


def _reshape(to: _Translation, x: ir.Value, kept: int, sizes: list[int | ir.Value]) -> ir.Value:
    """Reshape to the first ``kept`` dimensions of x followed by ``sizes``, of which at most one is -1."""
    return to.emit("Reshape", x, to.vector(*[0] * kept, *sizes))


def _unflatten(to: _Translation, x: ir.Value, axis: int, sizes: list[int | ir.Value]) -> ir.Value:
    shape = to.node.meta["val"].shape
    axis %= len(shape) - len(sizes) + 1
    known = list(sizes)
    for i, size in enumerate(sizes):
        if size == -1:
            if not isinstance(shape[axis + i], int):
                raise ExportError(f"{to.node} splits a dimension into parts of unknown size")
            known[i] = shape[axis + i]
    return _reshape(to, x, axis, known + _following(to, x, shape[axis + len(sizes) :], axis + 1))


def _flatten(to: _Translation, x: ir.Value, start: int = 0, end: int = -1) -> ir.Value:
    shape, before = to.node.meta["val"].shape, x.shape
    assert before is not None
    start, end = start % len(before), end % len(before)
    joined = shape[start]
    if isinstance(joined, int):
        return _reshape(to, x, start, [joined, *_following(to, x, shape[start + 1 :], end + 1)])
    rest = [size if isinstance(size, int) else _size(to, x, end + 1 + i) for i, size in enumerate(shape[start + 1 :])]
    return _reshape(to, x, start, [-1, *rest])


def _following(to: _Translation, x: ir.Value, shape: Sequence[Any], axis: int) -> list[int | ir.Value]:
    """Return the last dimensions of a reshape, those of x from ``axis`` on. The last unknown one is -1."""
    unknown = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    return [
        size if isinstance(size, int) else -1 if i == unknown[-1] else _size(to, x, axis + i)
        for i, size in enumerate(shape)
    ]


def _size(to: _Translation, x: ir.Value, axis: int) -> ir.Value:
    """Return one dimension of x as a one-element tensor."""
    return to.helper("Shape", x, like=torch.int64, start=axis, end=axis + 1)


def _onnx_node(to: _Translation, inputs: list[ir.Value | None], spec: str, like: list[int]) -> Sequence[ir.Value]:
    node = json.loads(spec)
    results = to.append(node["op_type"], inputs, len(like), node["attributes"], node["domain"])
    for result, meta in zip(results, to.node.meta["val"], strict=True):
        to._typed(result, meta)
    if node["domain"]:
        to.graph.opset_imports[node["domain"]] = node["version"]
    return results


_aten = torch.ops.aten
_LOWERINGS: dict[Any, Callable[..., Any]] = {
    operator.getitem: lambda to, values, index: values[index],
    torch.ops.melt_export.onnx_node.default: _onnx_node,
    _aten.add.Tensor: _elementwise("Add"),
    _aten.arange.default: _arange,
    _aten.cat.default: lambda to, tensors, axis=0: to.emit("Concat", *tensors, axis=axis),
    _aten.chunk.default: _chunk,
    _aten.clamp.default: _clamp,
    _aten.div.Tensor: _elementwise("Div"),
    _aten.embedding.default: _embedding,
    _aten.flatten.using_ints: _flatten,
    _aten.full.default: _full,
    _aten.le.Tensor: _less_or_equal,
    _aten.linear.default: _linear,
    _aten.matmul.default: lambda to, left, right: to.emit("MatMul", left, right),
    _aten.mean.dim: _mean,
    _aten.mul.Tensor: _elementwise("Mul"),
    _aten.pow.Tensor_Scalar: _elementwise("Pow"),
    _aten.select.int: _select,
    _aten.sigmoid.default: _elementwise("Sigmoid"),
    _aten.silu.default: _silu,
    _aten.slice.Tensor: _slice,
    _aten.softmax.int: lambda to, x, axis: to.emit("Softmax", x, axis=axis),
    _aten.sqrt.default: _elementwise("Sqrt"),
    _aten.squeeze.dim: lambda to, x, axis: to.emit("Squeeze", x, to.constant([axis])),
    _aten.stack.default: _stack,
    _aten.sub.Tensor: _elementwise("Sub"),
    _aten.sym_size.int: _size,
    _aten.to.dtype: _cast,
    _aten.transpose.int: _transpose,
    _aten.unbind.int: _unbind,
    _aten.unflatten.int: _unflatten,
    _aten.unsqueeze.default: lambda to, x, axis: to.emit("Unsqueeze", x, to.constant([axis])),
    _aten.where.self: _where,
    _aten.where.ScalarOther: _where,
    _aten.zeros_like.default: _zeros_like,
}

"""Checkpoint weights in one external data file, shared by all graphs of a package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import torch
from melt_models.checkpoint import Weights
from onnx_ir import tensor_adapters

from ..errors import ExportError
from .cleanup import CHECKPOINT_NAME, TRANSPOSED
from .merge_matmuls import MERGED

# On a value that is computed from checkpoint weights: the function that computes it.
COMPUTED = "melt.computed"
WEIGHTS_FILE = "weights.data"
# Smaller constants stay inside the graph files.
_INLINE_BYTES = 4096


def attach_weights(models: list[ir.Model], weights: Weights, dtype: torch.dtype) -> None:
    """Give every weight without data a lazy tensor, which is read, cast and transposed when it is written."""
    for model in models:
        for value in model.graph.initializers.values():
            if COMPUTED in value.meta:
                value.const_value = computed_tensor(value, weights)
                continue
            name = value.meta.get(CHECKPOINT_NAME)
            if name is None:
                continue
            value.const_value = _tensor(value, weights, name, dtype)
            value.type = ir.TensorType(value.const_value.dtype)


def computed_tensor(value: ir.Value, weights: Weights) -> ir.TensorProtocol:
    """Return the lazy tensor of a value with COMPUTED metadata."""
    compute: Callable[[Weights], torch.Tensor] = value.meta[COMPUTED]

    def read() -> ir.TensorProtocol:
        tensor = compute(weights).contiguous()
        if value.dtype == ir.DataType.INT4:
            return ir.PackedTensor(tensor.numpy(), ir.DataType.INT4, shape=value.shape, name=value.name)  # type: ignore[arg-type]
        return tensor_adapters.TorchTensor(tensor, name=value.name)

    return ir.LazyTensor(read, dtype=value.dtype, shape=value.shape, name=value.name)  # type: ignore[arg-type]


def _tensor(value: ir.Value, weights: Weights, name: str, dtype: torch.dtype) -> ir.TensorProtocol:
    """Return a lazy tensor of the weight, or the weight itself if it is small."""

    def read() -> ir.TensorProtocol:
        tensor = read_weight(value, weights, dtype)
        if dtype != torch.float32 and not torch.isfinite(tensor).all():
            short, wider = ("fp16", "bf16 or fp32") if dtype == torch.float16 else ("bf16", "fp32")
            raise ExportError(f"tensor {name} has values beyond {short}'s range; export with --precision {wider}")
        return tensor_adapters.TorchTensor(tensor, name=value.name)

    assert value.shape is not None
    kind = tensor_adapters.from_torch_dtype(dtype)
    lazy = ir.LazyTensor(read, dtype=kind, shape=value.shape, name=value.name)
    return read() if lazy.nbytes < _INLINE_BYTES else lazy


def read_weight(value: ir.Value, weights: Weights, dtype: torch.dtype) -> torch.Tensor:
    """Read a weight in the graph's form: cast, transposed, and with merged weights side by side."""
    parts = value.meta.get(MERGED)
    if parts:
        assert value.shape is not None
        merged = torch.empty([int(size) for size in value.shape], dtype=dtype)  # type: ignore[arg-type]
        start = 0
        for part in parts:
            tensor = weights.tensor(part).t()
            merged[:, start : start + tensor.shape[1]] = tensor
            start += tensor.shape[1]
        return merged
    tensor = weights.tensor(value.meta[CHECKPOINT_NAME]).to(dtype)
    return tensor.t().contiguous() if value.meta.get(TRANSPOSED) else tensor


def write_weights(models: list[ir.Model], directory: Path, progress: Callable[[int], None] | None = None) -> None:
    """Write all large initializers to ``weights.data``; one that several graphs share is written once.

    ``progress`` is called with the size of each written tensor in bytes. Raises ExportError, OSError.
    """
    users = _users(models)
    tensors = [values[0].const_value for values in users.values()]

    def written(tensor: ir.TensorProtocol, _: object) -> None:
        if progress is not None:
            progress(tensor.nbytes)

    external = ir.external_data.convert_tensors_to_external(
        tensors,  # type: ignore[arg-type]
        directory,
        WEIGHTS_FILE,
        callback=written,
        max_workers=1,
        max_in_flight_bytes=1 << 28,
    )
    for tensor, values in zip(external, users.values(), strict=True):
        for value in values:
            value.const_value = _shaped(tensor, value)


def stored_bytes(models: list[ir.Model]) -> int:
    """Return the bytes that ``write_weights`` writes."""
    return sum(values[0].const_value.nbytes for values in _users(models).values() if values[0].const_value is not None)


def graph_bytes(model: ir.Model) -> int:
    """Return the bytes of a graph's file before ONNX Runtime fuses operators, within one percent. The model then refers
    to a weights file that is not there."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= _INLINE_BYTES:
            place = (WEIGHTS_FILE, 0, tensor.nbytes, tensor.dtype)
            value.const_value = ir.ExternalTensor(*place, shape=tensor.shape, name=str(value.name))  # type: ignore[arg-type]
    return ir.to_proto(model).ByteSize()


def _users(models: list[ir.Model]) -> dict[tuple[str, bool], list[ir.Value]]:
    """Return the large initializers, those that are one tensor in the file together."""
    users: dict[tuple[str, bool], list[ir.Value]] = {}
    for index, model in enumerate(models):
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            if value.const_value.nbytes < _INLINE_BYTES:
                continue
            name = value.meta.get(CHECKPOINT_NAME, f"{index}/{value.name}")
            users.setdefault((name, bool(value.meta.get(TRANSPOSED))), []).append(value)
    return users


def _shaped(tensor: ir.TensorProtocol, value: ir.Value) -> ir.TensorProtocol:
    """Return what lies in the file in the shape that a graph reads it in."""
    if value.shape == tensor.shape or not isinstance(tensor, ir.ExternalTensor):
        return tensor
    place = (tensor.location, tensor.offset, tensor.length, tensor.dtype)
    return ir.ExternalTensor(*place, shape=value.shape, name=str(value.name), base_dir=tensor.base_dir)  # type: ignore[arg-type]


def external_bytes(models: list[ir.Model]) -> int:
    """Return an upper bound of the bytes that ``write_weights`` writes, for a progress bar."""
    return sum(
        value.const_value.nbytes
        for model in models
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _INLINE_BYTES
    )

"""Each operator becomes ONNX nodes that compute the same at every size, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from melt_runtime.package.specs import TensorSpec
from torch import Tensor, nn

from melt_export.errors import ExportError
from melt_export.graph.trace import TracedGraph, _trace

GIVEN = TensorSpec("x", "float32", ("batch", 4, "chunk", 6))


class Compute(nn.Module):
    """A function as a module."""

    def __init__(self, compute: Callable[[Tensor], Tensor]):
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


def traced(module: nn.Module, dimensions: int) -> TracedGraph:
    result = TensorSpec("y", "float32", tuple(f"d{i}" for i in range(dimensions)))
    return _trace(module, 23, (GIVEN,), (result,), 1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.unflatten(1, (2, -1)),
        lambda x: x.unflatten(1, (2, 2)).flatten(2, 3),
        lambda x: x.flatten(1, 2).unflatten(1, (4, x.shape[2])),
        lambda x: x.flatten(0, 1),
        lambda x: x.flatten(2),
        lambda x: x.transpose(1, -1).flatten(-2),
        lambda x: x[:, :2, 1:, -3:],
        lambda x: torch.cat((x, x), dim=2)[:, :, : x.shape[2]],
        lambda x: torch.stack((x, x * 2)),
        lambda x: torch.stack((x,), dim=1),
        lambda x: torch.cat(x.chunk(2, dim=-1), dim=1),
        lambda x: x + torch.arange(x.shape[2]).unsqueeze(1),
        lambda x: torch.where(x[:, :1] <= x.select(1, 3).unsqueeze(1), x.clamp(0.25, 0.5), -1.0),
        lambda x: torch.zeros_like(x[:, :1]) + x.clamp(min=0.25),
        lambda x: (x @ x.transpose(-1, -2)).softmax(-1),
        lambda x: F.silu(x) / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda x: x.to(torch.int32).float() + 1,
    ],
)
def test_a_graph_computes_at_every_size_what_pytorch_does(compute: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    graph = traced(Compute(compute), compute(torch.zeros(2, 4, 3, 6)).dim())
    ir.save(graph.model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    for batch, chunk in ((2, 3), (1, 1), (5, 1), (1, 7)):
        x = 4 * torch.rand(batch, 4, chunk, 6)
        [found] = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), compute(x))


def test_an_unknown_operator_is_refused_by_its_name() -> None:
    with pytest.raises(ExportError, match=r"operator aten\.erfinv\.default"):
        traced(Compute(torch.erfinv), 4)


def test_a_weight_that_more_than_products_read_is_refused() -> None:
    module = nn.Linear(6, 6, bias=False)
    module.forward = lambda x: F.linear(x, module.weight) + module.weight[0]  # type: ignore[method-assign]
    with pytest.raises(ExportError, match="reads weight, which is stored transposed for a MatMul"):
        traced(module, 4)

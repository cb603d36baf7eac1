"""The exported loop step's norms: fused with the addition before them, and still what PyTorch computes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from melt_models.layers import RMSNorm
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import TensorSpec
from torch import Tensor, nn

from melt_export.graph.fuse_skip_norm import fuse_norms
from melt_export.graph.trace import _trace


class SumAndNorm(nn.Module):
    """A norm of a sum that is used again, and one that is not."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.first, self.second = RMSNorm(size, eps), RMSNorm(size, eps)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = a + b
        return self.first(total) + total, self.second(a)


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_a_fused_norm_computes_what_pytorch_does(tmp_path: Path, eps: float) -> None:
    module = SumAndNorm(16, eps)
    with torch.no_grad():
        for norm in (module.first, module.second):
            norm.weight.copy_(torch.linspace(-1, 2, 16))
    spec = [TensorSpec(name, "float32", ("batch", "chunk", 16)) for name in ("a", "b", "x", "y")]
    traced = _trace(module, 21, tuple(spec[:2]), tuple(spec[2:]), 2)
    for name, parameter in module.named_parameters():
        traced.model.graph.initializers[name].const_value = ir.Tensor(parameter.detach().numpy())
    fuse_norms(traced.model)
    path = tmp_path / "graph.onnx"
    ir.save(traced.model, path)
    found = kinds(path)
    assert found["SkipSimplifiedLayerNormalization"] == found["ReduceMean"] == 1

    inputs = [torch.randn(2, 3, 16), torch.randn(2, 3, 16)]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    got = session.run(None, dict(zip(("a", "b"), (x.numpy() for x in inputs), strict=True)))
    for mine, theirs in zip(got, module(*inputs), strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_every_norm_is_one_node_in_a_package(tiny_package: Path) -> None:
    package = Package.open(tiny_package)
    layers = package.manifest.model["num_hidden_layers"]
    found = kinds(package.path("loop_step"))
    assert (found["RMSNormalization"], found["SkipSimplifiedLayerNormalization"]) == (2 * layers + 1, 2 * layers)
    assert not found["ReduceMean"]
    assert not found["Pow"]

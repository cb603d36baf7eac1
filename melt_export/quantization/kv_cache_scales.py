"""What the numbers of a quantized cache stand for: in a package, and in the PyTorch that it is compared with.

A row's number is round(value / scale), in int8 as it is, in int4 with 8 added and two beside each other in a byte, the
first in its lower half (GroupQueryAttention, ONNX Runtime's contrib operators).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from melt_runtime.package.reader import Package
from numpy.typing import NDArray
from torch import Tensor

from .blocks import one_a_byte
from .options import BITS

PARTS = ("key", "value")
SCALE_INPUT = {"key": 12, "value": 13}  # of GroupQueryAttention


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes that own the caches, one a layer."""
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def scale_name(part: str, layer: int) -> str:
    """What the scales of a layer's "key" or "value" cache are called in the loop step."""
    return f"{part}_cache.{layer}.scales"


@dataclass(frozen=True)
class CacheNumbers:
    """What the numbers in quantized caches stand for. keys, values: the scales (layers, kv_heads, head_dim) float32."""

    bits: int
    keys: Tensor
    values: Tensor

    def scales(self, part: str) -> Tensor:
        """Of the "key" or the "value" caches."""
        return self.keys if part == "key" else self.values

    def rounded(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's caches make of rows (batch, kv_heads, rows, head_dim)."""
        return (
            rounded(key, self.keys[layer, :, None].to(key.device), self.bits),
            rounded(value, self.values[layer, :, None].to(value.device), self.bits),
        )

    def widened(self, part: str, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Stored rows (layers, kv_heads, rows, bytes) as (layers, kv_heads, rows, head_dim)."""
        rows = torch.from_numpy(stored)
        rows = one_a_byte(rows).float() - 8 if self.bits == 4 else rows.float()
        return (rows * self.scales(part)[:, :, None]).numpy()

    @classmethod
    def of(cls, package: Package) -> CacheNumbers | None:
        """Those of a package; None where its caches are not quantized."""
        if not package.manifest.cache:
            return None
        config, found = package.manifest.model, {}
        for node in attention_nodes(ir.load(package.path("loop_step"))):
            for at in SCALE_INPUT.values():
                found[str(node.inputs[at].name)] = initializer(node.inputs[at])  # type: ignore[union-attr]
        heads = int(config["num_key_value_heads"])
        keys, values = (
            torch.stack([found[scale_name(part, layer)] for layer in range(len(found) // 2)]).unflatten(1, (heads, -1))
            for part in PARTS
        )
        return cls(BITS[package.manifest.cache["kind"]], keys, values)


def rounded(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest values to ``rows`` that numbers of so many bits can stand for; scales broadcast to them."""
    most = 2 ** (bits - 1)
    return (rows / scales).round().clamp(-most, most - 1) * scales


def initializer(value: ir.Value | None) -> Tensor:
    """The numbers of an initializer, as float32."""
    assert value is not None
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().astype(np.float32))

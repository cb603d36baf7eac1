"""Scales of a quantized cache, in a package and in the PyTorch that it is compared with.

A stored value is round(value / scale): as it is in int8; in int4 with 8 added and two per byte, the first in its lower
half (GroupQueryAttention, ONNX Runtime's contrib operators).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from melt_runtime.package.reader import Package
from numpy.typing import NDArray
from torch import Tensor

from .blocks import unpack_nibbles
from .options import BITS

KEY_AND_VALUE = ("key", "value")
# Input indices of GroupQueryAttention.
CACHE_INPUT = {"key": 3, "value": 4}
SCALE_INPUT = {"key": 12, "value": 13}


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """Return the nodes that own the caches, one per layer."""
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def scale_name(cache: str) -> str:
    """Name the scales of a cache in the graph that owns it."""
    return f"{cache}.scales"


def cache_order(caches: Iterable[str]) -> list[str]:
    """Return the key caches among these in the order of a model's: those of prelude, coda and core, by layer."""

    def place(name: str) -> tuple[int, int]:
        stage = next((at for at, stage in enumerate(("prelude_", "coda_")) if name.startswith(stage)), 2)
        return stage, int(name.rsplit(".", 1)[1])

    return sorted((name for name in caches if "key_cache." in name), key=place)


@dataclass(frozen=True)
class CacheScales:
    """Scales of quantized caches. ``keys``, ``values``: (layers, kv_heads, head_dim) float32.

    Layers are those of prelude, coda and core, in the order of ``LoopedConfig.first_cache``.
    """

    bits: int
    keys: Tensor
    values: Tensor

    def scales(self, part: str) -> Tensor:
        """Return the scales of the "key" or the "value" caches."""
        return self.keys if part == "key" else self.values

    def rounded(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Round a layer's keys and values (batch, kv_heads, positions, head_dim) to what its caches can store."""
        return (
            rounded(key, self.keys[layer, :, None].to(key.device), self.bits),
            rounded(value, self.values[layer, :, None].to(value.device), self.bits),
        )

    def widened(self, part: str, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Dequantize stored positions (layers, kv_heads, positions, bytes) to (layers, kv_heads, positions,
        head_dim)."""
        rows = torch.from_numpy(stored)
        rows = unpack_nibbles(rows).float() - 8 if self.bits == 4 else rows.float()
        return (rows * self.scales(part)[:, :, None]).numpy()

    @classmethod
    def of(cls, package: Package) -> CacheScales | None:
        """Read a package's scales; None if its caches are not quantized."""
        if not package.manifest.cache:
            return None
        config, found = package.manifest.model, {}
        for graph in package.manifest.graphs:
            for node in attention_nodes(ir.load(package.path(graph))):
                for at in SCALE_INPUT.values():
                    found[str(node.inputs[at].name)] = initializer(node.inputs[at])  # type: ignore[union-attr]
        heads, order = int(config["num_key_value_heads"]), cache_order(s.input for s in package.manifest.caches)
        keys, values = (
            torch.stack([found[scale_name(name.replace("key", part))] for name in order]).unflatten(1, (heads, -1))
            for part in KEY_AND_VALUE
        )
        return cls(BITS[package.manifest.cache["kind"]], keys, values)


def rounded(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Round ``rows`` to the nearest multiples of ``scales`` that have so many bits. Scales broadcast."""
    most = 2 ** (bits - 1)
    return (rows / scales).round().clamp(-most, most - 1) * scales


def initializer(value: ir.Value | None) -> Tensor:
    """Return an initializer's values as float32."""
    assert value is not None
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().astype(np.float32))

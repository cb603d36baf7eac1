"""Matmuls in float32 or float64 over weights that stay in their stored type, so that a large bf16 checkpoint is never
copied."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BLOCK_BYTES = 4 << 20  # of a widened weight: what a processor's caches hold


@dataclass(frozen=True)
class Arithmetic:
    """Type of matmuls, and the ``order`` in which their terms are added: "stored", "reversed", or in two "halves"."""

    dtype: torch.dtype = torch.float32
    order: str = "stored"

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x (..., inputs) by weight (outputs, inputs)."""
        x = x.to(self.dtype)
        if weight.dtype == self.dtype or _rows(weight, self.dtype) >= len(weight):
            return self._product(x, weight.to(self.dtype))
        product = x.new_empty(*x.shape[:-1], len(weight))
        for rows, wide in widened_blocks(weight, self.dtype):
            product[..., rows] = self._product(x, wide)
        return product

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.order == "reversed":
            return F.linear(x.flip(-1), weight.flip(-1))
        if self.order == "halves":
            half = weight.shape[1] // 2
            return F.linear(x[..., :half], weight[:, :half]) + F.linear(x[..., half:], weight[:, half:])
        return F.linear(x, weight)


def _rows(weight: Tensor, dtype: torch.dtype) -> int:
    """Return how many rows of a weight make a block."""
    return max(1, _BLOCK_BYTES // max(1, weight[0].numel() * dtype.itemsize))


def widened_blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the rows of a weight (outputs, inputs) in ``dtype``, block by block; each block is overwritten by the next.

    A block stays in the processor's caches. A whole weight widened at once takes several times as long: new memory is
    cleared, filled and read again.
    """
    count = min(_rows(weight, dtype), len(weight))
    block = torch.empty(count, weight.shape[1], dtype=dtype, device=weight.device)
    for at in range(0, len(weight), count):
        part = weight[at : at + count]
        yield slice(at, at + len(part)), block[: len(part)].copy_(part)


FLOAT32, FLOAT64 = Arithmetic(), Arithmetic(torch.float64)
# Results of one model under these orders differ by float32 rounding alone.
ORDERS = (FLOAT32, Arithmetic(order="reversed"), Arithmetic(order="halves"))


class Float32Matmul(TorchFunctionMode):
    """Mode in which matmuls and embeddings have an arithmetic's type.

    Weights are widened block by block, when they are read, in forward and backward. Only a matmul's input gets a
    gradient.
    """

    def __init__(self, arithmetic: Arithmetic = FLOAT32):
        super().__init__()
        self.arithmetic = arithmetic

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(self.arithmetic, *args, **kwargs)
        result = func(*args, **kwargs)
        return result.to(self.arithmetic.dtype) if func is F.embedding else result


def _linear(arithmetic: Arithmetic, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = _Matmul.apply(arithmetic, input, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Matmul(torch.autograd.Function):
    """Multiply x (..., inputs) by weight (outputs, inputs) and add bias, without keeping the widened weight for the
    backward."""

    @staticmethod
    def forward(ctx: Any, arithmetic: Arithmetic, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        found = arithmetic.matmul(x, weight)
        return found if bias is None else found + bias.to(arithmetic.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        given = gradients[0]
        if weight.dtype == given.dtype:
            return None, given @ weight, None, None
        found = given.new_zeros(*given.shape[:-1], weight.shape[1])
        for rows, wide in widened_blocks(weight, given.dtype):
            found += given[..., rows] @ wide
        return None, found, None, None

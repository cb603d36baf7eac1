"""Matmuls in float32 or float64 over weights that stay in their stored type, so that a large bf16 checkpoint is never
copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Arithmetic:
    """Type of matmuls, and the ``order`` in which their terms are added: "stored", "reversed", or in two "halves"."""

    dtype: torch.dtype = torch.float32
    order: str = "stored"

    def matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply x (..., inputs) by weight (outputs, inputs)."""
        x, weight = x.to(self.dtype), weight.to(self.dtype)
        if self.order == "reversed":
            return F.linear(x.flip(-1), weight.flip(-1))
        if self.order == "halves":
            half = weight.shape[1] // 2
            return F.linear(x[..., :half], weight[:, :half]) + F.linear(x[..., half:], weight[:, half:])
        return F.linear(x, weight)


FLOAT32, FLOAT64 = Arithmetic(), Arithmetic(torch.float64)
# Results of one model under these orders differ by float32 rounding alone.
ORDERS = (FLOAT32, Arithmetic(order="reversed"), Arithmetic(order="halves"))


class Float32Matmul(TorchFunctionMode):
    """Mode in which matmuls and embeddings have an arithmetic's type.

    Weights are widened one at a time, when they are read, in forward and backward. Only a matmul's input gets a
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
        return None, gradients[0] @ weight.to(gradients[0].dtype), None, None

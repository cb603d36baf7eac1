"""Float32 or float64 arithmetic in PyTorch over weights that stay as they are stored, so that a large bf16 checkpoint
is never copied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Arithmetic:
    """What products are computed in. ``order``: of a sum's terms, "stored", "reversed", or in two "halves"."""

    dtype: torch.dtype = torch.float32
    order: str = "stored"

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., inputs) times weight (outputs, inputs)."""
        x, weight = x.to(self.dtype), weight.to(self.dtype)
        if self.order == "reversed":
            return F.linear(x.flip(-1), weight.flip(-1))
        if self.order == "halves":
            half = weight.shape[1] // 2
            return F.linear(x[..., :half], weight[:, :half]) + F.linear(x[..., half:], weight[:, half:])
        return F.linear(x, weight)


FLOAT32, FLOAT64 = Arithmetic(), Arithmetic(torch.float64)
# The same model in float32: what differs between these is rounding.
ORDERS = (FLOAT32, Arithmetic(order="reversed"), Arithmetic(order="halves"))


class Float32Matmul(TorchFunctionMode):
    """While it is entered, products and looked-up embeddings have an arithmetic's type; weights are widened one at a
    time, as they are read, forwards and backwards. Only a product's input gets a gradient."""

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
    found: Tensor = _Product.apply(arithmetic, input, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """x (..., inputs) times weight (outputs, inputs), plus bias; the widened weight is not kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, arithmetic: Arithmetic, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        found = arithmetic.product(x, weight)
        return found if bias is None else found + bias.to(arithmetic.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return None, gradients[0] @ weight.to(gradients[0].dtype), None, None

"""Float32 arithmetic in PyTorch over weights that stay as they are stored, so that a large bf16 checkpoint is never
copied."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class WideProducts(TorchFunctionMode):
    """While it is entered, products and looked-up embeddings are float32; weights are widened one at a time, as they
    are read, forwards and backwards. Only a product's input gets a gradient."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        result = func(*args, **kwargs)
        return result.float() if func is F.embedding else result


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = _Product.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Product(torch.autograd.Function):
    """x (..., inputs) times weight (outputs, inputs), plus bias; the widened weight is not kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.float(), None, None

"""Models whose weights have shapes but almost no memory, so that a large model is traced at no cost."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def with_placeholder_weights(model: M, dtype: torch.dtype) -> M:
    """Replace every parameter by one zero expanded to its shape, on the CPU, in ``dtype``. Returns the model.

    Shared parameters (a tied head) stay shared.
    """
    stretched: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in stretched:
                    zero = torch.zeros((), dtype=dtype).expand(parameter.shape)
                    stretched[id(parameter)] = nn.Parameter(zero, requires_grad=False)
                module._parameters[name] = stretched[id(parameter)]
    return model

"""GPTQ (arXiv 2210.17323): weights are quantized column by column, and each error is spread over the columns to
come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Blocks, best_scales, in_blocks, rounded
from .options import Grid

_DAMPING = 0.1  # share of the mean of a Hessian's diagonal: other texts differ from the calibration text
_ROWS_AT_ONCE = 2048  # of a weight: enough for fast matmuls, without a copy of a whole large head
_COLUMNS_ONE_BY_ONE = 16  # with fewer, calls would cost more than matmuls save


@dataclass(frozen=True)
class InverseHessian:
    """A Hessian's inverse in the form that GPTQ reads, for all weights that share the Hessian.

    - ``order``: (inputs,), the columns, largest diagonal first.
    - ``factor``: (inputs, inputs) float32, the ``inverse_factor`` of the Hessian in that order.
    - ``importance``: (inputs,) float32, the cost of an error in a column that the other columns cannot compensate.
    """

    order: Tensor
    factor: Tensor
    importance: Tensor

    @classmethod
    def of(cls, hessian: Tensor) -> InverseHessian | None:
        """Compute the inverse. hessian: (inputs, inputs), the sum of x x^T over a matmul's inputs x.

        None if all were zero.
        """
        diagonal = hessian.diagonal()
        mean = float(diagonal.double().mean())
        if not mean > 0:
            return None
        order = diagonal.argsort(descending=True)
        damped = hessian[order][:, order].double() / mean
        damped.diagonal().add_(_DAMPING)
        factor = inverse_factor(damped)
        importance = torch.empty(len(order))
        importance[order] = (1 / factor.square().sum(0)).float()  # the inverse's diagonal
        return cls(order, factor.float(), importance)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U the inverse of a symmetric positive definite matrix."""
    # With rows and columns in reverse, Cholesky gives R R^T for an upper triangular R: U is R's inverse.
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)


def gptq(weight: Tensor, inverse: InverseHessian, grid: Grid) -> Blocks:
    """Quantize a weight (outputs, inputs) so that the matmul's output errs little, not the weight itself.

    A block's scale is chosen first, by errors weighted with their importance.
    """
    return Blocks.stacked([_quantized(rows.float(), inverse, grid) for rows in weight.split(_ROWS_AT_ONCE)])


def _quantized(rows: Tensor, inverse: InverseHessian, grid: Grid) -> Blocks:
    """Quantize rows of a weight, (outputs, inputs)."""
    blocks = in_blocks(rows, grid.block)
    scales, zeros = best_scales(blocks, grid, in_blocks(inverse.importance[None], grid.block)[0])
    columns = rows.t()[inverse.order]
    steps, middles = (part.squeeze(-1).t().contiguous() for part in (scales, zeros))
    solve(columns, inverse.factor, steps, middles, (inverse.order // grid.block).tolist(), grid)
    numbers = zeros.expand(blocks.shape).flatten(1).clone()  # padding is zero, so its numbers are zero points
    numbers[:, inverse.order] = columns.t()
    return Blocks.of(numbers.view(blocks.shape), scales, zeros, grid, rows.shape[1])


def solve(columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, block_of: list[int], grid: Grid) -> None:
    """Replace a weight's ``columns`` (inputs, outputs) by their numbers.

    factor (inputs, inputs): of the Hessian's inverse, as ``inverse_factor`` gives it. scales, zeros
    (blocks, outputs); block_of: the block of each column.
    """
    errors = torch.empty_like(columns)
    pivots = factor.diagonal().tolist()

    def halve(start: int, end: int) -> None:
        """Quantize columns start to end, to which the errors of all columns before start have been added."""
        if end - start > _COLUMNS_ONE_BY_ONE:
            middle = (start + end) // 2
            halve(start, middle)
            columns[middle:end].addmm_(factor[start:middle, middle:end].t(), errors[start:middle], alpha=-1)
            halve(middle, end)
            return
        for at in range(start, end):
            column, scale, zero = columns[at], scales[block_of[at]], zeros[block_of[at]]
            number = rounded(column, scale, zero, grid)
            torch.sub(column, (number - zero).mul_(scale), out=errors[at]).div_(pivots[at])
            column.copy_(number)
            columns[at + 1 : end].addr_(factor[at, at + 1 : end], errors[at], alpha=-1)

    halve(0, len(columns))

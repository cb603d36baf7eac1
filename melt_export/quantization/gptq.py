"""GPTQ (arXiv 2210.17323): weights quantized column by column, each error spread over the columns still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Blocks, best_scales, in_blocks, round_to_nearest, rounded
from .options import Grid

_DAMPING = 0.1  # of the mean of a Hessian's diagonal: the text that comes is not the one that was seen
_ROWS_AT_ONCE = 2048  # of a weight: enough for fast matmuls, and a large head is never copied as a whole
_COLUMNS_ONE_BY_ONE = 16  # fewer would make more calls than matmuls save


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> Blocks:
    """Quantizes a weight (outputs, inputs) so that the matmul's output errs little, not the weight itself.

    hessian (inputs, inputs): the sum of x x^T over the inputs x of the matmul. Columns that matter most go first;
    a block's scale is chosen before, by errors weighted with what the other columns cannot make up for.
    """
    inputs = weight.shape[1]
    diagonal = hessian.diagonal()
    mean = float(diagonal.double().mean())
    if not mean > 0:
        return round_to_nearest(weight, grid)  # nothing ever came in
    order = diagonal.argsort(descending=True)
    damped = hessian[order][:, order].double() / mean
    damped.diagonal().add_(_DAMPING)
    factor = inverse_factor(damped)
    importance = torch.empty(inputs)
    importance[order] = (1 / factor.square().sum(0)).float()  # the inverse's diagonal
    weights = in_blocks(importance[None], grid.block)[0]
    narrow = factor.float()
    return Blocks.stacked(
        [_quantized(rows.float(), order, narrow, weights, grid) for rows in weight.split(_ROWS_AT_ONCE)]
    )


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of a symmetric positive definite matrix."""
    # With rows and columns in reverse, Cholesky gives R R^T for an upper triangular R: U is R's inverse.
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)


def _quantized(rows: Tensor, order: Tensor, factor: Tensor, importance: Tensor, grid: Grid) -> Blocks:
    """rows (outputs, inputs); order (inputs,) of the columns, as in ``factor``; importance (blocks, block)."""
    inputs = rows.shape[1]
    blocks = in_blocks(rows, grid.block)
    scales, zeros = best_scales(blocks, grid, importance)
    columns = rows.t()[order]
    block_of = (order // grid.block).tolist()
    steps, middles = (part.squeeze(-1).t().contiguous() for part in (scales, zeros))
    solve(columns, factor, steps, middles, block_of, grid)
    numbers = zeros.expand(blocks.shape).flatten(1).clone()  # padding means zero, whatever number stands for it
    numbers[:, order] = columns.t()
    return Blocks.of(numbers.view(blocks.shape), scales, zeros, grid, inputs)


def solve(columns: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, block_of: list[int], grid: Grid) -> None:
    """Replaces a weight's ``columns`` (inputs, outputs) by their numbers.

    factor (inputs, inputs): of the Hessian's inverse, as ``inverse_factor`` gives it. scales, zeros
    (blocks, outputs); block_of: the block of each column.
    """
    errors = torch.empty_like(columns)
    pivots = factor.diagonal().tolist()

    def halve(start: int, end: int) -> None:
        """Columns start to end, which have taken up the errors of all columns before start."""
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

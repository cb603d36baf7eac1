"""Weights as whole numbers in blocks with a scale each: rounded to nearest, or with the errors made up for (GPTQ)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Shares of a block's largest value that a scale may stand for: rounding errs less when it clips a little.
_SHRINK = tuple(1 - step / 50 for step in range(15))
_ELEMENTS_AT_ONCE = 1 << 18  # what is searched at a time stays in a processor's cache
_DAMPING = 0.01  # of the mean of a Hessian's diagonal
_COLUMNS_AT_ONCE = 128


@dataclass(frozen=True)
class Blocks:
    """A weight (outputs, inputs): ``numbers`` uint8 (outputs, blocks, block) from 0 to 2 ** bits - 1, of which
    2 ** (bits - 1) means zero; ``scales`` float32 (outputs, blocks). The last block is padded with zeros."""

    numbers: Tensor
    scales: Tensor
    bits: int
    inputs: int

    def values(self) -> Tensor:
        """What the weight is multiplied as: float32 (outputs, inputs)."""
        wide = (self.numbers.float() - (1 << (self.bits - 1))) * self.scales[..., None]
        return wide.flatten(1)[:, : self.inputs]

    def packed(self) -> Tensor:
        """The numbers as MatMulNBits reads them: uint8 (outputs, blocks, block * bits / 8), low bits first."""
        if self.bits == 8:
            return self.numbers
        return two_a_byte(self.numbers)

    @classmethod
    def unpacked(cls, packed: Tensor, scales: Tensor, bits: int, inputs: int) -> Blocks:
        """What ``packed`` made, read back."""
        if bits == 4:
            packed = one_a_byte(packed)
        return cls(packed, scales.reshape(packed.shape[:2]), bits, inputs)


def two_a_byte(numbers: Tensor) -> Tensor:
    """uint8 (..., count) with 4 bits each -> (..., count / 2), the first of two in the lower half."""
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


def one_a_byte(packed: Tensor) -> Tensor:
    """What ``two_a_byte`` put together, apart."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def round_to_nearest(weight: Tensor, bits: int, block: int, positive: bool = False) -> Blocks:
    """Quantizes a weight (outputs, inputs), each block with the scale, of a few, that errs least in the square.

    positive: whether scales must be, for whoever reads no others; it costs a little range.
    """
    outputs, inputs = weight.shape
    count = -(-inputs // block)
    numbers = torch.empty(outputs, count, block, dtype=torch.uint8)
    scales = torch.empty(outputs, count)
    step = max(1, _ELEMENTS_AT_ONCE // inputs)
    for at in range(0, outputs, step):
        rows = _in_blocks(weight[at : at + step].float(), block)
        found = _best_scales(rows, bits, torch.ones(count, block), positive)
        numbers[at : at + step] = (_rounded(rows, found, bits) + (1 << (bits - 1))).to(torch.uint8)
        scales[at : at + step] = found.squeeze(-1)
    return Blocks(numbers, scales, bits, inputs)


def gptq(weight: Tensor, hessian: Tensor, bits: int, block: int, positive: bool = False) -> Blocks:
    """Quantizes a weight (outputs, inputs) column by column, each error spread over the columns still to come.

    hessian (inputs, inputs): the sum of x x^T over the inputs x of the product. Columns that matter most go first;
    a block's scale is chosen before, by the error weighted with the Hessian's diagonal. positive: as in
    ``round_to_nearest``. GPTQ: arXiv 2210.17323.
    """
    outputs, inputs = weight.shape
    diagonal = hessian.diagonal().double()
    mean = float(diagonal.mean())
    if not mean > 0:
        return round_to_nearest(weight, bits, block, positive)  # nothing ever came in
    importance = _in_blocks((diagonal / mean).float()[None], block)[0] + _DAMPING
    rows = _in_blocks(weight.float(), block)
    scales = _best_scales(rows, bits, importance, positive)
    spread = scales.expand(rows.shape).flatten(1)[:, :inputs]

    order = diagonal.argsort(descending=True)
    damped = hessian.double()[order][:, order]
    damped.diagonal().add_(_DAMPING * mean)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, steps = weight.float()[:, order], spread[:, order].contiguous()
    chosen = torch.empty_like(left)
    for start in range(0, inputs, _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, inputs)
        errors = torch.empty(outputs, end - start)
        for column in range(start, end):
            number = _rounded(left[:, column], steps[:, column], bits)
            error = (left[:, column] - number * steps[:, column]) / factor[column, column]
            left[:, column:end] -= error[:, None] * factor[column, column:end]
            chosen[:, column], errors[:, column - start] = number, error
        left[:, end:] -= errors @ factor[start:end, end:]
    numbers = torch.empty_like(chosen)
    numbers[:, order] = chosen
    stored = (_in_blocks(numbers, block) + (1 << (bits - 1))).to(torch.uint8)
    return Blocks(stored, scales.squeeze(-1), bits, inputs)


def _in_blocks(rows: Tensor, block: int) -> Tensor:
    """(outputs, inputs) -> (outputs, blocks, block), padded with zeros."""
    count = -(-rows.shape[1] // block)
    return nn.functional.pad(rows, (0, count * block - rows.shape[1])).unflatten(1, (count, block))


def _best_scales(rows: Tensor, bits: int, importance: Tensor, positive: bool) -> Tensor:
    """Scales (outputs, blocks, 1). The largest value goes to the side that has one number more, unless positive."""
    extreme = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    widest = extreme.abs() / ((1 << (bits - 1)) - 1) if positive else extreme / -(1 << (bits - 1))
    best = torch.where(extreme == 0, 1.0, widest)
    if bits == 8:
        return best
    least, widest = torch.full_like(extreme, float("inf")), best
    for shrink in _SHRINK:
        scale = widest * shrink
        error = ((_rounded(rows, scale, bits) * scale - rows).square() * importance).sum(-1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best


def _rounded(rows: Tensor, scale: Tensor, bits: int) -> Tensor:
    zero = 1 << (bits - 1)
    return (rows / scale).round().clamp(-zero, zero - 1)

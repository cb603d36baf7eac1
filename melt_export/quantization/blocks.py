"""Weights as whole numbers in blocks that share a scale: their storage, their scales, and rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .options import Grid

# Factors on the scale that are tried: clipping the largest values a little may reduce the error.
_SHRINK = tuple(1 - step / 50 for step in range(15))
_ELEMENTS_AT_ONCE = 1 << 18  # searched at a time, so that they stay in the processor's cache


@dataclass(frozen=True)
class Blocks:
    """A quantized weight (outputs, inputs).

    - ``numbers``: uint8 (outputs, blocks, block), from 0 to 2 ** bits - 1; the last block is padded with zero points.
    - ``scales``: float32 (outputs, blocks).
    - ``zeros``: the zero points, uint8 (outputs, blocks); None: 2 ** (bits - 1) everywhere.
    """

    numbers: Tensor
    scales: Tensor
    bits: int
    inputs: int
    zeros: Tensor | None = None

    def values(self) -> Tensor:
        """Dequantize to float32 (outputs, inputs)."""
        zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None].float()
        return ((self.numbers.float() - zeros) * self.scales[..., None]).flatten(1)[:, : self.inputs]

    def packed(self) -> Tensor:
        """Return the numbers in MatMulNBits' form: uint8 (outputs, blocks, block * bits / 8), low bits first."""
        return self.numbers if self.bits == 8 else pack_nibbles(self.numbers)

    def packed_zeros(self) -> Tensor:
        """Return the zero points in MatMulNBits' form: uint8 (outputs, blocks * bits / 8, rounded up), low bits
        first."""
        assert self.zeros is not None
        if self.bits == 8:
            return self.zeros
        return pack_nibbles(nn.functional.pad(self.zeros, (0, self.zeros.shape[1] % 2)))

    @classmethod
    def of(cls, numbers: Tensor, scales: Tensor, zeros: Tensor, grid: Grid, inputs: int) -> Blocks:
        """Build from float32 tensors. numbers: (outputs, blocks, block); scales, zeros: (outputs, blocks, 1)."""
        kept = zeros.squeeze(-1).to(torch.uint8) if grid.asymmetric else None
        return cls(numbers.to(torch.uint8), scales.squeeze(-1), grid.bits, inputs, kept)

    @classmethod
    def stacked(cls, parts: list[Blocks]) -> Blocks:
        """Concatenate weights of the same inputs and grid along the outputs."""
        numbers, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("numbers", "scales"))
        zeros = [part.zeros for part in parts if part.zeros is not None]
        return cls(numbers, scales, parts[0].bits, parts[0].inputs, torch.cat(zeros) if zeros else None)

    @classmethod
    def unpacked(cls, packed: Tensor, scales: Tensor, bits: int, inputs: int, zeros: Tensor | None = None) -> Blocks:
        """Read back what ``packed`` and ``packed_zeros`` returned."""
        if bits == 4:
            packed, zeros = unpack_nibbles(packed), None if zeros is None else unpack_nibbles(zeros)
        outputs, blocks = packed.shape[:2]
        zeros = None if zeros is None else zeros.reshape(outputs, -1)[:, :blocks]
        return cls(packed, scales.reshape(outputs, blocks), bits, inputs, zeros)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """Pack 4-bit numbers, uint8 (..., count), into (..., count / 2), the first of two in the lower half of a byte."""
    return numbers[..., ::2] | (numbers[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Unpack what ``pack_nibbles`` packed."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def round_to_nearest(weight: Tensor, grid: Grid) -> Blocks:
    """Quantize a weight (outputs, inputs) by rounding.

    Each block gets the scale, of a few, with the least squared error.
    """
    found = []
    for some in weight.split(max(1, _ELEMENTS_AT_ONCE // weight.shape[1])):
        rows = in_blocks(some.float(), grid.block)
        scales, zeros = best_scales(rows, grid, torch.ones(rows.shape[1:]))
        found.append(Blocks.of(rounded(rows, scales, zeros, grid), scales, zeros, grid, weight.shape[1]))
    return Blocks.stacked(found)


def rounding_error(weight: Tensor, grid: Grid) -> float:
    """Estimate the mean squared error of rounding a weight (outputs, inputs) to a symmetric grid."""
    steps = torch.linalg.vector_norm(in_blocks(weight.float(), grid.block), torch.inf, dim=-1) / grid.middle
    return float(steps.square().mean()) / 12


def in_blocks(rows: Tensor, block: int) -> Tensor:
    """Split (outputs, inputs) into (outputs, blocks, block), padded with zeros."""
    count = -(-rows.shape[1] // block)
    missing = count * block - rows.shape[1]
    return (nn.functional.pad(rows, (0, missing)) if missing else rows).unflatten(1, (count, block))


def best_scales(rows: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and zero points, both float32 (outputs, blocks, 1).

    ``importance`` (blocks, block) weights the squared errors. With a symmetric grid the largest value takes the side
    with one number more, unless scales must be positive.
    """
    if grid.asymmetric:
        low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
        widest = (high - low) / grid.top
        zero = torch.where(widest == 0, 0.0, (-low / widest).round())
    else:
        extreme = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        widest = extreme.abs() / (grid.middle - 1) if grid.positive else extreme / -grid.middle
        zero = torch.full_like(widest, grid.middle)
    best = widest = torch.where(widest == 0, 1.0, widest)
    if grid.bits == 8:
        return best, zero
    least, wide = torch.full_like(widest, float("inf")), torch.empty_like(rows)
    for shrink in _SHRINK:
        scale = widest * shrink
        rounded(rows, scale, zero, grid, out=wide).sub_(zero).mul_(scale)
        error = wide.sub_(rows).square_().mul_(importance).sum(-1, keepdim=True)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
    return best, zero


def rounded(rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid, out: Tensor | None = None) -> Tensor:
    """Round to the nearest numbers, as float32.

    ``out`` is the memory for them: allocating it costs more than the arithmetic.
    """
    return torch.div(rows, scale, out=out).add_(zero).round_().clamp_(0, grid.top)

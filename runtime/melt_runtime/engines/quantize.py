"""Weights stored in fewer bits than they are multiplied in, as numpy: the arithmetic before a DequantizeLinear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCKS = (128, 32)
_SMALLEST_SCALE = np.float32(2.0**-16)  # float16 still holds it well; only a block of zeros comes down to it
_FP8_MAX = 448.0  # the largest finite value of E4M3


@dataclass(frozen=True)
class Quantized:
    """A weight (in, out): ``data`` as stored, two values a byte for int4, the first in the low bits; ``scales``
    float32, (in / block, out) for int4 and (out,) for int8 and fp8."""

    kind: str
    shape: tuple[int, int]
    data: NDArray[np.uint8]
    scales: NDArray[np.float32]


def block_size(inputs: int) -> int | None:
    """128 or 32, whichever divides the number of inputs; None where neither does."""
    return next((block for block in _BLOCKS if inputs % block == 0), None)


def worth_it(shape: tuple[int, ...], kind: str) -> bool:
    """Whether a weight of this shape is quantized: a matrix whose sizes fit, and no vector in disguise."""
    if len(shape) != 2 or min(shape) < _BLOCKS[-1] or shape[1] % 2:
        return False
    return kind != "int4" or block_size(shape[0]) is not None


def quantize(weight: NDArray[np.float32], kind: str, scale_dtype: str) -> Quantized:
    """A weight (in, out) -> "int4" in blocks along its inputs, "int8" or "fp8" with a scale for each output.

    Symmetric and rounded to nearest against the scale as ``scale_dtype`` ("float16" or "bfloat16") will hold it.
    """
    inputs, outputs = weight.shape
    block = block_size(inputs) if kind == "int4" else inputs
    assert block is not None
    blocks = weight.reshape(inputs // block, block, outputs)
    limit = {"int4": 7.0, "int8": 127.0, "fp8": _FP8_MAX}[kind]
    scales = rounded(np.maximum(np.abs(blocks).max(axis=1) / limit, _SMALLEST_SCALE), scale_dtype)
    scaled = (blocks / scales[:, None]).reshape(inputs, outputs)
    if kind == "fp8":
        data = fp8(scaled)
    else:
        low = -8.0 if kind == "int4" else -127.0
        data = np.clip(np.rint(scaled), low, limit).astype(np.int8).view(np.uint8)
        if kind == "int4":
            pairs = data.reshape(-1, 2) & 15
            data = pairs[:, 0] | (pairs[:, 1] << 4)
    return Quantized(kind, (inputs, outputs), np.ascontiguousarray(data), scales if kind == "int4" else scales[0])


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """float32 values as float16 or bfloat16 would hold them."""
    if dtype == "bfloat16":
        return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype).astype(np.float32)


def stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """float32 values in a dtype's own bytes."""
    return bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of finite values in bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fp8_values() -> NDArray[np.float32]:
    """What the E4M3 codes 0 to 126 mean: all its finite values from 0 up."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)).astype(
        np.float32
    )


def fp8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest E4M3 codes; beyond its range the largest."""
    table = fp8_values()
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, np.abs(values)).astype(np.uint8)
    return np.where(np.signbit(values), codes | np.uint8(128), codes)

"""Weight quantization in NumPy, for weights that are dequantized before they are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCKS = (128, 32)
_SMALLEST_SCALE = np.float32(2.0**-16)  # normal in float16; only an all-zero block reaches it
_FP8_MAX = 448.0  # the largest finite value of E4M3


@dataclass(frozen=True)
class Quantized:
    """A quantized weight (in, out).

    ``data``: as stored; for int4 two values per byte, the first in the low bits. ``scales``: float32, (in / block, out)
    for int4, (out,) for int8 and fp8.
    """

    kind: str
    shape: tuple[int, int]
    data: NDArray[np.uint8]
    scales: NDArray[np.float32]


def block_size(inputs: int) -> int | None:
    """Return 128 or 32, whichever divides the number of inputs, or None."""
    return next((block for block in _BLOCKS if inputs % block == 0), None)


def worth_it(shape: tuple[int, ...], kind: str) -> bool:
    """Return whether to quantize a weight of this shape: a matrix of suitable sizes."""
    if len(shape) != 2 or min(shape) < _BLOCKS[-1] or shape[1] % 2:
        return False
    return kind != "int4" or block_size(shape[0]) is not None


def quantize(weight: NDArray[np.float32], kind: str, scale_dtype: str) -> Quantized:
    """Quantize a weight (in, out): "int4" in blocks along the inputs, "int8" or "fp8" with a scale per output.

    Symmetric, rounded to nearest, with scales as ``scale_dtype`` ("float16" or "bfloat16") represents them.
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
    """Round float32 values to float16 or bfloat16, and return them as float32."""
    if dtype == "bfloat16":
        return (bfloat16_bits(values).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype).astype(np.float32)


def stored(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return float32 values in the storage of a dtype."""
    return bfloat16_bits(values) if dtype == "bfloat16" else values.astype(dtype)


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bfloat16 bits of finite values, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def fp8_values() -> NDArray[np.float32]:
    """Return the values of the E4M3 codes 0 to 126: all finite values from 0 up."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)).astype(
        np.float32
    )


def fp8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the nearest E4M3 codes; values out of range become the largest."""
    table = fp8_values()
    codes = np.searchsorted((table[1:] + table[:-1]) / 2, np.abs(values)).astype(np.uint8)
    return np.where(np.signbit(values), codes | np.uint8(128), codes)

"""Options of quantization. Importing this does not import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ExportError

BITS = {"int4": 4, "int8": 8}
METHODS = ("rtn", "gptq")
BLOCKS = (16, 32, 64, 128)
# Types of the activations that ONNX Runtime's CPU kernels multiply quantized weights with.
ACTIVATIONS = ("int8", "float")
_USUAL_SHARE = 0.1


@dataclass(frozen=True)
class Grid:
    """Quantized values of a block, whole numbers from 0 to ``top``, and how its scale is chosen.

    - ``bits``: 4 or 8.
    - ``block``: number of inputs that share a scale.
    - ``positive``: whether scales must be positive, as TensorRT needs; this costs a little range.
    - ``asymmetric``: whether each block has a zero point of its own.
    """

    bits: int
    block: int
    positive: bool = False
    asymmetric: bool = False

    @property
    def top(self) -> int:
        """The largest quantized value; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of symmetric blocks."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class WeightOptions:
    """How weights are quantized. Raises ExportError.

    - ``kind``: "int4" or "int8".
    - ``block``: number of inputs that share a scale; see ``for_embedding``.
    - ``head``: kind of the output head, which is read once per token; in 4 bits it loses more than it saves.
    - ``keep``: patterns (``*``) of checkpoint names that are not quantized.
    - ``int8``: patterns of checkpoint names that get 8 bits whatever ``kind`` is, as do weights merged with them.
    - ``int8_share``: share by which the loop's weights may grow to store in 8 bits those that lose most in 4 (None: 0.1
      for int4 with "gptq" and without ``int8``, else 0).
    - ``method``: "rtn" (rounded to nearest) or "gptq" (calibrated).
    - ``calibration``: UTF-8 text for "gptq"; None: Python's documentation.
    - ``asymmetric``: whether blocks of 4 bits have a zero point each.
    - ``activations``: what the weights are multiplied with on the CPU: "int8", rounded in blocks, is fast; "float"
      leaves them unrounded.
    """

    kind: str
    block: int = 32
    head: str = "int8"
    embedding: str | None = None
    keep: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()
    method: str = "gptq"
    calibration: Path | None = None
    int8_share: float | None = None
    asymmetric: bool = False
    activations: str = "int8"

    def __post_init__(self) -> None:
        if self.kind not in BITS or self.head not in BITS:
            raise ExportError(f"weights {self.kind!r} are not one of {', '.join(BITS)}")
        if self.embedding is not None and self.embedding not in BITS:
            raise ExportError(f"embedding {self.embedding!r} is not one of {', '.join(BITS)}")
        if self.activations not in ACTIVATIONS:
            raise ExportError(f"activations {self.activations!r} are not one of {', '.join(ACTIVATIONS)}")
        if self.method not in METHODS:
            raise ExportError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.calibration is not None and self.method != "gptq":
            raise ExportError("only the method gptq reads a calibration text")
        if self.block not in BLOCKS:
            raise ExportError(f"block is {self.block}; it must be one of {', '.join(map(str, BLOCKS))}")
        if self.asymmetric and self.kind != "int4":
            raise ExportError(f"asymmetric blocks need int4 weights; {self.kind} would gain nothing from them")
        if self.int8_share is not None and not 0 <= self.int8_share <= 1:
            raise ExportError(f"int8 share is {self.int8_share:g}; it must be from 0 to 1")
        if self.int8_share and (self.kind, self.method) != ("int4", "gptq"):
            raise ExportError(
                "an int8 share needs int4 weights and the method gptq, which measures which weights need more bits"
            )

    @property
    def share(self) -> float:
        """``int8_share`` with its default filled in."""
        if self.int8_share is None:
            return _USUAL_SHARE if (self.kind, self.method) == ("int4", "gptq") and not self.int8 else 0.0
        return self.int8_share

    def grid(self, bits: int, *, positive: bool = False) -> Grid:
        """Return the grid of weights with so many bits."""
        return Grid(bits, self.block, positive, self.asymmetric and bits == BITS["int4"])

    def for_embedding(self, hidden_size: int) -> WeightOptions:
        """Return the options of a quantized embedding, whose rows are whole blocks: the largest that fit, up to
        ``block``. Raises ExportError if none does.

        A tied head of as many bits shares these blocks.
        """
        fitting = [block for block in BLOCKS if block <= self.block and hidden_size % block == 0]
        if not fitting:
            raise ExportError(
                f"hidden_size is {hidden_size}, no multiple of a block of {BLOCKS[0]}: leave the embedding in float16"
            )
        return replace(self, block=fitting[-1])

    def record(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return {
            "kind": self.kind,
            "block": self.block,
            "head": self.head,
            "embedding": self.embedding or "float16",
            "method": self.method,
            "keep": list(self.keep),
            "int8": list(self.int8),
            "int8_share": self.share,
            "asymmetric": self.asymmetric,
            "activations": self.activations,
            "calibration": self.calibration.name if self.calibration else None,
        }


@dataclass(frozen=True)
class CacheOptions:
    """How caches are quantized. Raises ExportError.

    - ``kind``: "int8" or "int4".
    - ``calibration``: UTF-8 text for the scales; None: Python's documentation.
    """

    kind: str
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise ExportError(f"cache {self.kind!r} is not one of {', '.join(BITS)}")

    def record(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return {"kind": self.kind, "calibration": self.calibration.name if self.calibration else None}

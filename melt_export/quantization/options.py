"""How weights and caches are quantized. Read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ExportError

BITS = {"int4": 4, "int8": 8}
METHODS = ("rtn", "gptq")
BLOCKS = (16, 32, 64, 128)
# What ONNX Runtime's CPU kernels multiply quantized weights with.
ACTIVATIONS = ("int8", "float")
_USUAL_SHARE = 0.1


@dataclass(frozen=True)
class Grid:
    """What a block's numbers may be and how they are chosen. ``bits``: 4 or 8; ``block``: inputs that share a scale;
    ``positive``: whether scales must be, for whoever reads no others: it costs a little range; ``asymmetric``: whether
    each block says which of its numbers means zero."""

    bits: int
    block: int
    positive: bool = False
    asymmetric: bool = False

    @property
    def top(self) -> int:
        """The largest number; the smallest is 0."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The number that means zero where blocks do not say."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class WeightOptions:
    """How products are stored. ``kind``: "int4" or "int8"; ``block``: inputs that share a scale; ``head``: of the
    output head, which is read once a token and spoils more than it saves in 4 bits; ``keep``: patterns (``*``) of
    checkpoint names that stay as they are; ``int8``: patterns of those that have 8 bits whatever ``kind`` says, and
    with them what is packed beside them; ``int8_share``: by which share the loop's products may grow so that those that
    suffer most from 4 bits have 8 (None: 0.1, where they are measured and not named by ``int8``); ``method``: "rtn"
    (rounded to nearest) or "gptq" (calibrated on ``calibration``, a UTF-8 text; None: Python's documentation);
    ``asymmetric``: whether blocks of 4 bits say which number means zero; ``activations``: what the weights are
    multiplied with on the CPU: "int8", rounded in blocks, which is fast, or "float", as they are. Raises ExportError.
    """

    kind: str
    block: int = 32
    head: str = "int8"
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
        if self.activations not in ACTIVATIONS:
            raise ExportError(f"activations {self.activations!r} are not one of {', '.join(ACTIVATIONS)}")
        if self.method not in METHODS:
            raise ExportError(f"method {self.method!r} is not one of {', '.join(METHODS)}")
        if self.calibration is not None and self.method != "gptq":
            raise ExportError("only the method gptq reads a calibration text")
        if self.block not in BLOCKS:
            raise ExportError(f"block is {self.block}; it must be one of {', '.join(map(str, BLOCKS))}")
        if self.asymmetric and self.kind != "int4":
            raise ExportError(f"asymmetric blocks are of int4 weights; {self.kind} would gain nothing from them")
        if self.int8_share is not None and not 0 <= self.int8_share <= 1:
            raise ExportError(f"int8 share is {self.int8_share:g}; it must be from 0 to 1")
        if self.int8_share and (self.kind, self.method) != ("int4", "gptq"):
            raise ExportError(
                "an int8 share is of int4 weights and the method gptq, which measures what needs more bits"
            )

    @property
    def share(self) -> float:
        """``int8_share``, or what stands for None."""
        if self.int8_share is None:
            return _USUAL_SHARE if (self.kind, self.method) == ("int4", "gptq") and not self.int8 else 0.0
        return self.int8_share

    def grid(self, bits: int, *, positive: bool = False) -> Grid:
        """How numbers of so many bits are chosen."""
        return Grid(bits, self.block, positive, self.asymmetric and bits == BITS["int4"])

    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {
            "kind": self.kind,
            "block": self.block,
            "head": self.head,
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
    """How rows are stored. ``kind``: "int8" or "int4"; ``calibration``: a UTF-8 text for the scales; None: Python's
    documentation. Raises ExportError."""

    kind: str
    calibration: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in BITS:
            raise ExportError(f"cache {self.kind!r} is not one of {', '.join(BITS)}")

    def record(self) -> dict[str, Any]:
        """As the manifest has it."""
        return {"kind": self.kind, "calibration": self.calibration.name if self.calibration else None}

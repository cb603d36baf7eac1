"""Options of an export, checked against each other. Importing this does not import PyTorch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from melt_runtime.package.specs import DIALECTS, MAX_BATCH, PRECISIONS
from melt_runtime.untrusted import MOST_SIZE

from .errors import ExportError
from .quantization.options import CacheOptions, WeightOptions

SHARED = ("last",)
_EXIT = re.compile(r"auto:(\d{1,4}(?:\.\d{1,6})?)(%|pt)")


@dataclass(frozen=True)
class ExitOptions:
    """The quality that an early exit must keep, as ``--exit`` spells it.

    ``quality``: "auto:0.5%", the most by which the perplexity may grow, or "auto:1pt", the most points (of 100) of
    answers or next tokens that may differ from those of all loops. ``text``: what to measure on, UTF-8 text or, if it
    ends in .jsonl, problems; None: a built-in text.
    """

    quality: str
    text: Path | None = None

    def __post_init__(self) -> None:
        found = _EXIT.fullmatch(self.quality)
        if found is None:
            raise ExportError(
                f"--exit is {self.quality!r}; it must be auto:N% (perplexity) or auto:Npt (points of agreement), such "
                "as auto:0.5% or auto:1pt"
            )
        if self.most > 100 and self.unit == "pt":
            raise ExportError(f"--exit is {self.quality!r}; agreement has 100 points")

    @property
    def most(self) -> float:
        """The most that may be lost, in ``unit``: "%" or "pt"."""
        return float(self._parts[0])

    @property
    def unit(self) -> str:
        return self._parts[1]

    @property
    def _parts(self) -> tuple[str, str]:
        found = _EXIT.fullmatch(self.quality)
        assert found is not None
        return found.group(1), found.group(2)


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    - ``max_seq_len`` None: the checkpoint's positions, up to 4,096.
    - ``chunk`` None: the checkpoint's chunk size.
    - ``weights``, ``cache`` None: not quantized.
    - ``share_caches`` "last": a model that was trained with caches per loop rewrites one cache per layer, so that the
      last loop counts. ``eval_text``: what its loss is measured on (UTF-8); None: a built-in text.
    - ``exit``: the quality that tokens may lose by leaving the loops early; None: the exit is not calibrated.
    """

    precision: str = "fp32"
    dialect: str = "onnxruntime"
    max_seq_len: int | None = None
    max_batch: int = 8
    chunk: int | None = None
    weights: WeightOptions | None = None
    cache: CacheOptions | None = None
    share_caches: str | None = None
    eval_text: Path | None = None
    exit: ExitOptions | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ExportError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.dialect not in DIALECTS:
            raise ExportError(f"dialect {self.dialect!r} is not one of {', '.join(DIALECTS)}")
        allowed = (self.dialect, self.precision) == ("onnxruntime", "fp32") or (
            self.dialect == "standard" and self.precision != "bf16"
        )
        if self.weights is not None and not allowed:
            raise ExportError(
                f"--weights {self.weights.kind} needs the dialect onnxruntime at precision fp32, "
                "or standard at fp32 or fp16"
            )
        if self.weights is not None and self.weights.embedding is not None and self.dialect != "onnxruntime":
            raise ExportError(f"--embedding {self.weights.embedding} needs the dialect onnxruntime")
        if self.weights is not None and self.weights.asymmetric and self.dialect != "onnxruntime":
            raise ExportError("asymmetric blocks need the dialect onnxruntime: TensorRT reads no 4-bit zero points")
        if self.cache is not None and (self.dialect, self.precision) != ("onnxruntime", "fp32"):
            raise ExportError(f"--cache {self.cache.kind} needs the dialect onnxruntime at precision fp32")
        if self.share_caches is not None and self.share_caches not in SHARED:
            raise ExportError(f"share_caches {self.share_caches!r} is not one of {', '.join(SHARED)}")
        for name in ("max_seq_len", "max_batch", "chunk"):
            value = getattr(self, name)
            most = MAX_BATCH if name == "max_batch" else MOST_SIZE
            if value is not None and not 1 <= value <= most:
                raise ExportError(f"{name} is {value}; it must be 1 to {most:,}")

"""How to export: what can be asked for, refused where it does not fit together. Read before PyTorch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from melt_runtime.package.specs import DIALECTS, MAX_BATCH, PRECISIONS
from melt_runtime.untrusted import MOST_SIZE

from .errors import ExportError
from .quantization.options import CacheOptions, WeightOptions


@dataclass(frozen=True)
class ExportOptions:
    """How to export. ``max_seq_len`` None: the checkpoint's positions, up to 4,096; ``chunk`` None: its own;
    ``weights``, ``cache`` None: products and caches as ``precision`` has them."""

    precision: str = "fp32"
    dialect: str = "onnxruntime"
    max_seq_len: int | None = None
    max_batch: int = 8
    chunk: int | None = None
    weights: WeightOptions | None = None
    cache: CacheOptions | None = None

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
                f"--weights {self.weights.kind} is of the dialect onnxruntime at precision fp32, "
                "or of standard at fp32 or fp16"
            )
        if self.weights is not None and self.weights.asymmetric and self.dialect != "onnxruntime":
            raise ExportError("asymmetric blocks are of the dialect onnxruntime: TensorRT reads no 4-bit zero points")
        if self.cache is not None and (self.dialect, self.precision) != ("onnxruntime", "fp32"):
            raise ExportError(f"--cache {self.cache.kind} is of the dialect onnxruntime at precision fp32")
        for name in ("max_seq_len", "max_batch", "chunk"):
            value = getattr(self, name)
            most = MAX_BATCH if name == "max_batch" else MOST_SIZE
            if value is not None and not 1 <= value <= most:
                raise ExportError(f"{name} is {value}; it must be 1 to {most:,}")

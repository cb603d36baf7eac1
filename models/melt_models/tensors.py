"""Strict reading of a checkpoint's files: JSON, and safetensors whose names, shapes and values are checked."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError, shown

WEIGHT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_JSON_BYTES = 1 << 24  # an index of 200,000 tensors; parsed, it takes up to 25 times as much memory
_MOST_NAME = 255  # characters of a file name
MOST_TOKENIZER_BYTES = 1 << 28  # several times the largest vocabularies of today
_MOST_VALUES = 6_000_000  # per file, three times those of the largest vocabularies; each takes up to 200 bytes
# Rotary tables and masks, which older checkpoints hold although they are computed from the config.
_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.\w+|(original_)?inv_freq|freqs_(cis|cos|sin)|(cos|sin)_cached"
    r"|((causal|attention|attn)_)?mask|masked_bias|position_ids)$"
)
_MASK = re.compile(r"(^|\.)(self_)?att(n|ention)\.bias$")  # GPT-2's causal mask, if it has four dimensions


def read_json(path: Path, most: int = _MOST_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of at most ``most`` bytes. Raises CheckpointError."""
    try:
        size = path.stat().st_size
        if size > most:
            raise CheckpointError(f"{path} has {size:,} bytes; no JSON file of its kind is that large")
        text = path.read_text(encoding="utf-8")
        if sum(map(text.count, "[{,")) > _MOST_VALUES:
            raise CheckpointError(f"{path} has more than the {_MOST_VALUES:,} values that are read")
        content = json.loads(text, parse_int=_whole)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


def _whole(digits: str) -> int:
    """Parse a whole number of at most 40 digits. Raises ValueError."""
    if len(digits) > 40:  # transformers writes "no limit" as a number of 31 digits
        raise ValueError(f"{digits[:20]}... is a whole number of {len(digits)} digits")
    return int(digits)


@dataclass(frozen=True)
class StoredTensor:
    """File, shape and type of a tensor on disk: the whole of ``name`` there, or its ``rows`` from first to last."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Part:
    """Rows ``first`` up to ``last`` of a stored tensor, read in the given shape."""

    stored: str
    first: int
    last: int
    shape: tuple[int, ...]


class Weights(Mapping[str, StoredTensor]):
    """Mapping from the names of a checkpoint's tensors to their StoredTensor; values are read from disk on request.

    Reads single or sharded safetensors. Raises CheckpointError for files that cannot be read safely.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._tensors: dict[str, StoredTensor] = {}
        self._finite: set[str] = set()
        for file in self._files():
            self._read_header(file)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def renamed(self, parts: Mapping[str, Part]) -> Weights:
        """Return the same files under other names, each a part of a stored tensor."""
        view = copy.copy(self)
        view._tensors = {
            name: replace(self[part.stored], shape=part.shape, rows=(part.first, part.last))
            for name, part in parts.items()
        }
        return view

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that can hold the values of all tensors."""
        widest = torch.float16 if self._tensors else torch.float32
        kinds = {stored.dtype for stored in self._tensors.values()}
        return kinds.pop() if len(kinds) == 1 else reduce(torch.promote_types, kinds, widest)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor memory-mapped in its stored type, or cast to ``dtype``. It is scanned when first read.

        Raises CheckpointError if it holds NaN or Inf, or values beyond the range of ``dtype``.
        """
        stored = self._tensors[name]
        with safe_open(stored.file, framework="pt") as handle:
            value = handle.get_tensor(stored.name)
        if stored.name not in self._finite:
            self._check_finite(stored, value)
            self._finite.add(stored.name)
        if stored.rows is not None:
            value = value[slice(*stored.rows)].reshape(stored.shape)
        if dtype is None or dtype == stored.dtype:
            return value
        cast = value.to(dtype)
        if torch.promote_types(dtype, stored.dtype) != dtype and not torch.isfinite(cast).all():
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{stored.file.name}: tensor {stored.name} has values beyond the range of {short}")
        return cast

    def _check_finite(self, stored: StoredTensor, value: Tensor) -> None:
        # A finite sum has only finite terms. A sum that is not finite may have overflowed, so each term is checked.
        if not torch.isfinite(value.sum(dtype=torch.float32)) and not torch.isfinite(value).all():
            raise CheckpointError(f"{stored.file.name}: tensor {stored.name} holds NaN or Inf")

    def _files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        single = self.directory / "model.safetensors"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index} has no weight_map")
            names = sorted(set(map(str, weight_map.values())))
            long = next((name for name in names if len(name) > _MOST_NAME), None)
            if long:
                raise CheckpointError(f"{index} names {shown(long)}, which no file is called")
            outside = next((name for name in names if Path(name).name != name), None)
            if outside:
                raise CheckpointError(f"{index} names {outside!r}, which is outside the checkpoint directory")
            missing = next((name for name in names if not (self.directory / name).is_file()), None)
            if missing:
                raise CheckpointError(f"{index} names {missing}, which is not there")
            return [self.directory / name for name in names]
        if single.is_file():
            return [single]
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{self.directory} has only pickled weights ({pickles[0]}); unpickling can run code, so only "
                "safetensors are read: convert them with transformers' save_pretrained first"
            )
        raise CheckpointError(f"{self.directory} has no model.safetensors and no model.safetensors.index.json")

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    piece = handle.get_slice(name)
                    kind, shape = piece.get_dtype(), tuple(piece.get_shape())
                    if _DERIVED.search(name) or (_MASK.search(name) and len(shape) == 4):
                        continue
                    if kind not in WEIGHT_DTYPES:
                        raise CheckpointError(f"{file.name}: tensor {name} is {kind}; supported are F32, F16 and BF16")
                    if name in self._tensors:
                        raise CheckpointError(f"tensor {name} is in {self._tensors[name].file.name} and {file.name}")
                    self._tensors[name] = StoredTensor(file, shape, WEIGHT_DTYPES[kind], name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file, perhaps truncated: {error}") from error


def check_names(weights: Weights, expected: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()) -> None:
    """Compare names and shapes with those that the model needs. Raises CheckpointError naming the first tensors at
    fault."""
    missing = sorted(set(expected) - set(weights) - set(optional))
    unexpected = sorted(set(weights) - set(expected) - set(optional))
    for names, what in ((missing, "lacks"), (unexpected, "has unexpected")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(f"{weights.directory} {what} tensors: {', '.join(names[:3])}{more}")
    for name, shape in expected.items():
        if name in weights and weights[name].shape != shape:
            raise CheckpointError(
                f"{weights[name].file.name}: tensor {name} has shape {list(weights[name].shape)}, "
                f"the config asks for {list(shape)}"
            )

"""Weights and operators of an ONNX file without the onnx package: the few protobuf fields that a device needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PackageError

# TensorProto.DataType; bfloat16 is read as its bits.
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 16: np.dtype("<u2")}
_BFLOAT16 = 16
_EXTERNAL = 1


@dataclass(frozen=True)
class Initializer:
    """A floating-point weight: its name, shape, and where its bytes are (``raw``, or a part of ``file``)."""

    name: str
    shape: tuple[int, ...]
    kind: int
    raw: bytes
    file: Path | None
    offset: int

    @property
    def bytes(self) -> int:
        """Its bytes as they are stored."""
        return int(np.prod(self.shape)) * _DTYPES[self.kind].itemsize

    def read(self) -> NDArray[np.float32]:
        """The values, in float32. Raises PackageError."""
        dtype, count = _DTYPES[self.kind], int(np.prod(self.shape))
        try:
            if self.file is None:
                values = np.frombuffer(self.raw, dtype, count)
            else:
                values = np.fromfile(self.file, dtype, count, offset=self.offset)
            values = values.reshape(self.shape)
        except (OSError, ValueError) as error:
            raise PackageError(f"weight {self.name} cannot be read from {self.file}: {error}") from error
        if self.kind == _BFLOAT16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values.astype(np.float32)


def read_initializers(path: Path) -> dict[str, Initializer]:
    """The floating-point initializers of an ONNX file, by name. Raises PackageError for what is not one."""
    found: dict[str, Initializer] = {}
    try:
        for graph in _fields(path.read_bytes(), 7):  # ModelProto.graph
            for tensor in _fields(graph, 5):  # GraphProto.initializer
                read = _tensor(tensor, path.parent)
                if read is not None:
                    found[read.name] = read
    except (IndexError, ValueError, TypeError) as error:
        raise PackageError(f"{path} is not an ONNX file that can be read: {error}") from error
    return found


@dataclass(frozen=True)
class Operator:
    """A node: what it is, its name, and what it reads, "" where an optional input is left out."""

    kind: str
    name: str
    inputs: tuple[str, ...]


def read_operators(path: Path) -> list[Operator]:
    """All nodes of an ONNX file. Raises PackageError for what is not one."""
    found = []
    try:
        for graph in _fields(path.read_bytes(), 7):  # ModelProto.graph
            for node in _fields(graph, 1):  # GraphProto.node
                inputs = tuple(value.decode() for value in _fields(node, 1))
                name, kind = (next(_fields(node, number), b"").decode() for number in (3, 4))
                found.append(Operator(kind, name, inputs))
    except (IndexError, ValueError, TypeError) as error:
        raise PackageError(f"{path} is not an ONNX file that can be read: {error}") from error
    return found


def initializer_bytes(path: Path) -> dict[str, int]:
    """The bytes of every initializer of an ONNX file as stored, by name, whatever its type. Raises PackageError."""
    found: dict[str, int] = {}
    try:
        for graph in _fields(path.read_bytes(), 7):  # ModelProto.graph
            for tensor in _fields(graph, 5):  # GraphProto.initializer
                name = next(_fields(tensor, 8), b"").decode()
                outside = {
                    key.decode(): value.decode()
                    for entry in _fields(tensor, 13)
                    for key, value in [(next(_fields(entry, 1), b""), next(_fields(entry, 2), b""))]
                }
                inside = sum(len(value) for number in (4, 5, 7, 9, 10) for value in _fields(tensor, number))
                found[name] = int(outside.get("length", inside))
    except (IndexError, ValueError, TypeError) as error:
        raise PackageError(f"{path} is not an ONNX file that can be read: {error}") from error
    return found


def _tensor(content: bytes, directory: Path) -> Initializer | None:
    """A TensorProto; None for one of another type."""
    dims: list[int] = []
    name, raw, kind, location = "", b"", 0, 0
    external: dict[str, str] = {}
    for number, value in _parse(content):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, bytes):
            name = value.decode()
        elif number == 9 and isinstance(value, bytes):
            raw = value
        elif number == 13 and isinstance(value, bytes):
            entry = {n: v.decode() for n, v in _parse(value) if isinstance(v, bytes)}
            external[entry[1]] = entry[2]
        elif number == 14 and isinstance(value, int):
            location = value
    if kind not in _DTYPES:
        return None
    file = directory / external["location"] if location == _EXTERNAL else None
    return Initializer(name, tuple(dims), kind, raw, file, int(external.get("offset", "0")))


def _fields(content: bytes, wanted: int) -> Iterator[bytes]:
    return (value for number, value in _parse(content) if number == wanted and isinstance(value, bytes))


def _parse(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: their number, and a number or bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(content, at)
        else:
            size = {1: 8, 5: 4}.get(kind, 0)
        if not size and kind != 2:
            raise ValueError(f"wire type {kind} at byte {at}")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _varints(content: bytes) -> Iterator[int]:
    at = 0
    while at < len(content):
        value, at = _varint(content, at)
        yield value

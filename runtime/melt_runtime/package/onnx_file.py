"""Read weights and operators of an ONNX file without the onnx package, by parsing the few protobuf fields needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PackageError

# TensorProto.DataType; bfloat16 is read as bits.
_DTYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2"), 16: np.dtype("<u2")}
_BFLOAT16 = 16
_EXTERNAL = 1
_MOST_BYTES = 1 << 31  # protobuf's limit
_MOST_DEPTH = 8  # of nested graphs
_BROKEN = (IndexError, KeyError, ValueError, TypeError)


@dataclass(frozen=True)
class Initializer:
    """A floating-point weight: name, shape, and its bytes in ``raw``, or in ``file`` from ``offset`` on."""

    name: str
    shape: tuple[int, ...]
    kind: int
    raw: bytes
    file: Path | None
    offset: int

    @property
    def bytes(self) -> int:
        """Bytes as stored."""
        return int(np.prod(self.shape)) * _DTYPES[self.kind].itemsize

    def read(self) -> NDArray[np.float32]:
        """Return the values in float32. Raises PackageError."""
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
    """Return the floating-point initializers of an ONNX file by name. Raises PackageError for an invalid file."""
    found: dict[str, Initializer] = {}
    with _opened(path) as model:
        for graph in _fields(model, 7):  # ModelProto.graph
            for tensor in _fields(graph, 5):  # GraphProto.initializer
                read = _tensor(tensor, path.parent)
                if read is not None:
                    found[read.name] = read
    return found


@dataclass(frozen=True)
class Operator:
    """A node: operator type, name, and inputs, "" for an omitted one."""

    kind: str
    name: str
    inputs: tuple[str, ...]


def read_operators(path: Path) -> list[Operator]:
    """Return all nodes of an ONNX file. Raises PackageError for an invalid file."""
    found = []
    with _opened(path) as model:
        for graph in _fields(model, 7):  # ModelProto.graph
            for node in _fields(graph, 1):  # GraphProto.node
                inputs = tuple(_text(value) for value in _fields(node, 1))
                found.append(Operator(_first(node, 4), _first(node, 3), inputs))
    return found


def initializer_bytes(path: Path) -> dict[str, int]:
    """Return the stored bytes of every initializer of an ONNX file by name. Raises PackageError."""
    found: dict[str, int] = {}
    with _opened(path) as model:
        for graph in _fields(model, 7):  # ModelProto.graph
            for tensor in _fields(graph, 5):  # GraphProto.initializer
                inside = sum(len(value) for number in (4, 5, 7, 9, 10) for value in _fields(tensor, number))
                found[_first(tensor, 8)] = _number(_outside(tensor).get("length", str(inside)))
    return found


@dataclass(frozen=True)
class ExternalData:
    """The place of a tensor's bytes outside its ONNX file. ``length`` None: to the end of the file."""

    tensor: str
    location: str
    offset: int
    length: int | None


def external_data(path: Path) -> list[ExternalData]:
    """Return all external data of an ONNX file.

    Raises PackageError for an invalid file, and for weights stored as no exporter does: sparse, or external outside the
    main graph's initializers.
    """
    found = []
    with _opened(path) as model:
        for graph in _fields(model, 7):  # ModelProto.graph
            for tensor in _fields(graph, 5):  # GraphProto.initializer
                if _is_outside(tensor):
                    outside = _outside(tensor)
                    length = _number(outside["length"]) if "length" in outside else None
                    offset = _number(outside.get("offset", "0"))
                    found.append(ExternalData(_first(tensor, 8), outside["location"], offset, length))
            _require_inside(graph, 0)
        for function in _fields(model, 25):  # ModelProto.functions
            for node in _fields(function, 7):  # FunctionProto.node
                _require_nodes_inside(node, 0)
        if next(_fields(model, 20), None) is not None:  # ModelProto.training_info
            raise ValueError("it has training information")
    return found


def _require_inside(graph: memoryview, depth: int) -> None:
    """Raise ValueError if a graph's nodes or sparse tensors use external data."""
    if depth > _MOST_DEPTH:
        raise ValueError(f"its graphs lie more than {_MOST_DEPTH} deep in each other")
    if next(_fields(graph, 15), None) is not None:  # GraphProto.sparse_initializer
        raise ValueError("it has sparse weights")
    if depth and any(_is_outside(tensor) for tensor in _fields(graph, 5)):
        raise ValueError("a graph within a node reads weights from another file")
    for node in _fields(graph, 1):
        _require_nodes_inside(node, depth)


def _require_nodes_inside(node: memoryview, depth: int) -> None:
    for attribute in _fields(node, 5):  # NodeProto.attribute
        for number in (5, 10):  # AttributeProto.t, tensors
            if any(_is_outside(tensor) for tensor in _fields(attribute, number)):
                raise ValueError(f"an attribute of {_first(node, 3)!r} reads values from another file")
        if any(next(_fields(attribute, number), None) is not None for number in (22, 23)):  # sparse tensors
            raise ValueError(f"an attribute of {_first(node, 3)!r} is sparse")
        for number in (6, 11):  # AttributeProto.g, graphs
            for graph in _fields(attribute, number):
                _require_inside(graph, depth + 1)


def _is_outside(tensor: memoryview) -> bool:
    """Return whether a TensorProto uses external data, by either of the fields that say so."""
    return any((number == 14 and value == _EXTERNAL) or number == 13 for number, value in _parse(tensor))


def _outside(tensor: memoryview) -> dict[str, str]:
    """Return TensorProto.external_data."""
    return {_first(entry, 1): _first(entry, 2) for entry in _fields(tensor, 13)}


def _tensor(content: memoryview, directory: Path) -> Initializer | None:
    """Parse a TensorProto. None for types other than floating point."""
    dims: list[int] = []
    name, raw, kind, location = "", b"", 0, 0
    for number, value in _parse(content):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8 and isinstance(value, memoryview):
            name = _text(value)
        elif number == 9 and isinstance(value, memoryview):
            raw = bytes(value)
        elif number == 14 and isinstance(value, int):
            location = value
    if kind not in _DTYPES:
        return None
    external = _outside(content)
    file = directory / external["location"] if location == _EXTERNAL else None
    return Initializer(name, tuple(dims), kind, raw, file, _number(external.get("offset", "0")))


@contextmanager
def _opened(path: Path) -> Iterator[memoryview]:
    """Memory-map a file, so that its weights take no memory. Raises PackageError, also for errors of the caller's
    parsing."""
    try:
        size = path.stat().st_size
        if not 0 < size < _MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        yield memoryview(np.memmap(path, np.uint8, "r"))  # type: ignore[arg-type]
    except (*_BROKEN, OSError) as error:
        raise PackageError(f"{path} is not an ONNX file that can be read: {error}") from error


def _fields(content: memoryview, wanted: int) -> Iterator[memoryview]:
    return (value for number, value in _parse(content) if number == wanted and isinstance(value, memoryview))


def _first(content: memoryview, wanted: int) -> str:
    """Return a field's text, "" if it is absent."""
    return _text(next(_fields(content, wanted), memoryview(b"")))


def _text(value: memoryview) -> str:
    return bytes(value).decode()


def _number(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise ValueError(f"an offset or length is {digits[:40]!r}")
    return int(digits)


def _parse(content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield the fields of a protobuf message: field number, and integer or bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind = key & 7
        if key < 8:
            raise ValueError(f"a field without a number at byte {at}")
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
        if at + size > len(content):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(content)}")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError(f"a number without end at byte {at}")


def _varints(content: memoryview) -> Iterator[int]:
    at = 0
    while at < len(content):
        value, at = _varint(content, at)
        yield value

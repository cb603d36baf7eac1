"""Endless streams of packed sequences from documents or token files, which resume exactly."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .documents import Files, Source, named, reading_errors

DOCUMENTS = {"line": "line", "paragraph": "paragraph", "file": "document"}  # ours -> the word of datasets
DTYPES = ("uint16", "uint32")


def is_held_out(text: str, percent: float) -> bool:
    """Return whether the first 8 bytes of the text's SHA-256, modulo 10,000, are below 100 * percent."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10_000 < 100 * percent


class DocumentStream:
    """Documents of a source, shuffled, tokenized and packed without padding.

    Each epoch reads the source in a new order and shuffles the documents within blocks of ``shuffle_buffer`` documents;
    only one block is in memory. (The shuffle of ``datasets`` loses its buffer when it resumes.) A position is small:
    the start of a block, the document in it, the token in the document. ``encode`` returns a document's tokens (n,)
    int64, eos included. ``field`` holds a row's document; blank ones are skipped. Raises ValueError for what cannot be
    read.
    """

    def __init__(
        self,
        source: Source,
        encode: Callable[[str], np.ndarray],
        sequence_length: int,
        seed: int,
        held_out: bool,
        field: str = "text",
        shuffle_buffer: int = 1000,
        held_out_percent: float = 1.0,
    ):
        _check_percent(held_out_percent)
        if type(shuffle_buffer) is not int or shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer is {shuffle_buffer!r}; it must be a whole number from 1")
        self.source, self.encode, self.sequence_length, self.seed = source, encode, sequence_length, seed
        self.field, self.block_size, self.held_out, self.percent = field, shuffle_buffer, held_out, held_out_percent
        self.begins: dict[str, Any] | None = None
        self.encoded: np.ndarray | None = None  # tokens of the current document, encoded on demand
        self.load_state_dict({"epoch": 0, "block": 0, "begins": None, "document": 0, "token": 0, "last": None})

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "block": self.block,  # blocks of this epoch before the current one
            "begins": copy.deepcopy(self.begins),  # position of the source at the start of the block
            "document": self.document,  # finished documents of the block
            "token": self.token,  # used tokens of the next document
            "last": self.last,  # the token that begins the next sequence
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self.block = state["epoch"], state["block"]
        self._open(copy.deepcopy(state["begins"]))
        self._read_block()
        self.document, self.token, self.last = state["document"], state["token"], state["last"]

    def next(self) -> np.ndarray:
        """Return the next sequence, (sequence_length + 1,) int64. It begins with the last token of the one before."""
        parts = [] if self.last is None else [np.array([self.last])]
        missing = self.sequence_length + 1 - len(parts)
        while missing:
            parts.append(self._tokens()[self.token : self.token + missing])
            missing -= len(parts[-1])
            self.token += len(parts[-1])
        sequence = np.concatenate(parts)
        self.last = int(sequence[-1])
        return sequence

    def _tokens(self) -> np.ndarray:
        """Return all tokens of the current document, or of the next one once they are used up."""
        while True:
            if self.document == len(self.texts):
                self._next_block()
            if self.encoded is None:
                self.encoded = self.encode(self.texts[self.document])
            if self.token < len(self.encoded):
                return self.encoded
            self.document, self.token, self.encoded = self.document + 1, 0, None

    def _next_block(self) -> None:
        self.begins, self.block = self.rows.state_dict(), self.block + 1
        self._read_block()
        if not self.texts:
            self.epoch, self.block = self.epoch + 1, 0
            self._open(None)
            self._read_block()

    def _open(self, begins: dict[str, Any] | None) -> None:
        """Open this epoch's rows, at a saved position of the source or at the beginning."""
        self.rows = self.source.open(self.seed, self.epoch)
        if begins is not None:
            self.rows.load_state_dict(begins)
        self.begins, self.documents = begins, self._read()

    def _read_block(self) -> None:
        """Read the next documents and shuffle them."""
        read = list(islice(self.documents, self.block_size))
        if not read and self.block == 0:
            part = "is held out" if self.held_out else "is left to train on"
            raise ValueError(f"no document of {self.source} {part}; give more or change held_out_percent")
        order = np.random.default_rng([self.seed, self.epoch, self.block]).permutation(len(read))
        self.texts, self.document, self.token = [read[index] for index in order], 0, 0
        self.encoded = None

    def _read(self) -> Iterator[str]:
        """Yield the documents of this side, training or held out, in the order of the source."""
        try:
            for row in self.rows:
                if self.field not in row:
                    raise ValueError(f"there is no field {self.field!r}, only {', '.join(row)}")
                text = row[self.field]
                if text is not None and not isinstance(text, str):
                    raise ValueError(f"field {self.field!r} holds {text!r}, which is not text")
                if text and not text.isspace() and is_held_out(text, self.percent) == self.held_out:
                    yield text
        except reading_errors() as error:
            raise self.source.unreadable(error) from error


def file_source(kind: str, files: list[Path], document: str = "line") -> Files:
    """Return text, jsonl or parquet files as a source.

    ``document`` is the unit of a text file (a key of DOCUMENTS; a paragraph ends at an empty line). Raises ValueError.
    """
    _check_files(files)
    if document not in DOCUMENTS:
        raise ValueError(f"document is {document!r}; it must be one of {', '.join(DOCUMENTS)}")
    how = (("sample_by", DOCUMENTS[document]),) if kind == "text" else ()
    return Files("json" if kind == "jsonl" else kind, tuple(files), how)


class TokenStream:
    """Flat token ids in ``.npy`` or raw ``.bin`` files, memory-mapped. Each epoch has all sequences in a new order.

    The sequences of a file follow each other; each begins with the last token of the one before. Tokens that do not
    fill a sequence are dropped at the beginning or end, differently in every epoch. The last ``held_out_percent`` of
    each file are held out. ``dtype`` is that of ``.bin`` files, which have no header. Raises ValueError.
    """

    def __init__(
        self,
        files: list[Path],
        sequence_length: int,
        seed: int,
        held_out: bool,
        dtype: str | None = None,
        held_out_percent: float = 1.0,
    ):
        _check_files(files)
        _check_percent(held_out_percent)
        self.sequence_length, self.seed, self.taken, self.epoch = sequence_length, seed, 0, -1
        self.parts = []
        for file in files:
            tokens = _map_tokens(file, dtype)
            cut = len(tokens) - int(len(tokens) * held_out_percent / 100)
            self.parts.append(tokens[cut:] if held_out else tokens[:cut])
        # ends[i]: number of sequences in the parts up to i
        self.ends = np.cumsum([max(0, len(part) - 1) // sequence_length for part in self.parts])
        if not self.ends[-1]:
            part = "held-out part" if held_out else "training part"
            raise ValueError(
                f"the {part} of {named(files)} has no {sequence_length + 1} tokens in a row; give longer files, a "
                f"smaller sequence_length or another held_out_percent"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = state["taken"]

    def next(self) -> np.ndarray:
        """Return the next sequence, (sequence_length + 1,) int64."""
        epoch, at = divmod(self.taken, int(self.ends[-1]))
        if epoch != self.epoch:
            rng, self.epoch = np.random.default_rng([self.seed, epoch]), epoch
            self.order = rng.permutation(self.ends[-1])
            self.starts = [rng.integers(0, max(0, len(p) - 1) % self.sequence_length + 1) for p in self.parts]
        self.taken += 1
        index = int(self.order[at])
        part = int(np.searchsorted(self.ends, index, side="right"))
        before = int(self.ends[part - 1]) if part else 0
        start = int(self.starts[part]) + (index - before) * self.sequence_length
        return self.parts[part][start : start + self.sequence_length + 1].astype(np.int64)


def _map_tokens(file: Path, dtype: str | None) -> np.ndarray:
    """Memory-map a flat array of token ids. Raises ValueError."""
    if file.suffix == ".npy":
        if dtype is not None:
            raise ValueError(f"{file} says its own type; dtype is for .bin files")
        try:
            tokens = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{file} cannot be read as a NumPy file: {error}") from error
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{file} holds {tokens.dtype} of shape {tokens.shape}; token ids are flat whole numbers")
        return tokens
    if file.suffix != ".bin":
        raise ValueError(f"{file} is not a token file; its name must end in .npy or .bin")
    if dtype not in DTYPES:
        raise ValueError(f"{file} does not say its type, and dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
    if file.stat().st_size % np.dtype(dtype).itemsize:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, which is no whole number of {dtype}")
    return np.memmap(file, dtype=dtype, mode="r")


def _check_files(files: list[Path]) -> None:
    for file in files:
        if not file.is_file():
            raise ValueError(f"data file {file} does not exist" if not file.exists() else f"{file} is not a file")
        if not file.stat().st_size:
            raise ValueError(f"data file {file} is empty")


def _check_percent(percent: Any) -> None:
    if isinstance(percent, bool) or not isinstance(percent, int | float) or not 0 <= percent < 100:
        raise ValueError(f"held_out_percent is {percent!r}; it must be a number from 0 to less than 100")

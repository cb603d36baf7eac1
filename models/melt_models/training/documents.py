"""Where documents come from, through ``datasets``: files, and data sets of a hub or a directory."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from melt_hub import reference


class Rows(Protocol):
    """The rows of an epoch, each a mapping of fields, from a position that can be saved and loaded."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Source(Protocol):
    """Rows of documents. ``str()`` names them in messages."""

    def open(self, seed: int, epoch: int) -> Rows:
        """Open the rows in an epoch's order, which depends only on seed and epoch. Raises ValueError."""
        ...

    def unreadable(self, error: Exception) -> ValueError:
        """Return the refusal for an error of READING, raised while rows were read."""
        ...


def reading_errors() -> tuple[type[Exception], ...]:
    """Return the errors of ``datasets`` for what cannot be read.

    StopIteration: a file has no row from which to infer the fields. RuntimeError: a data set needs its own code.
    """
    from datasets.exceptions import DatasetGenerationError

    return ValueError, OSError, StopIteration, RuntimeError, DatasetGenerationError


@dataclass(frozen=True)
class Files:
    """Files of one kind, in another order in each epoch. ``builder``, ``how``: their reader in ``datasets``."""

    builder: str
    files: tuple[Path, ...]
    how: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return named(self.files)

    def open(self, seed: int, epoch: int) -> Rows:
        from datasets import load_dataset

        order = np.random.default_rng([seed, epoch]).permutation(len(self.files))
        names = [glob.escape(str(self.files[index])) for index in order]  # datasets reads names as patterns
        try:
            rows: Rows = load_dataset(self.builder, data_files=names, split="train", streaming=True, **dict(self.how))
        except reading_errors() as error:
            raise self.unreadable(error) from error
        return rows

    def unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self} cannot be read as {self.builder}: {_first_line(error)}")


@dataclass(frozen=True)
class DataSet:
    """A split of a data set: a directory of files, one that ``save_to_disk`` wrote, or a name on a hub, streamed.

    ``name`` may end in ``@revision`` on a hub; a directory of that name wins. The shards have another order in each
    epoch.
    """

    name: str
    split: str = "train"
    subset: str | None = None

    def __str__(self) -> str:
        return f"data set {self.name}"

    def open(self, seed: int, epoch: int) -> Rows:
        try:
            rows = self._rows()
            order = np.random.default_rng([seed, epoch]).permutation(rows.num_shards).tolist()
        except reading_errors() as error:
            raise self.unreadable(error) from error
        return _Shards(rows, order)

    def unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self}, split {self.split}, cannot be read: {_first_line(error)}")

    def _rows(self) -> Any:
        from datasets import DatasetDict, load_dataset, load_from_disk

        directory = Path(self.name).expanduser()
        if (directory / "dataset_info.json").is_file() or (directory / "dataset_dict.json").is_file():
            saved = load_from_disk(str(directory))
            if isinstance(saved, DatasetDict):
                if self.split not in saved:
                    raise ValueError(f"there is no split {self.split}, only {', '.join(map(str, saved))}")
                saved = saved[self.split]
            return saved.to_iterable_dataset(num_shards=max(1, len(saved.cache_files)))
        found = None if directory.exists() else reference(self.name)
        if found is None and not directory.is_dir():
            raise ValueError("it is no directory, and no name on a hub, which is ORGANISATION/NAME")
        name = found.name if found else str(directory)
        revision = found.revision if found else None
        return load_dataset(name, self.subset, split=self.split, revision=revision, streaming=True)


class _Shards:
    """The shards of a data set one after the other. (The shuffle of ``datasets`` loses its buffer when it resumes.)"""

    def __init__(self, rows: Any, order: list[int]):
        self.rows, self.order, self.at = rows, order, 0
        self._open()

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        while True:
            yield from self.shard
            if self.at + 1 == len(self.order):
                return
            self.at += 1
            self._open()

    def state_dict(self) -> dict[str, Any]:
        return {"shard": self.at, "within": self.shard.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["shard"]
        self._open()
        self.shard.load_state_dict(state["within"])

    def _open(self) -> None:
        self.shard: Any = self.rows.shard(len(self.order), self.order[self.at])


def named(files: tuple[Path, ...] | list[Path]) -> str:
    return str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["there is nothing in it"])[0]

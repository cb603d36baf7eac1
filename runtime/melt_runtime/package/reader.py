"""Read a package: a directory of manifest, graphs, weights and tokenizer, written by melt_export."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, PackageError
from ..untrusted import parse_json, read_text
from .files import FileSpec as FileSpec
from .files import file_hash as file_hash
from .files import within
from .manifest import COMPUTED_FROM, MANIFEST, manifest_text
from .manifest import FORMAT_VERSION as FORMAT_VERSION
from .manifest import PARITY as PARITY
from .manifest import Manifest as Manifest
from .manifest_schema import read_manifest
from .onnx_file import external_data
from .specs import DIALECTS as DIALECTS
from .specs import GRAPHS as GRAPHS
from .specs import ITEM_BYTES as ITEM_BYTES
from .specs import MAX_LOOPS as MAX_LOOPS
from .specs import PRECISIONS as PRECISIONS
from .specs import GraphSpec as GraphSpec
from .specs import StateSpec as StateSpec
from .specs import TensorSpec as TensorSpec
from .specs import new_positions_shape as new_positions_shape
from .specs import size_of as size_of


def manifest_hash(directory: Path) -> str:
    """Return the SHA-256 of a package's manifest as exported, without engines, which do not affect what was
    verified."""
    return _exported_hash(read_text(directory / MANIFEST))


def source_hash(manifest: Manifest) -> str:
    """Return a hash over the hashes of graphs and weights, which identifies what an engine is built from."""
    parts = sorted(f"{name} {spec.sha256}" for name, spec in manifest.files.items() if name.endswith(COMPUTED_FROM))
    return _sha256("\n".join(parts))


def with_engines(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    """Return a manifest's text with its engine entries edited by ``change``; the rest stays as it is."""
    content = parse_json(text)
    engines = content.pop("engines", {})
    change(engines)
    return manifest_text({**content, "engines": engines} if engines else content)


def _exported_hash(text: str) -> str:
    content = parse_json(text)
    return _sha256(manifest_text(content) if content.pop("engines", None) is not None else text)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Package:
    """A package on disk, with its manifest read and its files checked.

    ``hash``: SHA-256 of manifest.json, which covers every listed file and the engines' plans. ``exported_hash``: the
    same without engines, which are built later.
    """

    directory: Path
    manifest: Manifest
    hash: str
    exported_hash: str

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        check_hashes: bool = True,
        expected_hash: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Package:
        """Read and check a package. Raises PackageError.

        Always checks the presence and size of every file and the external data of graphs; hashes of files unless
        ``check_hashes`` is False. ``expected_hash``: refuse a package with another ``hash``; needs ``check_hashes``.
        ``progress``: called with the number of bytes hashed since its last call.
        """
        expected = None if expected_hash is None else _checked_hash(expected_hash, check_hashes)
        directory = Path(directory)
        if not directory.is_dir():
            what = "is a file; a package is a directory" if directory.exists() else "does not exist"
            raise PackageError(f"package {directory} {what}")
        path = directory / MANIFEST
        if not path.is_file():
            raise PackageError(f"{directory} has no {MANIFEST}; it is not a package made by melt-export")
        _require_within(path, directory)
        text = read_text(path)
        found = _sha256(text)
        if expected is not None and found != expected:
            raise PackageError(f"{directory} is another package than expected: its hash is {found}")
        manifest = read_manifest(text)
        for name, spec in manifest.files.items():
            try:
                _check_file(directory, name, spec, check_hashes, progress)
            except OSError as error:
                raise PackageError(f"{directory / name} cannot be read: {error.strerror}") from error
        package = cls(directory, manifest, found, _exported_hash(text))
        for graph in manifest.graphs:
            package._require_weights(package.path(graph))
        return package

    def path(self, name: str) -> Path:
        """Return the path of a graph ("embed", "loop_step", "lm_head", and "coda" where there is one)."""
        return self.directory / self.manifest.graphs[name].file

    def file(self, name: str) -> Path | None:
        """Return the path of a file that the manifest lists, and so was checked; else None."""
        return self.directory / name if name in self.manifest.files else None

    def _require_weights(self, graph: Path) -> None:
        """Raise PackageError for a graph that reads an unlisted file, or beyond a file's end."""
        for data in external_data(graph):
            spec = self.manifest.files.get(data.location)
            if spec is None or not data.location.endswith(COMPUTED_FROM):
                raise PackageError(f"{graph} reads {data.location!r}, which is no weights file of {MANIFEST}")
            if data.offset > spec.bytes or data.offset + (data.length or 0) > spec.bytes:
                raise PackageError(f"{graph} reads {data.tensor!r} from beyond the end of {data.location}")


def _check_file(
    directory: Path, name: str, spec: FileSpec, check_hashes: bool, progress: Callable[[int], None] | None
) -> None:
    """Raise PackageError for a file that differs from its manifest entry; OSError if it cannot be read."""
    file = directory / name
    _require_within(file, directory)
    if not file.is_file():
        raise PackageError(f"{directory} lacks {name}, which its manifest lists")
    if file.stat().st_size != spec.bytes:
        raise PackageError(f"{file} has {file.stat().st_size} bytes, its manifest says {spec.bytes}")
    if check_hashes and file_hash(file, progress) != spec.sha256:
        raise PackageError(f"{file} was changed: its hash is not the manifest's")


def _checked_hash(given: str, check_hashes: bool) -> str:
    """Normalise an expected hash. Raises ArgumentError if it is no hash, or files are not hashed."""
    text = str(given).strip().lower().removeprefix("sha256:")
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ArgumentError(f"the expected hash is {given!r}; it must be the 64 digits that melt-run inspect shows")
    if not check_hashes:
        raise ArgumentError("an expected hash says nothing of files that are not hashed; leave check_hashes as it is")
    return text


def _require_within(file: Path, directory: Path) -> None:
    if not within(file, directory):
        raise PackageError(f"{file} is a link that leaves the package directory")

"""Engines stored in a package: written atomically, checked when opened."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import BackendError, PackageError
from ..package.engine_spec import AGAIN, ENGINES, EngineSpec, mismatch, plan_path
from ..package.files import file_hash, new_file, umask, within, working_directory
from ..package.manifest import MANIFEST
from ..package.reader import Package, source_hash, with_engines
from ..untrusted import read_text


@contextmanager
def new_engine(package: Path, name: str) -> Iterator[Path]:
    """Yield an empty directory for an engine's plans. It is removed unless ``keep_engine`` moves it into place."""
    folder = package / ENGINES
    folder.mkdir(exist_ok=True)
    try:
        with working_directory(folder, f".{name}.partial-") as directory:
            directory.chmod(0o777 & ~umask())
            yield directory
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def keep_engine(package: Path, name: str, directory: Path, spec: EngineSpec) -> None:
    """Move a built engine into place and enter it in the manifest; an engine of the same name is replaced."""
    target = package / ENGINES / name
    old = directory.with_name(f"{directory.name}-old")
    if target.exists():
        target.rename(old)
    directory.rename(target)
    try:
        _edit_manifest(package, name, spec)
    except BaseException:
        target.rename(directory)
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_engine(package: Path, name: str) -> None:
    """Remove an engine: its manifest entry, then its plans. Raises PackageError if there is none of that name."""
    engine_spec(Package.open(package, check_hashes=False), name)
    _edit_manifest(package, name, None)
    shutil.rmtree(package / ENGINES / name, ignore_errors=True)


def engine_spec(package: Package, name: str) -> EngineSpec:
    """Return an engine's entry. Raises PackageError that names the engines there are."""
    engines = package.manifest.engines
    if name not in engines:
        there = f"it has {', '.join(engines)}" if engines else "it has none; build one with melt-run build-engine"
        raise PackageError(f"{package.directory} has no engine {name!r}: {there}")
    return engines[name]


def open_engine(
    package: Package,
    name: str,
    *,
    flavour: str | None = None,
    version: str | None = None,
    capability: str | None = None,
    check_hashes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Path]:
    """Return an engine's plans by graph, after checking that they fit this package, library and device, and are
    unchanged.

    ``flavour``, ``version``, ``capability``: what will run it; None is not compared. Raises PackageError for missing or
    changed plans, BackendError for another library or device; both give the command to rebuild.
    """
    spec = engine_spec(package, name)
    how = f"with: {rebuild_command(package.directory, spec)}"
    again = f"; {AGAIN} {how}"
    source = source_hash(package.manifest)
    reason = mismatch(spec, source, spec.version if version is None else version, capability, flavour)
    if reason is not None:
        raise (BackendError if spec.source == source else PackageError)(f"engine {name} {reason} {how}")
    plans = {graph: plan_path(package.directory, name, graph) for graph in spec.files}
    for graph, path in plans.items():
        file = spec.files[graph]
        if not path.is_file() or not within(path, package.directory):
            raise PackageError(f"engine {name} lacks {path}{again}")
        if path.stat().st_size != file.bytes:
            raise PackageError(f"{path} has {path.stat().st_size} bytes, its manifest says {file.bytes}{again}")
        if check_hashes and file_hash(path, progress) != file.sha256:
            raise PackageError(f"{path} was changed: its hash is not the manifest's{again}")
    return plans


def rebuild_command(directory: Path, spec: EngineSpec) -> str:
    """Return the command that builds an engine with the same options."""
    words = ["melt-run", "build-engine", str(directory), "--engine", spec.flavour]
    if spec.weights:
        words += ["--weights", spec.weights]
    for option, value in spec.options.items():
        values = value if isinstance(value, list | tuple) else [value]
        flag = f"--{option.replace('_', '-')}"
        words += [flag] if value is True else [word for v in values if v for word in (flag, str(v))]
    return shlex.join(words)


def _edit_manifest(package: Path, name: str, spec: EngineSpec | None) -> None:
    """Replace the manifest atomically, with or without an engine's entry."""
    path = package / MANIFEST

    def change(engines: dict) -> None:
        engines.pop(name, None)
        if spec is not None:
            engines[name] = spec.to_dict()

    text = with_engines(read_text(path), change)
    with new_file(path) as made:
        made.write_text(text, encoding="utf-8")

"""Engines stored in a package: written atomically, checked when opened."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ..errors import BackendError, PackageError
from ..package.engine_spec import ENGINES, EngineSpec, plan_path
from ..package.files import file_hash, new_file, umask, within, working_directory
from ..package.manifest import MANIFEST
from ..package.reader import Package, source_hash, with_engines
from ..untrusted import read_text

RTX_DEVICES = "8.0, 8.6, 8.9, 12.0 and newer"  # as TensorRT-RTX states when it refuses others
_AGAIN = "build it again"


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
    again = f"; {_AGAIN} {how}"
    if flavour is not None and flavour != spec.flavour:
        raise BackendError(f"engine {name} is for {spec.flavour}, not {flavour}{again}")
    source = source_hash(package.manifest)
    reason = mismatch(spec, source, spec.version if version is None else version, capability)
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


def fitting_engine(
    engines: Mapping[str, EngineSpec], source: str, versions: Mapping[str, str], capability: str
) -> tuple[str | None, dict[str, str]]:
    """Return the engine to run (None: none fits), and why the preferred ones do not.

    ``source``: the package's ``source_hash``. ``versions``: of the installed TensorRT flavours. ``capability``: the
    device's. Engines with the package's own weights come first: they compute what was
    verified.
    """
    wrong: dict[str, str] = {}
    for name in sorted(engines, key=lambda name: engines[name].weights is not None):
        reason = mismatch(engines[name], source, versions.get(engines[name].flavour), capability)
        if reason is None:
            return name, wrong
        wrong[name] = reason
    return None, wrong


def mismatch(spec: EngineSpec, source: str, version: str | None, capability: str | None) -> str | None:
    """Return why an engine does not fit package, library and device, in words that follow its name; None if it fits.

    ``version``: of its library; None if not installed. ``capability``: None for any device.
    """
    if version is None:
        return f"needs {spec.flavour}; install it with: pip install 'melt-export[{spec.flavour}]'"
    if version != spec.version:
        return f"was built with {spec.flavour} {spec.version}, here is {version}; {_AGAIN}"
    if capability is not None and not runs_on(spec, capability):
        return f"is for compute capability {devices_of(spec)}, this device has {capability}; {_AGAIN}"
    if spec.source != source:
        return f"was built from other graphs or weights than the package has; {_AGAIN}"
    return None


def runs_on(spec: EngineSpec, capability: str) -> bool:
    """Return whether an engine is for devices of this compute capability."""
    if spec.compute_capabilities:
        return capability in spec.compute_capabilities
    return rtx_knows(capability)


def rtx_knows(capability: str) -> bool:
    """Return whether TensorRT-RTX 1.7 runs engines without listed devices here: not on 9.0 and 10.x, the data centre
    devices."""
    return 8.0 <= float(capability) < 9.0 or float(capability) >= 12.0


def devices_of(spec: EngineSpec) -> str:
    """Return the compute capabilities that an engine is for, as text."""
    return ", ".join(spec.compute_capabilities) or RTX_DEVICES


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

"""Names on a model hub, such as ``org/name@revision``, turned into directories on this machine.

A directory of that name always wins. Only the files that a checkpoint or a package needs are fetched, never code or
pickles, into huggingface_hub's own cache, which other programs share.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

# A step's name, its total in bytes, and the bytes done since the last call.
Progress = Callable[[str, int, int], None]

_REFERENCE = re.compile(
    r"(?P<explicit>hf:/{1,2})?(?P<name>\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(?P<revision>[\w./-]{1,255}))?", re.ASCII
)
_ADDRESS = re.compile(r"(https?:/+[^/]*|(www\.)?(huggingface\.co|hf\.co)(?=/))/*", re.IGNORECASE)
_REVISION_PAGES = ("tree", "blob", "resolve", "commit")  # behind a name in a web address, before the revision
_SPARE = 1 << 26  # bytes that a download leaves free
_POLL_SECONDS = 0.5
_PROGRAM = """
import json, sys
from huggingface_hub import snapshot_download
try:
    snapshot_download(**json.loads(sys.argv[1]))
except Exception as error:
    sys.exit(print(str(error) or type(error).__name__) or 1)
"""


class HubError(OSError):
    """A name that cannot be fetched from the hub. The message is one sentence that says what to do."""


@dataclass(frozen=True)
class Kind:
    """What is fetched of a repository: ``files`` are patterns of names, less ``not_files``."""

    name: str
    files: tuple[str, ...]
    not_files: tuple[str, ...]


CHECKPOINT = Kind(
    "checkpoint",
    ("model*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "example_prompt.txt"),
    ("*/*",),
)
# Engines are machine code: whoever wants them builds them.
PACKAGE = Kind("package", ("*.onnx", "*.data", "*.json", "*.jinja", "example_prompt.txt"), ("*/*",))


@dataclass(frozen=True)
class Reference:
    """A repository on the hub, at a branch, tag or commit (None: its main branch)."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def reference(text: str | Path) -> Reference | None:
    """Read ``org/name``, ``org/name@revision`` or either behind ``hf://``; None for anything else.

    A Path turns ``hf://`` into ``hf:/``, which is read too.
    """
    found = _REFERENCE.fullmatch(text.as_posix() if isinstance(text, Path) else text)
    return None if found is None else Reference(found["name"], found["revision"])


def is_explicit(text: str | Path) -> bool:
    """Return whether a name begins with ``hf://``, so that it can only be one on the hub."""
    return str(text).startswith("hf:")


def _mistaken(text: str | Path) -> str | None:
    """Return what to write instead of a text that is nearly a name on a hub; None for anything else."""
    written = re.sub(r"^(https?|hf):/+", r"\1://", text.as_posix() if isinstance(text, Path) else text)
    if (address := _ADDRESS.match(written)) is not None:
        path = re.split(r"[?#]", written[address.end() :])[0].split("/")
        revision = f"@{path[3]}" if len(path) > 3 and path[2] in _REVISION_PAGES else ""
        wanted = reference("/".join(path[:2]) + revision)
        meant = "ORGANISATION/NAME" if wanted is None else str(wanted)
        return f"{written} is a web address, which is not fetched; write {meant} or hf://{meant} for a model on the hub"
    if written.endswith("@") and (wanted := reference(written[:-1])) is not None and wanted.revision is None:
        return f"{written} names no revision behind the @; write {wanted} or {wanted}@REVISION"
    return None


def local_directory(text: str | Path, kind: Kind, progress: Progress | None = None) -> Path:
    """Return the directory of a path, or of a name on the hub, which is fetched unless this machine has it.

    A path that exists is returned as it is, and so is one that no hub could have. Raises HubError, which says what to
    write instead of a web address or of a name without its revision.
    """
    path = Path(text)
    if not is_explicit(text) and path.exists():
        return path
    if (why := _mistaken(text)) is not None:
        raise HubError(why)
    wanted = reference(text)
    if wanted is None:
        if is_explicit(text):
            raise HubError(f"{text} is no name on a hub; it must be hf://ORGANISATION/NAME or hf://…/NAME@REVISION")
        return path
    return _Hub(wanted, kind, is_explicit(text)).fetch(progress)


class _Hub:
    """One repository on the hub, fetched with the huggingface_hub library."""

    def __init__(self, wanted: Reference, kind: Kind, explicit: bool):
        self._wanted, self._kind = wanted, kind
        self._here = "" if explicit else f"{kind.name} directory {wanted} does not exist, and "
        try:
            self._library = import_module("huggingface_hub")
            self._constants = import_module("huggingface_hub.constants")
            self._errors = import_module("huggingface_hub.errors")
            self._dry = self._errors.DryRunError
        except (ImportError, AttributeError) as error:
            raise HubError(
                f"{self._here}{wanted} cannot be fetched from a hub without huggingface_hub 1.0 or newer: pip install "
                "'melt-export[hub]'"
            ) from error
        self._cache = Path(self._constants.HF_HUB_CACHE)

    def fetch(self, progress: Progress | None) -> Path:
        """Return the snapshot's directory. Raises HubError."""
        try:
            missing, commit = self._missing()
        except self._dry as error:  # no connection, HF_HUB_OFFLINE, or the hub refuses
            return self._cached(error.__cause__)
        except Exception as error:
            raise self._refused(error) from error
        if missing:
            self._weigh(missing)
        return self._download(commit, missing, progress)

    def _missing(self) -> tuple[int, str | None]:
        """Ask the hub how many bytes have to be fetched, and of which commit."""
        if self._constants.HF_HUB_OFFLINE:
            raise self._dry("offline")
        found = self._snapshot(self._wanted.revision, dry_run=True)
        if not found:
            raise HubError(
                f"{self._wanted} on {self._constants.ENDPOINT} has no file of a {self._kind.name}: "
                f"{', '.join(self._kind.files[:3])}"
            )
        return sum(file.file_size or 0 for file in found if file.will_download), found[0].commit_hash

    def _weigh(self, missing: int) -> None:
        """Raise HubError if the disk has no room for so many bytes."""
        place = self._cache
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if missing + _SPARE > free:
            raise HubError(
                f"{self._wanted} takes {missing:,} bytes and {self._cache} has {free:,} free; make room, or name "
                "another place in HF_HUB_CACHE"
            )

    def _download(self, commit: str | None, missing: int, progress: Progress | None) -> Path:
        """Fetch what is missing, and return the snapshot's directory. Raises HubError.

        The files arrive in a process of their own, because the library's threads would outlive a Ctrl-C. Progress is
        the growth of the cache, whatever way the library takes.
        """
        revision = commit or self._wanted.revision
        if missing:
            blobs = self._cache / f"models--{self._wanted.name.replace('/', '--')}" / "blobs"
            before = seen = _size(blobs)
            with _downloading(self._arguments(revision)) as process:
                while (why := _failure(process, _POLL_SECONDS)) is None:
                    now = min(_size(blobs), before + missing)
                    if progress is not None:
                        progress(f"fetching {self._wanted}", missing, max(now - seen, 0))
                    seen = max(now, seen)
            if why:
                raise self._refused(OSError(why))
        try:
            return Path(self._snapshot(revision, local_files_only=True))
        except Exception as error:
            raise self._refused(error) from error

    def _cached(self, answer: BaseException | None) -> Path:
        """Return the snapshot that this machine has. ``answer``: why the hub gave nothing. Raises HubError."""
        try:
            return Path(self._snapshot(self._wanted.revision, local_files_only=True))
        except Exception as error:
            if isinstance(answer, self._errors.HfHubHTTPError):
                raise self._refused(answer) from answer
            lacking = "is only in part" if isinstance(error, self._errors.IncompleteSnapshotError) else "is not"
            why = f"{self._constants.ENDPOINT} cannot be reached"
            if self._constants.HF_HUB_OFFLINE:
                why = "HF_HUB_OFFLINE forbids to fetch it"
            raise HubError(
                f"{self._here}{self._wanted} {lacking} in this machine's cache {self._cache}, and {why}; fetch it "
                f"where there is a connection (hf download {self._wanted.name}) and bring that cache or directory here"
            ) from error

    def _snapshot(self, revision: str | None, **how: Any) -> Any:
        return self._library.snapshot_download(**self._arguments(revision), tqdm_class=_silent_bars(), **how)

    def _arguments(self, revision: str | None) -> dict[str, Any]:
        """Return the arguments that say which files are meant."""
        files, others = list(self._kind.files), list(self._kind.not_files)
        return {
            "repo_id": self._wanted.name,
            "revision": revision,
            "allow_patterns": files,
            "ignore_patterns": others,
        }

    def _refused(self, error: Exception) -> HubError:
        """Say in one sentence why the hub gave nothing."""
        if isinstance(error, HubError):
            return error
        errors, endpoint = self._errors, self._constants.ENDPOINT
        if isinstance(error, errors.GatedRepoError):
            why = f"its owner asks for consent: give it at {endpoint}/{self._wanted.name}, then `hf auth login`"
        elif isinstance(error, errors.RepositoryNotFoundError):
            why = f"{endpoint} has no such model, or a private one; `hf auth login` shows it who you are"
        elif isinstance(error, errors.RevisionNotFoundError):
            why = f"{endpoint} has no such revision of it"
        else:
            why = " ".join(str(error).split())[:300] or type(error).__name__
        return HubError(f"{self._here}{self._wanted} cannot be fetched from the hub: {why}")


@contextmanager
def _downloading(arguments: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Run ``snapshot_download`` in a process that ends with the block."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", _PROGRAM, json.dumps(arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as made:
        try:
            yield made
        finally:
            made.kill()


def _failure(process: subprocess.Popen[str], seconds: float) -> str | None:
    """Wait for a download. Return why it failed, an empty text if it did not, and None while it runs."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return "" if process.returncode == 0 else said.strip() or f"the download ended with code {process.returncode}"


def _silent_bars() -> type:
    """Return a class of progress bars that draws nothing."""
    bars: Any = import_module("huggingface_hub.utils").tqdm

    class Silent(bars):
        def __init__(self, *positional: Any, **options: Any):
            super().__init__(*positional, **{**options, "disable": True})

    return Silent


def _size(directory: Path) -> int:
    """Return the bytes of a directory's files. Some may go while they are counted."""
    total = 0
    for file in directory.glob("*"):
        try:
            total += file.stat().st_size
        except OSError:
            continue
    return total

"""Session files: safetensors, with a hash over all contents."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..backends.bindings import cache_buffers
from ..backends.positions import host_dtype
from ..decoding.settings import LoopSettings
from ..errors import ArgumentError, MeltError, SessionError
from ..package.files import new_file
from ..package.manifest import Manifest
from ..package.reader import Package
from ..package.specs import MAX_LOOPS
from ..sampling.sampler import Sampler, SamplingParams
from ..text.tokenizer import Message
from ..untrusted import MOST_BYTES, brief, optional, parse_json, shown, whole

FORMAT = "melt-session 1"
_ARRAYS = ("tokens", "depth", "chunk_starts", "chunk_settings")
_ROWS = "rows/"
_HEADER = 1 << 20  # bytes for names and shapes of the arrays


@dataclass(frozen=True)
class Saved:
    """The contents of a session.

    ``tokens``: token ids in the cache, each with its ``depth``. ``pending``: the last sampled token, if it has not run.
    Chunk i begins at ``chunk_starts[i]`` and ran with ``settings[chunk_settings[i]]``. ``positions``: the used cache
    positions by buffer. ``messages``: a chat's messages, else None.
    """

    package: str
    options: dict[str, Any]
    random: dict[str, Any]
    tokens: NDArray[np.int64]
    depth: NDArray[np.int64]
    pending: int | None
    chunk_starts: NDArray[np.int64]
    chunk_settings: NDArray[np.int64]
    settings: list[LoopSettings]
    positions: dict[str, NDArray[Any]]
    messages: tuple[Message, ...] | None = None


def package_hash(package: Package) -> str:
    """Return the hash that ties a session to a package: of the manifest as exported, and so of every file but the
    engines."""
    return package.exported_hash


def write(path: Path, saved: Saved) -> None:
    """Write a session file, whole or not at all, readable by its owner only.

    Raises SessionError, also for a path that is a link, a device or anything else but an ordinary file; ArgumentError
    for options that JSON cannot hold.
    """
    if _cannot_be(path):
        raise SessionError(f"the session cannot be written: {shown(str(path))} can be the name of no file")
    if path.is_symlink():
        raise SessionError(f"{path} is a link, which is not replaced; name a file")
    said = {} if saved.messages is None else {"messages": [asdict(one) for one in saved.messages]}
    try:
        content = json.dumps(
            {
                "options": saved.options,
                "random": saved.random,
                "drawn": saved.pending,
                "length": len(saved.tokens),
                "settings": [_fields(one) for one in saved.settings],
                **said,
            },
            default=_plain,
        )
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ArgumentError(f"the session's options cannot be written to a file: {error}") from error
    arrays = {name: getattr(saved, name) for name in _ARRAYS}
    arrays |= {_ROWS + name: values for name, values in saved.positions.items()}
    metadata = {"format": FORMAT, "package": saved.package, "session": content}
    metadata["sha256"] = _digest(metadata, arrays)
    try:
        with new_file(path, 0o600) as made:
            save_file(arrays, made, metadata)
    except (OSError, SafetensorError) as error:
        raise SessionError(f"the session cannot be written to {path}: {error}") from error


def read(path: Path, package: Package, check: Callable[..., object]) -> Saved:
    """Read a session file. Raises SessionError if it is damaged, of another package, or impossible.

    ``check``: called with the options; raises for invalid ones.
    """
    if _cannot_be(path) or not path.is_file():
        raise SessionError(f"there is no saved session {shown(str(path)) if _cannot_be(path) else path}")
    try:
        size, most = path.stat().st_size, _most_bytes(package.manifest)
        if size > most:
            raise ValueError(f"it has {size:,} bytes; a session of this package has at most {most:,}")
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            names = file.keys()
            arrays = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
        raise SessionError(f"{path} is no saved session, or it is damaged: {brief(error)}") from error
    if metadata.get("format") != FORMAT:
        raise SessionError(f"{path} is no saved session that this runtime reads: its format is not {FORMAT!r}")
    if metadata.pop("sha256", None) != _digest(metadata, arrays):
        raise SessionError(f"{path} was changed or is damaged: its hash is not that of its contents")
    if metadata.get("package") != package_hash(package):
        raise SessionError(
            f"{path} was saved with another package than {package.directory}; open the one it belongs to"
        )
    try:
        saved = _parsed(metadata, arrays)
        _check(saved, package.manifest)
        check(**saved.options)
        Sampler(SamplingParams()).restore(saved.random)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, IndexError, MeltError) as error:
        raise SessionError(f"{path} holds a session that cannot be: {brief(error)}") from error
    return saved


def _fields(settings: LoopSettings) -> dict[str, Any]:
    """Return the settings' fields, without those that older runtimes do not know and that have their default."""
    usual: dict[str, Any] = {
        "start_seed": 0,
        "start_state": None,
        "exit_kl": 0.0,
        "exit_same": 0,
        "exit_entropy": 0.0,
        "exit_margin": 0.0,
    }
    return {name: value for name, value in asdict(settings).items() if name not in usual or value != usual[name]}


def _cannot_be(path: Path) -> bool:
    """Return whether no file system has such a name: it is too long, or has a character that none takes."""
    try:
        path.lstat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    except ValueError:
        return True
    return False


def _most_bytes(manifest: Manifest) -> int:
    """Return the size of a full session's file at most: positions, four integers per token, and the JSON about them."""
    return manifest.cache_bytes(manifest.max_seq_len) + 4 * 8 * (manifest.max_seq_len + 1) + MOST_BYTES + _HEADER


def _parsed(metadata: Mapping[str, str], arrays: dict[str, NDArray[Any]]) -> Saved:
    content = parse_json(metadata["session"])
    known = {name: arrays.pop(name) for name in _ARRAYS}
    if any(not name.startswith(_ROWS) for name in arrays):
        raise ValueError(f"it has more than positions: {', '.join(arrays)}")
    if any(values.dtype != np.int64 or values.ndim != 1 for values in known.values()):
        raise ValueError("tokens, depth and chunks must be lists of whole numbers")
    if not isinstance(content, dict) or content["length"] != len(known["tokens"]):
        raise ValueError("its length is not that of its tokens")
    return Saved(
        package=metadata["package"],
        options=dict(content["options"]),
        random=dict(content["random"]),
        pending=content["drawn"],
        settings=[LoopSettings(**one) for one in content["settings"]],
        positions={name.removeprefix(_ROWS): values for name, values in arrays.items()},
        messages=_messages(content.get("messages")),
        **known,
    )


def _messages(said: Any) -> tuple[Message, ...] | None:
    if said is None:
        return None
    messages = tuple(Message(**one) for one in said)
    if any(not isinstance(text, str) for one in messages for text in (one.role, one.content)):
        raise ValueError("its messages are not text")
    return messages


def _check(saved: Saved, manifest: Manifest) -> None:
    """Raise ValueError for contents that no session of this package can have."""
    length, ids = len(saved.tokens), saved.tokens
    optional(whole(0, manifest.vocab_size - 1))(saved.pending, "the pending token")
    if length > manifest.max_seq_len or ((ids < 0) | (ids >= manifest.vocab_size)).any():
        raise ValueError("its tokens do not fit the cache or the vocabulary")
    if len(saved.depth) != length or ((saved.depth < 1) | (saved.depth > MAX_LOOPS)).any():
        raise ValueError("its depths are not those of its tokens")
    for settings in saved.settings:
        settings.check(manifest)
    starts, which = saved.chunk_starts, saved.chunk_settings
    if len(starts) != len(which) or ((which < 0) | (which >= len(saved.settings))).any():
        raise ValueError("its chunks lack settings")
    ends = np.append(starts, length)
    most = np.array([saved.settings[at].chunk or manifest.chunk for at in which.tolist()], np.int64)
    if ends[0] != 0 or (np.diff(ends) < 1).any() or (np.diff(ends) > most).any():
        raise ValueError("its chunks are not those of its tokens")
    expected = cache_buffers(manifest, int(saved.depth.max())) if length else {}
    if saved.positions.keys() != expected.keys():
        raise ValueError("its positions are not those of the caches")
    for name, state in expected.items():
        shape = (state.bound_shape[1], length, state.bound_shape[3])
        if saved.positions[name].shape != shape or saved.positions[name].dtype != host_dtype(state.dtype):
            raise ValueError(f"its positions of {name} have another type or shape than the cache's")


def _digest(metadata: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 over metadata and over names, types, shapes and contents of all arrays."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, values in sorted(arrays.items()):
        digest.update(json.dumps([name, str(values.dtype), values.shape]).encode())
        digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _plain(value: object) -> object:
    """Convert numbers and collections that JSON does not know."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{value!r} is neither number, text nor list")

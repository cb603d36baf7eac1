"""The schema of ``manifest.json``. Every field is bounded."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from ..errors import PackageError
from ..untrusted import (
    Check,
    FieldError,
    either,
    fields_of,
    flag,
    listed,
    mapping,
    number,
    one_of,
    optional,
    parse_json,
    partly,
    record,
    shown,
    text,
    whole,
)
from .contract import disagreement
from .engine_spec import ENGINE, ENGINE_NAME
from .files import FileSpec
from .manifest import FORMAT_VERSION, MANIFEST, PARITY, Manifest
from .specs import (
    CODA,
    DIALECTS,
    GRAPHS,
    ITEM_BYTES,
    MAX_BATCH,
    MAX_LOOPS,
    NAMED_SIZES,
    NOISE,
    PRECISIONS,
    START_STATES,
    STATE_KINDS,
    GraphSpec,
    StateSpec,
    TensorSpec,
)

_MOST_FILE = 1 << 50  # bytes
_MOST_NAME = 255  # bytes, the limit of file systems


def read_manifest(content: str | bytes) -> Manifest:
    """Parse a manifest. Raises PackageError that names the wrong field, or the parts that contradict each other."""
    try:
        values = parse_json(content)
        if not isinstance(values, dict):
            raise FieldError("it is not a JSON object")
        _check_version(values.get("format_version"))
        manifest = Manifest(**fields_of(values, "", MANIFEST_FIELDS, _LATER))
        problem = disagreement(manifest)
    except ValueError as error:
        raise PackageError(f"{MANIFEST}: {error}") from error
    if problem is not None:
        raise PackageError(f"{MANIFEST}: {problem}")
    return manifest


def _check_version(version: Any) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "update melt-export" if newer else "export the checkpoint again"
        raise FieldError(
            f"the package has format version {shown(version)}, this runtime reads 1 to {FORMAT_VERSION}: {advice}"
        )


def _file_name(value: Any, where: str) -> str:
    """Accept a normalised path inside the package."""
    name: str = text(1024)(value, where)
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise FieldError(f"{where} is {shown(name)}, which leaves the package directory")
    too_long = any(len(part.encode()) > _MOST_NAME for part in path.parts)
    if too_long or path.as_posix() != name or not path.parts or name in (MANIFEST, PARITY):
        raise FieldError(f"{where} is {shown(name)}; it must be the plain name of a file")
    return name


def _graph_file(value: Any, where: str) -> str:
    name = _file_name(value, where)
    if not name.endswith(".onnx"):
        raise FieldError(f"{where} is {shown(name)}; it must end in .onnx")
    return name


def _graph_specs(value: Any, where: str) -> dict[str, GraphSpec]:
    names = (*GRAPHS, *([CODA] if isinstance(value, dict) and CODA in value else []))
    return fields_of(value, where, dict.fromkeys(names, _GRAPH), {})


_NAME, _SIZE = text(), whole()
_SHAPE = listed(either(one_of(*NAMED_SIZES), _SIZE), least=1, most=8)
_TENSOR = record(TensorSpec, {"name": _NAME, "dtype": one_of(*ITEM_BYTES), "shape": _SHAPE})
_GRAPH = record(GraphSpec, {"file": _graph_file, "inputs": listed(_TENSOR), "outputs": listed(_TENSOR)})
_STATE = record(
    StateSpec,
    {
        "input": _NAME,
        "output": _NAME,
        "dtype": one_of(*ITEM_BYTES),
        "shape": _SHAPE,
        "kind": one_of(*STATE_KINDS),
    },
)
_TOKEN_ID = whole(0)
STOP_IDS = either(listed(_TOKEN_ID, most=256), _TOKEN_ID)  # eos_token_id: one id or a list
_MODEL = partly(
    {
        "model_type": _NAME,
        "hidden_size": _SIZE,
        "num_hidden_layers": _SIZE,
        "num_attention_heads": _SIZE,
        "num_key_value_heads": _SIZE,
        "vocab_size": _SIZE,
        "eos_token_id": STOP_IDS,
        "num_prelude_layers": whole(0),
        "num_coda_layers": whole(0),
    }
)
_PATTERNS = listed(text(1024), most=1 << 14)
_KIND = one_of("int8", "int4")
_WEIGHTS = partly(
    {
        "kind": _KIND,
        "block": _SIZE,
        "head": _NAME,
        "method": _NAME,
        "keep": _PATTERNS,
        "int8": _PATTERNS,
        "raised": _PATTERNS,
        "int8_share": number(0, 1),
        "asymmetric": flag,
        "activations": one_of("int8", "float"),
        "calibration": optional(_NAME),
    }
)
_CACHE = partly({"kind": _KIND, "calibration": optional(_NAME)})
_START = partly({"state": one_of(*START_STATES), "std": number(0, 1e6), "generator": one_of(NOISE)})
_LOSS = number(0, 1e308)
_SHARED = partly(
    {
        "how": one_of("last"),
        "text": _NAME,
        "chunk": _SIZE,
        "positions": _SIZE,
        "kl": _LOSS,
        "top1": number(0, 1),
        "perplexity": optional(_LOSS),
        "perplexity_per_loop": optional(_LOSS),
    }
)
_EXIT = partly(
    {
        "criteria": text(256, r"never|[a-z]+:[0-9.e+-]+(,[a-z]+:[0-9.e+-]+)*"),
        "quality": text(32),
        "text": _NAME,
        "tokens": _SIZE,
        "loss": number(-1e308, 1e308),
        "loops": number(0, MAX_LOOPS),
        "full_loops": whole(1, MAX_LOOPS),
        "most_loops": whole(1, MAX_LOOPS),
    }
)


def _complete(inner: Check, *required: str) -> Check:
    """Accept an empty object, or one with the required fields."""

    def check(value: Any, where: str) -> dict[str, Any]:
        found: dict[str, Any] = inner(value, where)
        missing = next((name for name in required if found and found.get(name) is None), None)
        if missing is not None:
            raise FieldError(f"{where} is incomplete: it lacks {missing}")
        return found

    return check


FILE = record(FileSpec, {"sha256": text(64, "([0-9a-f]{64})?"), "bytes": whole(0, _MOST_FILE)})
MANIFEST_FIELDS: dict[str, Check] = {
    "dialect": one_of(*DIALECTS),
    "precision": one_of(*PRECISIONS),
    "max_seq_len": _SIZE,
    "cache_rows": _SIZE,
    "max_batch": whole(1, MAX_BATCH),
    "chunk": _SIZE,
    "loops": whole(1, MAX_LOOPS),
    "exit_threshold": number(0, 1),
    "vocab_size": _SIZE,
    "model": _MODEL,
    "states": listed(_STATE, least=3, most=1 << 14),
    "graphs": _graph_specs,
    "files": mapping(FILE, _file_name, most=1 << 14),
    "untrained": listed(_NAME, most=256),
    "libraries": mapping(_NAME, most=256),
    "format_version": whole(),
    "engines": mapping(ENGINE, ENGINE_NAME, most=256),
    "weights": _complete(_WEIGHTS, "kind", "block", "head", "method"),
    "cache": _complete(_CACHE, "kind"),
    "start": _complete(_START, "state", "std", "generator"),
    "shared_caches": _complete(_SHARED, "how", "text", "chunk", "positions", "kl", "top1"),
    "exit": _complete(_EXIT, "criteria", "quality", "text", "tokens", "loss", "loops", "full_loops"),
}
# Added after format 1; readers that do not know them run the graphs correctly.
_LATER: dict[str, Any] = {"engines": {}, "weights": {}, "cache": {}, "start": {}, "shared_caches": {}, "exit": {}}

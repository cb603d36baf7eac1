"""Limits on what an untrusted tokenizer.json may cost, checked before the tokenizers library builds anything: the
library aborts the process if an allocation fails."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from ..untrusted import shown

MOST_GROWTH = 1 << 13  # output bytes per byte of text; XLNet, which has the most steps, comes to 3,000
MOST_TEMPLATE_IDS = 1024  # added around a text by all templates
MOST_STEPS = 1024  # per part
MOST_CHARACTERS = 1 << 16  # per token, pattern or name
MOST_VALUES = 6_000_000  # per file: three times the largest vocabularies; each takes up to 200 bytes
_CHARSMAP = "precompiled_charsmap"
_COMPATIBILITY = 11  # NFKC and NFKD turn the 3 bytes of U+FDFA into 33
_INNER = ("normalizers", "pretokenizers", "decoders", "processors")


def parse_tokenizer(text: str) -> dict[str, Any]:
    """Parse a tokenizer.json whose cost is bounded. Raises ValueError, in one sentence, for any other."""
    if sum(map(text.count, "[{,")) > MOST_VALUES:
        raise ValueError(f"it has more than the {MOST_VALUES:,} values that are read")
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is too deep") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    _bound_texts(content)
    growth = _growth(content, "normalizer") * _growth(content, "pre_tokenizer") * _repeats(content)
    _bound(growth, "its normalizer, pre_tokenizer and post_processor")
    _bound(_growth(content, "decoder"), "its decoder")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object. Raises ValueError for a repeated name, because readers disagree on which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object names the same thing twice")
    return found


def _bound_texts(content: dict[str, Any]) -> None:
    """Raise ValueError for any text that is too long."""
    todo: list[Any] = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo.extend(one for name, one in value.items() if name != _CHARSMAP and isinstance(one, str | list | dict))
            value = max(value, key=len, default="")
        elif isinstance(value, list):
            todo.extend(one for one in value if isinstance(one, str | list | dict))
            continue
        if len(value) > MOST_CHARACTERS:
            raise ValueError(
                f"the text {shown(value[:60])}... in it has {len(value):,} characters; {MOST_CHARACTERS:,} are read"
            )


def _bound(growth: float, parts: str) -> None:
    if growth > MOST_GROWTH:
        raise ValueError(f"{parts} may make a text more than {MOST_GROWTH:,} times as long")


def _steps(content: dict[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a part, with Sequences flattened.

    Their kind is told by their fields, because the library also reads steps without a type.
    """
    todo = [] if content.get(part) is None else [content[part]]
    count = 0
    while todo:
        step = todo.pop()
        count += 1
        if not isinstance(step, dict):
            raise ValueError(f"{part} has {shown(step)} where a step, an object, is wanted")
        if count > MOST_STEPS:
            raise ValueError(f"{part} has more than {MOST_STEPS:,} steps")
        yield step
        for name in _INNER:
            todo.extend(_list(step.get(name, []), f"{name} of {part}"))


def _growth(content: dict[str, Any], part: str) -> float:
    """Return how many bytes all steps of a part make of one byte, at most."""
    growth = 1.0
    for step in _steps(content, part):
        growth = min(growth * max(1.0, _step_growth(step)), 1e9)  # a product of many large factors would overflow
    return growth


def _step_growth(step: dict[str, Any]) -> float:
    """Return how many bytes a step makes of one byte, at most.

    Added tokens and pre-tokenizers split a text, so a prefix may be added once per character.
    """
    if "content" in step and "pattern" in step:
        return _replaced(step["pattern"], _size(step["content"], "the content of a Replace"))
    if "prepend" in step:
        return 1 + _size(step["prepend"], "what a Prepend adds")
    if _CHARSMAP in step:
        return _longest_replacement(step[_CHARSMAP])
    if "replacement" in step:  # Metaspace
        return 1 + _size(step["replacement"], "the replacement of a Metaspace")
    if step.get("type") == "ByteLevel" or "trim_offsets" in step:
        return 4  # a space in front, and two bytes per byte
    if step.get("type") in ("NFKC", "NFKD"):
        return _COMPATIBILITY
    # WordPiece, BPEDecoder and CTC add a space per token, or per character if their pattern is empty.
    return 2 if any(name in step for name in ("prefix", "suffix", "pad_token")) else 1


def _replaced(pattern: Any, size: int) -> float:
    plain = pattern.get("String") if isinstance(pattern, dict) and len(pattern) == 1 else None
    if isinstance(plain, str) and plain:
        return size / _size(plain, "a pattern")
    return 1 + size  # it may match between any two characters


def _longest_replacement(charsmap: Any) -> int:
    """Return the bytes of the longest replacement in a SentencePiece charsmap: the trie's size in four bytes, the trie,
    and the replacements, each ended by a zero."""
    try:
        content = base64.b64decode(charsmap)
    except (TypeError, ValueError) as error:
        raise ValueError("the charsmap of a Precompiled is not base64") from error
    return max(map(len, content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")))


def _repeats(content: dict[str, Any]) -> int:
    """Return how often the post-processor's templates repeat a text.

    Raises ValueError if they add too many ids or name an undefined token.
    """
    repeats, added = 1, 0
    for step in _steps(content, "post_processor"):
        if "single" not in step and "pair" not in step:
            continue
        defined = _dict(step.get("special_tokens", {}), "special_tokens of a template")
        ids = {
            name: len(_list(_dict(token, "a special token of a template").get("ids", []), "the ids of a special token"))
            for name, token in defined.items()
        }
        single, pair = (_list(step.get(kind, []), f"{kind} of a template") for kind in ("single", "pair"))
        if any(isinstance(piece, dict) and _names_second(piece) for piece in single):
            raise ValueError("the template for one text in its post_processor names a second one")  # a panic when used
        sums = [_template(pieces, ids) for pieces in (single, pair)]
        added += max(count for count, _ in sums)
        repeats = min(repeats * max(1, *(texts for _, texts in sums)), MOST_GROWTH + 1)
    if added > MOST_TEMPLATE_IDS:
        raise ValueError(f"its post_processor adds {added:,} ids to a text; {MOST_TEMPLATE_IDS:,} may be added")
    return repeats


def _names_second(piece: dict[str, Any]) -> bool:
    sequence = piece.get("Sequence")
    return isinstance(sequence, dict) and sequence.get("id") == "B"


def _template(pieces: list[Any], ids: dict[str, int]) -> tuple[int, int]:
    """Return how many ids a template adds, and how many texts it holds."""
    added = texts = 0
    for piece in pieces:
        special = _dict(piece, "a piece of a template").get("SpecialToken")
        if special is None:
            texts += 1
            continue
        name = _dict(special, "a piece of a template").get("id")
        if not isinstance(name, str) or name not in ids:
            raise ValueError(
                f"a template of its post_processor names the token {shown(name)}, which it does not define"
            )
        added += ids[name]
    return added, texts


def _size(value: Any, what: str) -> int:
    """Return the bytes of a text."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}; it must be text")
    return len(value.encode("utf-8", "surrogatepass"))


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}; it must be an object")
    return value


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {shown(value)}; it must be a list")
    return value

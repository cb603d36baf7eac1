"""What a tokenizer.json would make of a text, weighed before the tokenizers library does it: the library has no bounds,
and ends the process where it finds no memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MOST_GROWTH = 100  # times that normalizers, and decoders, may lengthen a text; those of today's models stay below 5
MOST_ADDED = 1024  # ids, pieces of a template or characters that may come to each text
MOST_TOKEN = 16_384  # characters of a token

_LISTS = ("normalizers", "decoders", "processors")  # what a Sequence of each kind names its steps


def weigh_tokenizer(content: Any) -> None:
    """Refuse a tokenizer.json, as JSON reads it, that would take memory or time out of proportion to a text.

    Raises ValueError. What has another form than the library's is left to the library to refuse.
    """
    if not isinstance(content, dict):
        return
    for part in ("normalizer", "decoder"):
        _weigh_growth(part, list(_steps(content.get(part))))
    for step in _steps(content.get("post_processor")):
        if step.get("type") == "TemplateProcessing":
            _weigh_template(step)
    longest = max(map(len, _tokens(content)), default=0)
    if longest > MOST_TOKEN:
        raise ValueError(f"it has a token of {longest:,} characters; {MOST_TOKEN:,} are allowed")


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part of the tokenizer, those of sequences in each other too."""
    waiting = [step]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield one
            for name in _LISTS:
                inner = one.get(name)
                waiting += inner if isinstance(inner, list) else ()


def _weigh_growth(part: str, steps: list[dict[str, Any]]) -> None:
    """Bound how much longer a text becomes when each step makes the most of it."""
    growth, added = 1.0, 0
    for step in steps:
        if step.get("type") == "Replace":
            growth *= max(1.0, _replaced(step.get("pattern"), step.get("content")))
        elif step.get("type") == "Prepend":
            added += len(str(step.get("prepend", "")))
        if growth > MOST_GROWTH:
            raise ValueError(f"its {part} may make a text more than {MOST_GROWTH} times as long")
        if added > MOST_ADDED:
            raise ValueError(f"its {part} puts more than {MOST_ADDED:,} characters before each text")


def _replaced(pattern: Any, content: Any) -> float:
    """How many times as long a text becomes that consists of what a Replace looks for. A regular expression may find
    a single character, or nothing, at each place."""
    literal = pattern.get("String") if isinstance(pattern, dict) else pattern
    size = len(content.encode("utf-8", "surrogatepass")) if isinstance(content, str) else 0
    if isinstance(literal, str) and literal:
        return size / len(literal.encode("utf-8", "surrogatepass"))
    return 1.0 + size


def _weigh_template(step: dict[str, Any]) -> None:
    """Bound what a template adds to a text, and require its tokens."""
    special = step.get("special_tokens")
    known = special if isinstance(special, dict) else {}
    for name in ("single", "pair"):
        pieces = step.get(name)
        if not isinstance(pieces, list):
            continue
        added = len(pieces)
        for piece in pieces:
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            if not isinstance(token, dict):
                continue
            if token.get("id") not in known:
                raise ValueError(
                    f"its post_processor names the token {str(token.get('id'))[:40]!r}, which it does not define"
                )
            entry = known[token.get("id")]
            ids = entry.get("ids") if isinstance(entry, dict) else None
            added += len(ids) if isinstance(ids, list) else 0
        if added > MOST_ADDED:
            raise ValueError(f"its post_processor adds more than {MOST_ADDED:,} tokens to each text")


def _tokens(content: dict[str, Any]) -> Iterator[str]:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        yield from vocabulary
    elif isinstance(vocabulary, list):
        yield from (entry[0] for entry in vocabulary if isinstance(entry, list) and entry and isinstance(entry[0], str))
    added = content.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield entry["content"]

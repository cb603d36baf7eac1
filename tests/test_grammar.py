"""JSON by a schema: whatever the allowed tokens, what they spell parses and fits, for every kind of tokenizer."""

from __future__ import annotations

import gc
import json
import random
import weakref
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from melt_runtime import ArgumentError
from melt_runtime.errors import BusyError
from melt_runtime.server import grammar
from melt_runtime.server.grammar import Grammars, JsonConstraint
from melt_runtime.server.schema_weight import weigh
from melt_runtime.text.tokenizer import TextTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

END = "</s>"
LINES = [
    '{"name": "Ann", "age": 31, "tags": ["a", "b"], "ok": true, "note": null}',
    '{ "city" : "Zürich" , "at" : -12.5e3 }',
    '["日本語", "naïve café", "a b  c", "😀"]',
    "the quick brown fox, an ab and a b",
] * 4


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=[END, "<pad>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=False)])
    return tokenizer


@cache
def metaspace() -> Tokenizer:
    """Pieces begin with U+2581 where words do, and may hold it anywhere."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", END],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@cache
def byte_fallback() -> Tokenizer:
    """Like the tokenizers of Llama 2: U+2581 for spaces, and <0xNN> for what has no delta."""
    deltas = list(json.loads(metaspace().to_str())["model"]["vocab"])
    deltas += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE({delta: i for i, delta in enumerate(deltas)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", END])
    return tokenizer


@cache
def word_pieces() -> Tokenizer:
    """Every word begins with a space, unless it begins the text."""
    deltas = ["<unk>", END, *(chr(code) for code in range(33, 127)), *(f"##{chr(code)}" for code in range(33, 127))]
    tokenizer = Tokenizer(models.WordPiece({delta: i for i, delta in enumerate(deltas)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.add_special_tokens(["<unk>", END])
    return tokenizer


every_kind = pytest.mark.parametrize(
    "make", [byte_level, metaspace, byte_fallback, word_pieces], ids=lambda make: make.__name__
)

ADDRESS = {
    "type": "object",
    "properties": {"street": {"type": "string", "maxLength": 6}, "number": {"type": "integer", "minimum": 1}},
    "required": ["street", "number"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "const": {"const": "ab"},
    "const with spaces": {"const": " a  b "},
    "const that is nested": {"const": {"a b": [1, " b", None, {"b": True}]}},
    "enum": {"enum": ["ab", "a b", " b", "b", 1, 12, None]},
    "integer": {"type": "integer", "minimum": -20, "maximum": 99},
    "number": {"type": "number", "minimum": 0, "exclusiveMaximum": 2.5},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 500},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "short string": {"type": "string", "minLength": 1, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^a[b ]{1,3}c$"},
    "date": {"type": "string", "format": "date"},
    "object": ADDRESS,
    "optional": {**ADDRESS, "required": []},
    "list": {"type": "array", "items": {"enum": ["x y", "z"]}, "minItems": 1, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": " "}], "items": False, "minItems": 2},
    "nested": {"type": "object", "properties": {"a b": ADDRESS}, "required": ["a b"], "additionalProperties": False},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    "both": {"allOf": [{"type": "integer"}, {"minimum": 3, "maximum": 12}]},
    "reference": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}, "maxItems": 2}, "b": {"const": "a b"}},
    },
}


def grammars(make: Callable[[], Tokenizer], rows: int = 0) -> Grammars:
    """rows: how many tokens a model has beyond its tokenizer's."""
    tokenizer = TextTokenizer(make())
    end = tokenizer.token_id(END)
    vocab = SimpleNamespace(vocab_size=tokenizer.vocab_size + rows)
    return Grammars(SimpleNamespace(tokenizer=tokenizer, stop_ids={end}, manifest=vocab))  # type: ignore[arg-type]


def say(constraint: JsonConstraint, end: int, rng: random.Random, most: int = 400) -> list[int] | None:
    """Tokens drawn at random from those that are allowed, until the end; None if it does not come."""
    ids: list[int] = []
    for _ in range(most):
        allowed = np.flatnonzero(constraint.mask(ids)).tolist()
        token = end if end in allowed and (len(allowed) == 1 or rng.random() < 0.2) else rng.choice(allowed)
        if token == end:
            return ids
        constraint.accept(token)
        ids.append(token)
    return None


@every_kind
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_parses_and_fits_its_schema(make: Callable[[], Tokenizer], name: str) -> None:
    if make is word_pieces and name == "const with spaces":
        pytest.skip("words cannot spell two spaces")
    chosen, tokenizer, schema = grammars(make), TextTokenizer(make()), SCHEMAS[name]
    end = tokenizer.token_id(END)
    assert end is not None
    ended = 0
    for seed in range(12):
        ids = say(chosen.constraint(schema), end, random.Random(seed))
        if ids is not None:
            ended += 1
            jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
    assert ended > 8


@every_kind
@pytest.mark.parametrize("schema", [True, {}, {"type": "object"}, {"type": "array", "items": {"type": "string"}}])
def test_free_json_parses(make: Callable[[], Tokenizer], schema: Any) -> None:
    chosen, tokenizer = grammars(make), TextTokenizer(make())
    end = tokenizer.token_id(END)
    assert end is not None
    answers = [say(chosen.constraint(schema), end, random.Random(seed), 150) for seed in range(20)]
    for ids in answers:
        if ids is not None:
            jsonschema.validate(json.loads(tokenizer.decode(ids)), schema)
    assert any(ids is not None for ids in answers)


def allowed_after(constraint: JsonConstraint, tokenizer: Tokenizer, *deltas: str) -> set[str]:
    for delta in deltas:
        constraint.accept(tokenizer.token_to_id(delta))
    return {tokenizer.id_to_token(int(i)) for i in np.flatnonzero(constraint.mask([]))}


def test_a_space_that_a_piece_has_is_part_of_the_json() -> None:
    vocab = {delta: i for i, delta in enumerate(["<unk>", END, '"', "a", "b", "▁", "▁b", "▁a"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "b"), ("▁", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([END])
    chosen = grammars(lambda: tokenizer)
    assert allowed_after(chosen.constraint({"const": "ab"}), tokenizer, '"', "a") == {"b"}
    assert allowed_after(chosen.constraint({"const": "a b"}), tokenizer, '"', "a") == {"▁", "▁b"}


def test_a_piece_that_loses_its_space_at_the_beginning_may_begin() -> None:
    vocab = {delta: i for i, delta in enumerate(["<unk>", END, '"', '▁"', '"▁', '"a', "▁a", "a", "▁"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()  # which drops every space of a first delta
    tokenizer.add_special_tokens([END])
    chosen = grammars(lambda: tokenizer)
    assert allowed_after(chosen.constraint({"const": " a"}), tokenizer) == {'"', '▁"', '"▁'}
    assert allowed_after(chosen.constraint({"const": " a"}), tokenizer, '"▁') == {"▁a", "▁"}


def test_of_tokens_with_the_same_bytes_each_is_allowed() -> None:
    tokenizer = byte_fallback()
    found = allowed_after(grammars(byte_fallback).constraint({"const": "a"}), tokenizer, '"')
    assert {"a", "<0x61>"} <= found


def test_tokens_that_end_a_sequence_are_not_part_of_the_json() -> None:
    tokenizer = byte_level()
    turn = tokenizer.token_to_id("<|turn|>")
    (constraint,) = grammars(byte_level).constraints({"type": "string"}, 1, {turn, tokenizer.token_to_id(END)})
    constraint.accept(tokenizer.token_to_id('"'))
    assert not constraint.mask([])[turn]
    constraint.accept(tokenizer.token_to_id('"'))
    assert np.flatnonzero(constraint.mask([])).tolist() == sorted([turn, tokenizer.token_to_id(END)])


def test_rows_without_a_token_and_special_tokens_are_never_allowed() -> None:
    constraint = grammars(byte_level, rows=9).constraint({"type": "string"})
    constraint.accept(byte_level().token_to_id('"'))
    allowed = constraint.mask([])
    assert len(allowed) == byte_level().get_vocab_size() + 9
    assert not allowed[-9:].any()
    assert not allowed[byte_level().token_to_id("<pad>")]


# What cannot be used


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "string", "pattern": "(a"}, r"regex parse error: \(a error: unclosed group$"),
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "#"}, "no JSON fits it"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "the JSON schema"),
        ({"type": "integer", "minimum": 10**5000}, "cannot be used"),
        ({"const": "\ud800"}, "cannot be used"),
        (False, "no JSON fits false"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_with_the_whole_reason(schema: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says) as caught:
        grammars(byte_level).constraint(schema)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


# Each more that one text has to match doubles what compiling takes: 24 had no end, and gigabytes.
PATTERNS: list[dict[str, Any]] = [{"type": "string", "pattern": f"foo{number}"} for number in range(24)]


def nested(name: str, around: Callable[[Any], Any] | None, anchors: bool = False) -> dict[str, Any]:
    """Patterns that all hold for one text, each inside the one before by a keyword; None: by references."""
    if around is None:
        to = "#{}" if anchors else "#/$defs/{}"
        defs = {f"d{at}": {**one, name: to.format(f"d{at + 1}")} for at, one in enumerate(PATTERNS)}
        defs[f"d{len(PATTERNS)}"] = {"type": "string"}
        named = {key: {"$anchor": key, **one} for key, one in defs.items()} if anchors else defs
        return {"$defs": named, name: to.format("d0")}
    inner: dict[str, Any] = {"type": "string"}
    for one in PATTERNS:
        inner = {**one, name: around(inner)}
    return inner


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 988_027},
        {"type": "number", "multipleOf": 98.8027},
        {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
        {"type": "object", "properties": {f"k{i}": {"type": "integer", "multipleOf": 997 + i} for i in range(100)}},
        {"enum": list(range(60_000))},
        {"const": list(range(20_000))},
        {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(6000)}},
        {"type": "string", "pattern": "(a|b)" * 200_000},
        {"const": "a" * 900_000},
        {"type": "object", "patternProperties": {f"^x{i}$": {"type": "integer"} for i in range(300)}},
        {"allOf": [{"multipleOf": 10**16 + number} for number in range(4000)]},
        {"multipleOf": 10**5000},
        deep(5000),
        {"allOf": PATTERNS},
        {"allOf": [{"type": "object", "properties": {"a": one}} for one in PATTERNS]},
        {"allOf": [{"type": "array", "items": one} for one in PATTERNS]},
        nested("anyOf", lambda inner: [inner]),
        nested("$ref", None),
        nested("$ref", None, anchors=True),
    ],
    ids=[
        *("multiple", "decimal", "combined", "many multiples", "enum", "list", "properties", "pattern", "text"),
        *("patterns for names", "many combined", "digits", "deep"),
        *("patterns at once", "of a property", "of items", "of choices", "of references", "of anchors"),
    ],
)
def test_a_schema_that_would_take_too_much_is_refused_before_it_is_built(
    schema: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = grammars(byte_level)
    monkeypatch.setattr(chosen, "_compile", None)
    with pytest.raises(ArgumentError, match="the JSON schema is too large"):
        chosen.constraint(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "number", "multipleOf": 0.01},
        {"type": "integer", "multipleOf": 1_000_000},
        {"type": "object", "properties": {f"k{i}": {"type": "integer", "multipleOf": i} for i in (7, 11, 13, 17, 19)}},
        {"enum": [f"value {i}" for i in range(40_000)]},
        deep(90),
        {"properties": {"multipleOf": {"type": "string"}, "enum": {"type": "integer"}}},
        {"type": "object", "properties": {f"k{number}": one for number, one in enumerate(PATTERNS)}},
        {"anyOf": PATTERNS},
        {"allOf": PATTERNS[:3], "minLength": 1},
        {"properties": {"pattern": {"type": "string"}, "allOf": {"type": "string"}, "$ref": {"type": "string"}}},
        {"$defs": {"t": {"properties": {"v": PATTERNS[0], "l": {"$ref": "#/$defs/t"}}}}, "$ref": "#/$defs/t"},
    ],
)
def test_what_is_usual_is_not_too_large(schema: Any) -> None:
    assert weigh(schema) <= 10_000
    assert grammars(byte_level).constraint(schema).mask([]).any()


def test_a_call_of_many_choices_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = grammars(byte_level)
    compiled = []
    compile_once = chosen._compile
    monkeypatch.setattr(chosen, "_compile", lambda schema: compiled.append(schema) or compile_once(schema))
    made = chosen.constraints(ADDRESS, 20)
    assert (len(made), len(compiled)) == (20, 1)
    end = byte_level().token_to_id(END)
    answers = {tuple(say(one, end, random.Random(seed)) or ()) for seed, one in enumerate(made)}
    assert len(answers) > 10


def test_large_schemas_for_many_choices_are_refused() -> None:
    schema = {"enum": [f"value {i}" for i in range(40_000)]}
    with pytest.raises(ArgumentError, match="too large for 200 choices at once"):
        grammars(byte_level).constraints(schema, 200)


def test_grammars_that_are_alive_are_bounded_and_give_their_share_back() -> None:
    chosen = grammars(byte_level)
    schema = {"enum": [f"value {i}" for i in range(40_000)]}
    alive = []
    refusal = None
    while refusal is None and len(alive) < 20:
        try:
            alive.append(chosen.constraint(schema))
        except BusyError as error:
            refusal = str(error)
    assert refusal is not None
    assert len(alive) > 5
    gone = weakref.ref(alive[0])
    gc.disable()
    try:
        alive.clear()
        assert gone() is None
        assert chosen.constraint(schema).mask([]).any()
    finally:
        gc.enable()


def test_a_schema_that_was_refused_leaves_its_share() -> None:
    chosen = grammars(byte_level)
    for _ in range(30):
        with pytest.raises(ArgumentError):
            chosen.constraint({"enum": [f"value {i}" for i in range(40_000)], "type": "nonsense"})
    assert chosen.constraint(ADDRESS).mask([]).any()


def test_large_schemas_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = grammars(byte_level)
    monkeypatch.setattr(chosen._budget, "_waiting", grammar._MAX_TURNS)
    with pytest.raises(BusyError, match="large JSON schemas"):
        chosen.constraint({"enum": [f"value {i}" for i in range(40_000)]})
    assert chosen.constraint(ADDRESS).mask([]).any()


class Panic(BaseException):
    """As pyo3 raises one: no Exception."""


def test_a_panic_inside_a_grammar_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise Panic("index out of bounds")

    constraint = grammars(byte_level).constraint(ADDRESS)
    broken: Any = SimpleNamespace(
        is_stopped=lambda: False, is_error=lambda: False, compute_bitmask=fail, consume_token=fail
    )
    monkeypatch.setattr(constraint, "_matcher", broken)
    with pytest.raises(ArgumentError, match="index out of bounds"):
        constraint.mask([])
    with pytest.raises(ArgumentError, match="index out of bounds"):
        constraint.accept(0 if byte_level().token_to_id(END) else 5)

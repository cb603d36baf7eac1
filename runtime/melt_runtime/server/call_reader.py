"""Find the calls of functions in a reply as it arrives.

The reader is a generator that is sent one character at a time, so that each format is read from top to bottom. What
does not become a call of a known function stays text, as it was written.
"""

from __future__ import annotations

import ast
import json
from collections import deque
from collections.abc import Collection, Generator
from typing import Any, TypeVar

from .said import Said
from .tool_formats import ToolFormat

Result = TypeVar("Result")
Reader = Generator[None, str, Result]  # asks for a character with each yield

_BLANK = " \t\r\n"
_MOST_NAME = 512  # characters in which a key, or a call's name before its arguments, must end


class _Malformed(Exception):
    """What was read is no call."""


class _End(Exception):
    """The reply has ended."""


class CallReader:
    """Reads one reply. ``names``: the functions that may be called."""

    def __init__(self, format: ToolFormat, names: Collection[str]):
        self._format, self._names = format, names
        self._said: list[tuple[Any, int, list[str]]] = []  # kind, call, and text in pieces
        self._back: deque[str] = deque()  # characters to be read again
        self._raw: list[str] = []  # characters read since an attempt began
        self._blank = ""  # blanks at the end of the text, dropped if a call follows
        self._count = 0  # calls that have begun
        self._read = 0  # calls that were read to their end
        self._reader = self._reply()
        next(self._reader)

    def feed(self, text: str) -> list[Said]:
        """Take text. Return the pieces that are certain."""
        for character in text:
            self._reader.send(character)
        return self._taken()

    def finish(self) -> list[Said]:
        """Return the rest at the end of the reply."""
        for _ in self._reader:  # asks once more, and is told of the end by None
            pass
        if self._blank and not self._count:
            self._add("text", self._blank)
        return self._taken()

    def _taken(self) -> list[Said]:
        said, self._said = self._said, []
        return [Said(kind, "".join(pieces), call) for kind, call, pieces in said]

    def _reply(self) -> Reader[None]:
        try:
            if self._format.opener:
                while True:
                    yield from self._text_until(self._format.opener)
                    yield from self._attempt(self._after_opener(), self._format.opener)
            yield from self._attempt(self._nothing_but_calls(), "")
            while True:
                self._text((yield from self._next()))
        except _End:
            return

    def _next(self) -> Reader[str]:
        """Return the next character. Raises _End."""
        character = self._back.popleft() if self._back else (yield)
        if not character:
            raise _End
        self._raw.append(character)
        return character

    def _unread(self, text: str) -> None:
        self._back.extendleft(reversed(text))
        del self._raw[len(self._raw) - len(text) :]

    def _attempt(self, reading: Reader[None], opener: str) -> Reader[None]:
        """Read calls. What no call begins with is text: an opener at once, the rest is read again.

        A call that has begun, which a stream has told already, stays a call where its end is broken; the text behind
        what could be read is read again.
        """
        before = self._count
        self._settle()
        try:
            yield from reading
        except _Malformed:
            if self._count == self._read:
                self._text(opener if self._count == before else "")
                self._unread("".join(self._raw))
            else:
                self._unread("".join(self._raw))
                yield from self._closer()
        except _End:
            if self._count == self._read:
                self._text((opener if self._count == before else "") + "".join(self._raw))
            raise

    def _settle(self) -> None:
        """Note that all calls which began were read."""
        self._raw, self._read = [], self._count

    def _after_opener(self) -> Reader[None]:
        if self._format.shape == "named":
            yield from self._named()
        elif self._format.shape == "list":
            yield from self._list()
        else:
            yield from self._object()
            yield from self._closer()

    def _closer(self) -> Reader[None]:
        """Skip what closes a call, if it follows. A part of it at the reply's end is dropped."""
        closer = self._format.closer or ("]" if self._format.shape == "list" else "")
        if closer:
            yield from self._maybe(closer, cut=True)

    def _nothing_but_calls(self) -> Reader[None]:
        for marker in self._format.markers:
            yield from self._maybe(marker)
        if self._format.shape == "python":
            yield from self._python()
        elif self._format.shape == "list":
            yield from self._list()
        else:
            yield from self._object()
            while (yield from self._maybe(";")):
                yield from self._object()

    def _list(self) -> Reader[None]:
        """Read a JSON list of calls."""
        yield from self._expect("[")
        while True:
            yield from self._object()
            if not (yield from self._maybe(",")):
                yield from self._expect("]")
                return

    def _named(self) -> Reader[None]:
        """Read a function's name and the object of its arguments."""
        head = ""
        while not head.endswith(self._format.separator):
            head += yield from self._next()
            if len(head) > _MOST_NAME:
                raise _Malformed
        name = head.removesuffix(self._format.separator).partition("[CALL_ID]")[0].strip(_BLANK)
        self._begin(name)
        first = yield from self._solid()
        if first != "{":
            raise _Malformed
        self._add("arguments", first)
        yield from self._value(first, lambda piece: self._add("arguments", piece))
        self._settle()

    def _object(self) -> Reader[None]:
        """Read the object of one call and begin the call once its name is known."""
        early: list[str] | None = []  # arguments before the name
        given = False

        def more(piece: str) -> None:
            if early is None:
                self._add("arguments", piece)
            else:
                early.append(piece)

        yield from self._expect("{")
        while (key := (yield from self._key())) is not None:
            first = yield from self._solid()
            if key == "name" and early is not None:
                name = _loaded((yield from self._whole(first)))
                self._begin(name)
                begun, early = early, None
                if begun:
                    self._add("arguments", "".join(begun))
            elif key in ("arguments", "parameters") and not given:
                given = True
                yield from self._arguments(first, more)
                if early is None:
                    self._raw = []
            else:
                yield from self._whole(first)
        if early is not None:
            raise _Malformed
        if not given:
            self._add("arguments", "{}")
        self._settle()

    def _arguments(self, first: str, more: Any) -> Reader[None]:
        """Read arguments: an object, one written as text, or null."""
        if first == "{":
            more(first)
            yield from self._value(first, more)
            return
        value = _loaded((yield from self._whole(first)))
        more(value if isinstance(value, str) else "{}" if value is None else json.dumps(value))

    def _key(self) -> Reader[str | None]:
        """Read a key and its colon; None at the object's end."""
        first = yield from self._solid()
        if first == ",":
            first = yield from self._solid()
        if first == "}":
            return None
        if first != '"':
            raise _Malformed
        key = _loaded((yield from self._whole(first, _MOST_NAME)))
        yield from self._expect(":")
        return str(key)

    def _whole(self, first: str, most: int | None = None) -> Reader[str]:
        """Read the rest of a value and return all of it."""
        pieces = [first]
        yield from self._value(first, pieces.append, most)
        return "".join(pieces)

    def _value(self, first: str, more: Any, most: int | None = None) -> Reader[None]:
        """Read a JSON value up to its end, by its brackets and quotes. ``more``: called with each character. ``most``:
        the most characters. Raises _Malformed."""
        if first in ",:]}":
            raise _Malformed
        depth, count = int(first in "{["), 1
        scalar, quoted = first not in '{["', first == '"'
        while depth or quoted or scalar:
            character = yield from self._next()
            if scalar and character in ",]}" + _BLANK:
                self._unread(character)
                return
            if character == "<" and not quoted and self._format.closer.startswith(character):
                self._unread(character)  # no JSON has it here: the call is closed before its value is
                if self._count != self._read:
                    self._raw = []  # it has been passed on
                raise _Malformed
            more(character)
            count += 1
            if most is not None and count > most:
                raise _Malformed
            if quoted and character == "\\":
                more((yield from self._next()))
            elif character == '"':
                quoted = not quoted
            elif not quoted and character in "{[":
                depth += 1
            elif not quoted and character in "}]":
                depth -= 1

    def _python(self) -> Reader[None]:
        """Read a list of Python calls, which is known at the end of the reply."""
        yield from self._expect("[")
        try:
            while True:
                yield from self._next()
        except _End:
            for name, arguments in _python_calls("".join(self._raw), self._names):
                self._begin(name)
                self._add("arguments", arguments)
            raise

    def _text_until(self, marker: str) -> Reader[None]:
        """Pass on text up to a marker."""
        held = ""
        try:
            while held != marker:
                held += yield from self._next()
                while not marker.startswith(held):
                    self._text(held[0])
                    held = held[1:]
        except _End:
            self._text(held)
            raise

    def _maybe(self, text: str, cut: bool = False) -> Reader[bool]:
        """Skip blanks and a text, if it is what follows. Return whether it is. ``cut``: skip a part of it at the
        reply's end, too."""
        read = ""
        try:
            while True:
                read += yield from self._next()
                here = read.lstrip(_BLANK)
                if here == text:
                    return True
                if not text.startswith(here):
                    self._unread(read)
                    return False
        except _End:
            if cut:
                self._raw = []
                raise
            self._unread(read)
            self._back.append("")
            return False

    def _expect(self, character: str) -> Reader[None]:
        if (yield from self._solid()) != character:
            raise _Malformed

    def _solid(self) -> Reader[str]:
        """Return the next character that is not blank."""
        while True:
            character = yield from self._next()
            if character not in _BLANK:
                return character

    def _begin(self, name: Any) -> None:
        """Begin a call. Raises _Malformed for a function that is not offered."""
        if not isinstance(name, str) or name not in self._names:
            raise _Malformed
        self._blank, self._raw = "", []
        self._count += 1
        self._add("call", name)

    def _text(self, text: str) -> None:
        text = self._blank + text
        shown = text.rstrip(_BLANK)
        self._blank = text[len(shown) :]
        if shown:
            self._add("text", shown)

    def _add(self, kind: Any, text: str) -> None:
        """Add a piece, to the last one if they belong together."""
        call = max(self._count - 1, 0) if kind in ("call", "arguments") else 0
        if kind != "call" and self._said and self._said[-1][:2] == (kind, call):
            self._said[-1][2].append(text)
        else:
            self._said.append((kind, call, [text]))


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Malformed from error


def _python_calls(text: str, names: Collection[str]) -> list[tuple[str, str]]:
    """Return names and arguments, in JSON, of a list of Python calls; none where it is anything else."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        if not isinstance(tree, ast.List):
            return []
        found = []
        for call in tree.elts:
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute) or call.args:
                return []
            name = ast.unparse(call.func)
            if name not in names or any(one.arg is None for one in call.keywords):
                return []
            given = {one.arg: ast.literal_eval(one.value) for one in call.keywords}
            found.append((name, json.dumps(given, ensure_ascii=False)))
        return found
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return []

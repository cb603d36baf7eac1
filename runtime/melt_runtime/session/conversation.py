"""A chat: its messages, and a session that holds as much of them as has run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..decoding.settings import LoopSettings
from ..errors import PromptError, SessionError
from ..text.tokenizer import Message
from .session import Session


class Conversation:
    """Messages in turn, from a user and from the model; a turn runs only what is new.

    The prompt of a turn is the whole chat in the package's template. What it has in common with the tokens of the
    session, from the first on, stays in the cache as it ran, at the depth and in the chunks of its time.

    session: its runtime has a chat template; its options are those of all answers. system: a first message, or None.
    notice: is told in a sentence what the user should know. variables: what the template is given beside the messages,
    such as ``{"enable_thinking": False}``.
    """

    def __init__(
        self,
        session: Session,
        system: str | None = None,
        notice: Callable[[str], None] = lambda text: None,
        variables: Mapping[str, Any] | None = None,
    ):
        self.session, self.notice, self.variables = session, notice, dict(variables or {})
        self.opening: tuple[Message, ...] = () if system is None else (Message("system", system),)
        self.turns: list[Message] = []  # user and assistant in turn

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that was said."""
        return (*self.opening, *self.turns)

    @property
    def loops(self) -> LoopSettings:
        """How deep the next answer thinks."""
        return self.session.runtime.options(**self.session.options).loops

    def think(self, loops: int) -> None:
        """Most loops a token from now on. Raises ArgumentError."""
        options = {**self.session.options, "loops": loops}
        request = self.session.runtime.options(**options)
        self.session.options = options
        self.session.runtime.warn(request)

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """The answer to a message, as it comes. ``stopped`` is asked after every chunk and token; what was said by then
        stays in the conversation, and a message without a word of answer is forgotten as if it had never been. Raises
        PromptError, before anything changes, for a message that does not fit."""
        message = Message("user", text)
        ids = self._fit(message)
        known = self._known(ids)
        said: list[str] = []
        over = False
        try:
            self._run(ids, known, stopped)
            for delta in () if stopped() else self.session.deltas(**self._ends()):
                if delta.text:
                    said.append(delta.text)
                    yield delta.text
                over = delta.finish_reason is not None
                if stopped():
                    break
            if not said and not over:
                self.session.truncate(known)
        except KeyboardInterrupt:
            self.session.reset()  # torn off anywhere; the messages are enough to go on
            raise
        finally:
            if said or over:
                self.turns += [message, Message("assistant", "".join(said))]

    def forget(self) -> None:
        """Begins anew, with the system message."""
        self.turns.clear()
        self.session.reset()

    def save(self, path: Path) -> None:
        """Writes the messages and the session to one file. Raises SessionError."""
        self.session.messages = self.messages
        self.session.save(path)

    def load(self, path: Path) -> None:
        """Goes on where a saved conversation stood, with its options and to the very tokens that it would have said.
        Raises SessionError for a file that no chat with this package wrote, and changes nothing; BackendError."""
        from . import file as session_file  # safetensors, which only this needs

        runtime = self.session.runtime
        saved = session_file.read(path, runtime.package, runtime.options)
        if saved.messages is None:
            raise SessionError(f"{path} holds a session without messages; open it with Runtime.load_session")
        count = int(bool(saved.messages) and saved.messages[0].role == "system")
        turns = saved.messages[count:]
        if len(turns) % 2 or any(one.role != ("user", "assistant")[at % 2] for at, one in enumerate(turns)):
            raise SessionError(f"{path} holds messages that are not those of a user and an assistant in turn")
        self.session.restore(saved)
        self.opening, self.turns = saved.messages[:count], list(turns)

    def _ends(self) -> dict[str, Any]:
        """The option that ends an answer with its turn, unless the session's options want no end."""
        options = self.session.options
        if options.get("ignore_eos"):
            return {}
        asked = self.session.runtime.options(**options).stop_ids
        return {"stop_ids": sorted(asked | self.session.runtime.chat_stop_ids)}

    def _known(self, ids: Sequence[int]) -> int:
        """How many of these tokens, from the first on, need not run again."""
        known = _shared(self.session.tokens, ids)
        if self.session.runtime.manifest.cache_loops is None:
            return known
        # The caches of a LoopLM cannot be deepened.
        shallow = (at for at, depth in enumerate(self.session.depth) if depth < self.loops.loops)
        return min(known, next(shallow, known))

    def _run(self, ids: Sequence[int], known: int, stopped: Callable[[], bool]) -> None:
        """Brings the session to these tokens, chunk by chunk, unless it is stopped."""
        session = self.session
        session.truncate(known)
        size = self.loops.chunk or session.runtime.manifest.chunk
        for start in range(known, len(ids), size):
            if stopped():
                return
            session.append(ids[start : start + size])

    def _fit(self, message: Message) -> list[int]:
        """Token ids of the conversation and a new message, less the oldest exchanges if there is no room to answer.
        Raises PromptError for a message that is too long by itself."""
        runtime = self.session.runtime
        capacity = self.session.driver.capacity
        # An answer of one token would be no answer; a quarter of the cache leaves most of it to the conversation.
        room = min(runtime.options(**self.session.options).max_tokens, capacity // 4)
        for start in range(0, len(self.turns) + 1, 2):
            asked = (*self.opening, *self.turns[start:], message)
            ids = runtime.chat_prompt([one.plain() for one in asked], **self.variables)
            if len(ids) + room <= capacity:
                break
        if len(ids) > capacity:
            raise PromptError(f"{len(ids)} tokens do not fit: the cache has room for {capacity}")
        if start:
            del self.turns[:start]
            count = "exchange" if start == 2 else f"{start // 2} exchanges"
            self.notice(f"the conversation no longer fits in {capacity:,} tokens: the oldest {count} dropped")
        return ids


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many entries two sequences begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

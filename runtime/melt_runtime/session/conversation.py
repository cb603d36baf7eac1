"""A chat: its messages, and the session that caches their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..decoding.settings import LoopSettings
from ..errors import ArgumentError, PromptTooLongError, SessionError
from ..sampling.sampler import Sampler
from ..text.tokenizer import Message
from .session import Session


class Conversation:
    """Alternating messages of a user and the model. Each turn runs only new tokens.

    A turn's prompt is the whole chat in the package's template. Its longest common beginning with the session's tokens
    stays in the cache, as it ran, with the depth and chunks of that time.

    ``session``: its runtime needs a chat template; its options apply to all answers. ``system``: a first message, or
    None. ``notice``: called with sentences for the user. ``variables``: passed to the template beside the messages, for
    example ``{"enable_thinking": False}``.
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
        self.turns: list[Message] = []  # user and assistant, alternating
        self.answered = 0  # tokens of the last answer, those without text included

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages so far."""
        return (*self.opening, *self.turns)

    @property
    def loops(self) -> LoopSettings:
        """The loop settings of the next answer."""
        return self.session.runtime.options(**self.session.options).loops

    @property
    def system(self) -> str | None:
        """The system message, or None."""
        return self.opening[0].content if self.opening else None

    @system.setter
    def system(self, text: str | None) -> None:
        self.opening = () if text is None else (Message("system", text),)

    def think(self, loops: int) -> None:
        """Set the most loops per token from now on. Raises ArgumentError."""
        self._set(loops=loops)

    def heat(self, temperature: float) -> None:
        """Set the temperature from now on; the random stream goes on. Raises ArgumentError."""
        self._set(temperature=temperature)
        sampler = Sampler(self.session.runtime.options(**self.session.options).sampling)
        sampler.restore(self.session.sampler.state())
        self.session.sampler = sampler

    def _set(self, **changed: Any) -> None:
        options = {**self.session.options, **changed}
        request = self.session.runtime.options(**options)
        self.session.options = options
        self.session.runtime.warn(request)

    def undo(self) -> str:
        """Forget the last question and its answer. Returns the question. Raises ArgumentError if there is none."""
        if not self.turns:
            raise ArgumentError("the conversation has no question yet")
        question = self.turns[-2].content
        del self.turns[-2:]
        return question

    def retry(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Answer the last question anew, as ``answer`` does; the old answer stays if there is no new one. Raises
        ArgumentError if there is no question."""
        before = list(self.turns)
        question = self.undo()
        kept = list(self.turns)
        try:
            yield from self.answer(question, stopped)
        finally:
            if not self.turns or (kept and self.turns[-1] is kept[-1]):
                self.turns = before

    def answer(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Answer a message; yield the text as it is generated.

        ``stopped``: called after every chunk and token; the text generated until it returns True stays in the
        conversation. A message that got no text at all is dropped again. Raises PromptTooLongError, before any change,
        for a message that does not fit.
        """
        message = Message("user", text)
        self.answered = 0
        ids = self._fit(message)
        known = self._known(ids)
        said: list[str] = []
        over = False
        try:
            self._run(ids, known, stopped)
            for delta in () if stopped() else self.session.deltas(**self._ends()):
                self.answered += 1
                if delta.text:
                    said.append(delta.text)
                    yield delta.text
                over = delta.finish_reason is not None
                if stopped():
                    break
            if not said and not over:
                self.session.truncate(known)
        except KeyboardInterrupt:
            self.session.reset()  # the state may be inconsistent; the messages suffice to go on
            raise
        finally:
            if said or over:
                self.turns += [message, Message("assistant", "".join(said))]

    def forget(self) -> None:
        """Drop all messages but the system message."""
        self.turns.clear()
        self.session.reset()

    def save(self, path: Path) -> None:
        """Write the messages and the session to one file. Raises SessionError."""
        self.session.messages = self.messages
        self.session.save(path)

    def load(self, path: Path) -> None:
        """Continue a saved conversation with its options, token for token as it would have continued.

        Raises SessionError, without changes, for a file that no chat with this package wrote; BackendError.
        """
        from . import file as session_file  # imported here, because only files need safetensors

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
        """Return the option that ends an answer with its turn, unless the session's options have ``ignore_eos``."""
        options = self.session.options
        if options.get("ignore_eos"):
            return {}
        asked = self.session.runtime.options(**options).stop_ids
        return {"stop_ids": sorted(asked | self.session.runtime.chat_stop_ids)}

    def _known(self, ids: Sequence[int]) -> int:
        """Return how many of these tokens, from the first on, are cached."""
        known = _shared(self.session.tokens, ids)
        if self.session.runtime.manifest.cache_loops is None:
            return known
        # A LoopLM's caches cannot get more loops later.
        shallow = (at for at, depth in enumerate(self.session.depth) if depth < self.loops.loops)
        return min(known, next(shallow, known))

    def _run(self, ids: Sequence[int], known: int, stopped: Callable[[], bool]) -> None:
        """Run the tokens behind the first ``known``, chunk by chunk, until stopped."""
        session = self.session
        session.truncate(known)
        size = self.loops.chunk or session.runtime.manifest.chunk
        for start in range(known, len(ids), size):
            if stopped():
                return
            session.append(ids[start : start + size])

    def _fit(self, message: Message) -> list[int]:
        """Return the token ids of the chat and a new message; drop the oldest exchanges if there is no room for an
        answer.

        Raises PromptTooLongError for a message that is too long by itself.
        """
        runtime = self.session.runtime
        capacity = self.session.driver.capacity
        # A quarter of the cache is enough for an answer and leaves the rest to the conversation.
        room = min(runtime.options(**self.session.options).max_tokens, capacity // 4)
        for start in range(0, len(self.turns) + 1, 2):
            asked = (*self.opening, *self.turns[start:], message)
            ids = runtime.chat_prompt([one.plain() for one in asked], **self.variables)
            if len(ids) + room <= capacity:
                break
        if len(ids) > capacity:
            raise PromptTooLongError(f"{len(ids)} tokens do not fit: the cache has room for {capacity}")
        if start:
            del self.turns[:start]
            count = "exchange" if start == 2 else f"{start // 2} exchanges"
            self.notice(f"the conversation no longer fits in {capacity:,} tokens: the oldest {count} dropped")
        return ids


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the length of the common beginning of two sequences."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

"""One sequence on its way: its request, what was drawn, and what may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .driver import LoopSettings, whole_number
from .errors import ArgumentError
from .logits import NextLogits
from .sampling import Sampler, SamplingParams
from .stopping import StopMatcher
from .text import StreamDecoder, TextCodec


@dataclass(frozen=True)
class GenerationOptions:
    """One request: how many tokens, how to draw them, how deep to think and when to stop."""

    loops: LoopSettings
    max_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        whole_number("max_tokens", self.max_tokens)
        if not all(isinstance(i, int) for i in self.stop_ids):
            raise ArgumentError("stop_ids must be whole numbers (token ids)")


@dataclass(frozen=True)
class Generation:
    """A finished sequence. ``finish_reason``: "stop" (a stop id or string), or "length" (max_tokens, or the cache is
    full). ``depth``: loops spent on each token that went through the model, the prompt's included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    depth: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """What one step added to one sequence: text that is safe to show (perhaps ""), the token, and the end, if it is."""

    slot: int
    text: str
    token_id: int
    finish_reason: str | None


class Track:
    """Draws the tokens of one sequence and turns them into text."""

    def __init__(self, slot: int, prompt: Sequence[int], options: GenerationOptions, codec: TextCodec | None):
        self.slot, self.options = slot, options
        self.history = list(prompt)
        self.prompt_tokens = len(prompt)
        self.sampler = Sampler(options.sampling, stream=slot)
        self.decoder = StreamDecoder(codec) if codec is not None else None
        self.matcher = StopMatcher(options.stop)
        self.text: list[str] = []
        self.finish_reason: str | None = None

    def draw(self, logits: NextLogits, room: int) -> Piece:
        """Draws the next token; ``room`` is how many more tokens the cache can take."""
        token = logits.sample(self.slot, self.sampler, self.history)
        self.history.append(token)
        if token in self.options.stop_ids:
            self.finish_reason = "stop"
        elif len(self.history) - self.prompt_tokens >= self.options.max_tokens or room < 1:
            self.finish_reason = "length"
        return Piece(self.slot, self._show(token), token, self.finish_reason)

    def _show(self, token: int) -> str:
        if self.decoder is None:
            return ""
        text = "" if token in self.options.stop_ids else self.decoder.push(token)
        if self.finish_reason is not None:
            text += self.decoder.flush()
        shown, found = self.matcher.push(text)
        if found is None and self.finish_reason is not None:
            shown += self.matcher.flush()
            found = self.matcher.found
        if found is not None:
            self.finish_reason = "stop"
        self.text.append(shown)
        return shown

    def result(self, depth: Sequence[int]) -> Generation:
        """The finished sequence."""
        assert self.finish_reason is not None
        tokens = tuple(self.history[self.prompt_tokens :])
        return Generation("".join(self.text), tokens, self.finish_reason, self.prompt_tokens, tuple(depth))

"""From what was asked to the scheduler's requests."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..package.reader import source_hash
from ..package.specs import MAX_LOOPS
from ..results import Generation
from ..runtime import Runtime
from ..sampling.constraint import Constraint
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from .failures import ApiError
from .grammar import Grammars
from .limits import DEEPER, MAX_SECONDS, MAX_UNREAD, STALLED
from .prompts import encoded
from .schema import Ask, ChatAsk, CompletionAsk
from .streaming import Backlog

COMPLETION_TOKENS = 16  # where a completion does not say; a chat goes on as far as it may
_DEPTH = ("loops", "exit_threshold", "min_loops", "exit_change")
_PASSED = (*_DEPTH, "top_p", "top_k", "min_p", "repetition_penalty", "stop")


@dataclass(frozen=True)
class Job:
    """The requests of one call, a choice each, ``choices`` of every prompt; and how many tokens its prompts have."""

    requests: tuple[Request, ...]
    choices: int
    prompt_tokens: int

    def cached_tokens(self, ends: Mapping[int, Generation]) -> int:
        """How many of the prompts' tokens had been run before the call, as its ends tell, by choice."""
        of_prompts = [range(at, at + self.choices) for at in range(0, len(self.requests), self.choices)]
        known = [[ends[index].cached_tokens for index in prompt if index in ends] for prompt in of_prompts]
        return sum(min(one, default=0) for one in known)


class Service:
    """A package that is being served under a name. ``max_tokens``: the most that a choice may have (None: as many as
    the cache holds); ``max_loops``: the most that a token may have (None: four times the package's); ``max_seconds``:
    the most that a call may take, waiting included; ``max_unread``: how many tokens all clients together may leave
    unread; ``stalled``: seconds without a loop or step after which the scheduler counts as stuck."""

    def __init__(
        self,
        runtime: Runtime,
        scheduler: Scheduler,
        name: str,
        max_tokens: int | None = None,
        max_seconds: float = MAX_SECONDS,
        max_unread: int = MAX_UNREAD,
        max_loops: int | None = None,
        stalled: float = STALLED,
    ):
        self.runtime, self.scheduler, self.name = runtime, scheduler, name
        self.max_seconds, self.backlog, self.stalled = max_seconds, Backlog(max_unread), stalled
        self.max_loops = min(DEEPER * runtime.manifest.loops, MAX_LOOPS) if max_loops is None else max_loops
        self.max_tokens = runtime.manifest.max_seq_len if max_tokens is None else max_tokens
        self.fingerprint = f"melt-{source_hash(runtime.manifest)[:12]}"
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()

    def check_model(self, name: str) -> None:
        """Raises ApiError 404 for another model than this one."""
        if name != self.name:
            message = f"the model {name[:100]!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def job(self, ask: CompletionAsk | ChatAsk) -> Job:
        """What to run for a call. Takes its time: prompts are encoded, grammars compiled. Raises ApiError, MeltError.

        Choice i of a prompt draws with seed + i.
        """
        self.check_model(ask.model)
        count = ask.n or 1
        most = self.scheduler.slots + self.scheduler.max_waiting
        if _prompts(ask) * count > most:
            raise ApiError(400, f"{_prompts(ask) * count} choices are more than the {most} that can run and wait", "n")
        options, deadline = self._options(ask), self._deadline(ask)
        seeds = [None if ask.seed is None else ask.seed + number for number in range(count)]
        chosen = [self.runtime.options(**options, seed=seed) for seed in seeds]
        prompts = encoded(self.runtime, ask)
        requests = [Request(tuple(prompt), one, deadline, _logprobs(ask)) for prompt in prompts for one in chosen]
        for request in requests[::count]:
            request.check(self.runtime.manifest, self.runtime.tokenizer is not None)
        constraints = self._constraints(ask, len(requests), chosen[0].stop_ids)
        pairs = zip(requests, constraints, strict=True)
        return Job(
            tuple(replace(request, constraint=constraint) for request, constraint in pairs),
            count,
            sum(map(len, prompts)),
        )

    def _options(self, ask: CompletionAsk | ChatAsk) -> dict[str, Any]:
        asked = ask.max_tokens
        if isinstance(ask, ChatAsk):
            asked = asked or ask.max_completion_tokens
        if asked is not None and asked > self.max_tokens:
            raise ApiError(400, f"max_tokens is {asked}; this server allows {self.max_tokens}", "max_tokens")
        if ask.loops is not None and ask.loops > self.max_loops:
            raise ApiError(400, f"loops is {ask.loops}; this server allows {self.max_loops}", "loops")
        usual = self.max_tokens if isinstance(ask, ChatAsk) else min(COMPLETION_TOKENS, self.max_tokens)
        passed = {name: getattr(ask, name) for name in _PASSED if getattr(ask, name) is not None}
        if isinstance(ask, ChatAsk) and not ask.ignore_eos:
            passed["stop_ids"] = self.runtime.chat_stop_ids
        return {
            "loops": min(self.runtime.manifest.loops, self.max_loops),
            **passed,
            "max_tokens": asked or usual,
            "temperature": 1.0 if ask.temperature is None else ask.temperature,
            "ignore_eos": bool(ask.ignore_eos),
        }

    def _deadline(self, ask: Ask) -> float:
        if ask.max_seconds is None:
            return self.max_seconds
        if ask.max_seconds > self.max_seconds:
            message = f"max_seconds is {ask.max_seconds:g}; this server allows {self.max_seconds:g}"
            raise ApiError(400, message, "max_seconds")
        return ask.max_seconds

    def _constraints(self, ask: Ask, count: int, stop_ids: Collection[int]) -> Sequence[Constraint | None]:
        """What each choice of a call may say."""
        schema = None if ask.response_format is None else ask.response_format.schema_asked
        if schema is None:
            return [None] * count
        with self._lock:
            if self._grammars is None:
                self._grammars = Grammars(self.runtime)
        return self._grammars.constraints(schema, count, stop_ids)


def _prompts(ask: CompletionAsk | ChatAsk) -> int:
    """How many prompts a call has."""
    several = isinstance(ask, CompletionAsk) and isinstance(ask.prompt, list) and bool(ask.prompt)
    return len(ask.prompt) if several and not isinstance(ask.prompt[0], int) else 1  # type: ignore[union-attr]


def _logprobs(ask: Ask) -> int | None:
    """How many of the likeliest tokens each delta names, as the scheduler takes it."""
    if isinstance(ask, ChatAsk):
        return (ask.top_logprobs or 0) if ask.logprobs else None
    return ask.logprobs if isinstance(ask, CompletionAsk) else None

"""Turn API calls into the scheduler's requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..decoding.exit_options import usual_loops
from ..decoding.prompt_reading import PromptLogprobs
from ..decoding.settings import GenerationOptions
from ..package.reader import source_hash
from ..package.specs import MAX_LOOPS
from ..results import Generation
from ..runtime import Runtime
from ..scheduler.request import Request
from ..scheduler.scheduler import Scheduler
from .chat_schema import ChatBody
from .constraints import Constraints
from .failures import ApiError
from .fields import Strict
from .limits import LOOP_FACTOR, MAX_SECONDS, MAX_UNREAD, STALLED
from .prompts import chat_encoded, prompt_texts, prompts_encoded
from .replies import Echo
from .reply_parser import Reading
from .schema import CompletionBody, RequestBody
from .streaming import Backlog
from .tool_formats import model_format

COMPLETION_TOKENS = 16  # a completion's default; a chat's is the maximum
_DEPTH = (
    "loops",
    "exit_threshold",
    "min_loops",
    "exit_change",
    "exit_kl",
    "exit_same",
    "exit_entropy",
    "exit_margin",
    "exit",
    "exit_at_step",
    "start_seed",
    "start_state",
)
_SAMPLING = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")


@dataclass(frozen=True)
class Job:
    """The requests of one call: ``choices`` for each prompt, of which ``told`` are returned. ``prompt_tokens``: of all
    prompts, each counted once. ``echoes``: by prompt, the text that replies begin with. ``reading``: how replies are
    taken apart."""

    requests: tuple[Request, ...]
    choices: int
    prompt_tokens: int
    told: int
    echoes: tuple[str, ...] = ()
    reading: Reading | None = None

    def echo(self, index: int) -> Echo | None:
        """Return the prompt that a request's reply begins with; None: it begins with the answer."""
        if not self.echoes:
            return None
        request = self.requests[index]
        reading = request.reading if isinstance(request.reading, PromptLogprobs) else None
        return Echo(self.echoes[index // self.choices], request.prompt, reading)

    def cached_tokens(self, ends: Mapping[int, Generation]) -> int:
        """Return how many prompt tokens did not have to run. ``ends``: by request."""
        of_prompts = [range(at, at + self.choices) for at in range(0, len(self.requests), self.choices)]
        known = [[ends[index].cached_tokens for index in prompt if index in ends] for prompt in of_prompts]
        return sum(min(one, default=0) for one in known)


class Service:
    """A package served under a name.

    ``max_tokens``: the most per choice (None: what the cache holds). ``max_loops``: the most per token (None: four
    times the package's). ``max_seconds``: the most per call, with waiting. ``max_unread``: tokens that all clients
    together may leave unread. ``stalled``: seconds without a loop or step after which the scheduler counts as stuck.
    ``pipeline``: as in ``GenerationOptions``, for all requests.
    """

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
        pipeline: str = "auto",
    ):
        self.runtime, self.scheduler, self.name = runtime, scheduler, name
        self.max_seconds, self.backlog, self.stalled = max_seconds, Backlog(max_unread), stalled
        most = runtime.manifest.most_loops or MAX_LOOPS
        self.max_loops = min(most, LOOP_FACTOR * runtime.manifest.loops if max_loops is None else max_loops)
        self.max_tokens = runtime.manifest.max_seq_len if max_tokens is None else max_tokens
        self._max_tokens_set = max_tokens is not None
        self.fingerprint = f"melt-{source_hash(runtime.manifest)[:12]}"
        self.pipeline = pipeline
        self.format = None if runtime.tokenizer is None else model_format(runtime.tokenizer)
        self._constraints = Constraints(runtime)

    def check_model(self, name: str) -> None:
        """Raise ApiError 404 for another model's name."""
        if name != self.name:
            message = f"the model {name[:100]!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def job(self, call: CompletionBody | ChatBody) -> Job:
        """Make the requests of a call. Takes time: encodes prompts and compiles grammars. Raises ApiError, MeltError.

        Choice i of a prompt uses the seed + i.
        """
        self.check_model(call.model)
        completion = call if isinstance(call, CompletionBody) else None
        count = call.n or 1 if completion is None else completion.chosen_from
        most = self.scheduler.slots + self.scheduler.max_waiting
        if _prompts(call) * count > most:
            field = "n" if completion is None else completion.count_field
            message = f"{_prompts(call) * count} choices are more than the {most} that can run and wait"
            raise ApiError(400, message, field)
        options, deadline = self._options(call), self.deadline(call.max_seconds)
        reading: Reading | None = None
        asked = self.runtime.options(**options, seed=_seed(call.seed))
        if isinstance(call, ChatBody):
            prompt, reading = chat_encoded(self.runtime, call, self.format)
            prompts: Sequence[list[int]] = [prompt]
            if reading is not None and self.runtime.tokenizer is not None:
                asked = replace(asked, shown_ids=reading.shown(self.runtime.tokenizer))
        else:
            prompts = prompts_encoded(self.runtime, call.prompt)
        chosen = self._by_seed(asked, count)
        logprobs = 0 if count > (call.n or 1) and _logprobs(call) is None else _logprobs(call)  # best_of compares them
        requests = [Request(tuple(prompt), one, deadline, logprobs) for prompt in prompts for one in chosen]
        for request in requests[::count]:
            request.check(self.runtime.manifest, self.runtime.tokenizer is not None)
        if completion is not None:
            requests = [_scored(request, completion) for request in requests]
        constraints = self._constraints.of(call, reading, [one.prompt for one in requests], asked.stop_ids)
        pairs = zip(requests, constraints, strict=True)
        echoes = () if completion is None or not completion.echo else prompt_texts(self.runtime, completion, prompts)
        return Job(
            tuple(replace(request, constraint=constraint) for request, constraint in pairs),
            count,
            sum(map(len, prompts)),
            call.n or 1,
            echoes,
            reading,
        )

    def _by_seed(self, options: GenerationOptions, count: int) -> list[GenerationOptions]:
        """Return the options of each choice of a prompt: choice i uses the seed + i."""
        if options.sampling.seed is None:
            return [options] * count
        seeds = range(options.sampling.seed, options.sampling.seed + count)
        return [replace(options, sampling=replace(options.sampling, seed=seed)) for seed in seeds]

    def _options(self, call: CompletionBody | ChatBody) -> dict[str, Any]:
        asked = call.max_tokens
        if isinstance(call, ChatBody):
            asked = asked or call.max_completion_tokens
        elif asked == 0:
            asked = 1  # of a request that ends before it
        if asked is not None and asked > self.max_tokens:
            if self._max_tokens_set:
                field = call.limit_field
                raise ApiError(400, f"{field} is {asked}; this server allows {self.max_tokens}", field)
            asked = self.max_tokens  # a full cache ends the answer, as it does with less
        usual = self.max_tokens if isinstance(call, ChatBody) else min(COMPLETION_TOKENS, self.max_tokens)
        passed = {name: getattr(call, name) for name in (*_SAMPLING, "stop") if getattr(call, name) is not None}
        if isinstance(call, ChatBody) and not call.ignore_eos:
            passed["stop_ids"] = self.runtime.chat_stop_ids
        return {
            **self.depth(call),
            **_as_here(passed),
            "max_tokens": asked or usual,
            "temperature": 1.0 if call.temperature is None else call.temperature,
            "ignore_eos": bool(call.ignore_eos),
            "pipeline": self.pipeline,
        }

    def depth(self, call: Strict) -> dict[str, Any]:
        """Return the options of depth that a call asks for. Raises ApiError."""
        asked = {name: getattr(call, name) for name in _DEPTH if getattr(call, name, None) is not None}
        if asked.get("loops", 0) > self.max_loops:
            raise ApiError(400, f"loops is {asked['loops']}; this server allows {self.max_loops}", "loops")
        about = asked.get("exit"), asked.get("min_loops", 1), asked.get("exit_at_step")
        usual = usual_loops(self.runtime.manifest, *about)
        return {"loops": min(usual, self.max_loops), **asked}

    def deadline(self, asked: float | None) -> float:
        """Return the seconds that a call may take. Raises ApiError."""
        if asked is None:
            return self.max_seconds
        if asked > self.max_seconds:
            message = f"max_seconds is {asked:g}; this server allows {self.max_seconds:g}"
            raise ApiError(400, message, "max_seconds")
        return asked

    def check_width(self, dimensions: int | None) -> None:
        """Raise ApiError for embeddings of another size than the hidden state's."""
        width = int(self.runtime.manifest.states[0].shape[-1])
        if dimensions not in (None, width):
            raise ApiError(400, f"dimensions is {dimensions}; this model's embeddings have {width}", "dimensions")


def _as_here(asked: dict[str, Any]) -> dict[str, Any]:
    """Return sampling options without the values that only other servers have: a top_k of -1, which is off, and a top_p
    of 0, which takes the likeliest token."""
    known = {**asked, "top_k": 0} if asked.get("top_k") == -1 else asked
    return {**known, "top_p": 1.0, "top_k": 1} if asked.get("top_p") == 0 else known


def _seed(asked: int | None) -> int | None:
    """Return a client's seed as one from 0 on; None: a new one for each request, which other servers also write as
    -1."""
    return None if asked in (None, -1) else asked % (1 << 64)


def _prompts(call: CompletionBody | ChatBody) -> int:
    """Return the number of prompts in a call."""
    several = isinstance(call, CompletionBody) and isinstance(call.prompt, list) and bool(call.prompt)
    return len(call.prompt) if several and not isinstance(call.prompt[0], int) else 1  # type: ignore[union-attr]


def _scored(request: Request, call: CompletionBody) -> Request:
    """Return a request that reads its prompt's logprobs and ends after the prompt, as far as the call asks for it."""
    reading = PromptLogprobs(request.prompt, call.logprobs) if call.echo and call.logprobs is not None else None
    return replace(request, reading=reading, prompt_only=call.max_tokens == 0)


def _logprobs(call: RequestBody) -> int | None:
    """Return how many of the likeliest tokens each delta reports; None: no logprobs."""
    if isinstance(call, ChatBody):
        return (call.top_logprobs or 0) if call.logprobs else None
    return call.logprobs if isinstance(call, CompletionBody) else None

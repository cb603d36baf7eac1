"""The Python API: load a package once, then generate, stream, or hold sessions."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, overload

from .backends.base import Backend
from .decoding.generator import Generator, check_not_empty, check_request
from .decoding.loop_driver import LoopDriver
from .decoding.loop_states import loop_states
from .decoding.prefix_cache import Prefixes
from .decoding.request_options import GenerateOptions
from .decoding.settings import GenerationOptions
from .decoding.state_memory import Memory, memory
from .decoding.state_pool import StatePool
from .errors import ArgumentError
from .loaded_model import LoadedModel
from .package.reader import Package
from .results import Generation, LoopStates
from .session.session import Session
from .text.prompts import Array, Prompt, separate
from .text.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from .awaiting import Awaiting


class Runtime(LoadedModel):
    """A loaded package::

        runtime = Runtime.load("package")
        print(runtime.generate("2+2=", loops=4).text)
        for delta in runtime.stream("Once upon a time", max_tokens=64):
            print(delta, end="")

    and in a coroutine, whose event loop goes on meanwhile::

        print((await runtime.agenerate("2+2=", loops=4)).text)
        async for delta in runtime.astream("Once upon a time", max_tokens=64):
            print(delta, end="")

    Safe for any number of threads; concurrent calls do not change each other's results. Calls of ``generate`` run one
    after another. ``generate`` and ``stream`` share one set of state buffers, allocated at the first call. A stream
    that starts while they are in use gets its own until it ends; if there is no memory for that, it takes over the
    buffers of the stream that was read longest ago, and reading that one raises OvertakenError. All errors are
    MeltErrors.
    """

    def __init__(self, package: Package, backend: Backend, tokenizer: TextTokenizer | None, backend_reason: str = ""):
        super().__init__(package, backend, tokenizer, backend_reason)
        self._states = StatePool(self.driver)
        self._generating = threading.RLock()

    @cached_property
    def _awaiting(self) -> Awaiting:
        from .awaiting import Awaiting  # asyncio is large, and most programs do without it

        return Awaiting()

    def session(self, *, prefixes: Prefixes | None = None, **options: Unpack[GenerateOptions]) -> Session:
        """Open a conversation with its own state. Raises ArgumentError, BackendError.

        ``options``: as in ``generate``, the defaults of all its calls. ``prefixes``: a store of prompt beginnings that
        need not run again.
        """
        return Session(self, prefixes=prefixes, **options)

    def load_session(self, path: Path | str, *, prefixes: Prefixes | None = None) -> Session:
        """Load a saved session. Raises SessionError, BackendError."""
        return Session.load(self, path, prefixes=prefixes)

    def memory(self, max_seq_len: int | None = None, batch: int = 1) -> Memory:
        """Return the memory that a session of this batch would need. Raises ArgumentError.

        ``max_seq_len``: as if the package had been exported for this many tokens; None: the package's own.
        """
        return memory(self.manifest, self.backend, max_seq_len, batch)

    def state_bytes(self, batch: int = 1) -> int:
        """Return the bytes of state per session of this batch. The number of loops does not change it."""
        return self.manifest.state_bytes(batch)

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, prompt: str, **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Unpack[GenerateOptions]) -> Generation: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    @overload
    def generate(self, prompt: Array, **options: Unpack[GenerateOptions]) -> Any: ...
    def generate(self, prompt: Any, **options: Unpack[GenerateOptions]) -> Generation | list[Generation]:
        """Continue a prompt, or each of several prompts. Raises PromptError, ArgumentError, BackendError.

        A prompt is a string or token ids: a list, a NumPy array or a tensor. An array of two axes holds several
        prompts.

        Options: max_tokens=256, loops (the package's), exit_threshold (the package's), chunk (the package's),
        min_loops=1, exit_change=None (0), exit_kl=None (0), exit_same=None (0), exit_entropy=None (0),
        exit_margin=None (0), exit=None, exit_at_step=None, start_seed=0, start_state=None, temperature=0, top_k=0,
        top_p=1, min_p=0, repetition_penalty=1, seed=None, frequency_penalty=0, presence_penalty=0, logit_bias=None,
        stop=None (a string or several), stop_ids=None, ignore_eos=False. LoopSettings and SamplingParams explain them.

        Prompts of different lengths run together, at most the package's max_batch at a time, and each result is the
        same as if it ran alone. With a temperature, sampling depends on the seed and the prompt's place in the list, so
        that a prompt given several times gets several answers.
        """
        return self._generate(prompt, options)

    @overload
    async def agenerate(  # type: ignore[overload-overlap]  # a str is a sequence of str
        self, prompt: str, **options: Unpack[GenerateOptions]
    ) -> Generation: ...
    @overload
    async def agenerate(self, prompt: Sequence[int], **options: Unpack[GenerateOptions]) -> Generation: ...
    @overload
    async def agenerate(
        self, prompt: Sequence[str] | Sequence[Sequence[int]], **options: Unpack[GenerateOptions]
    ) -> list[Generation]: ...
    @overload
    async def agenerate(self, prompt: Array, **options: Unpack[GenerateOptions]) -> Any: ...
    async def agenerate(self, prompt: Any, **options: Unpack[GenerateOptions]) -> Generation | list[Generation]:
        """Generate as ``generate`` does, without blocking the event loop.

        A call whose task is cancelled ends at its next token, or is not begun. For many requests at once, ``Scheduler``
        runs them together.
        """
        return await self._awaiting.call(lambda left: self._generate(prompt, options, left))

    def _generate(
        self, prompt: Any, options: GenerateOptions, left: threading.Event | None = None
    ) -> Generation | list[Generation]:
        """Generate until the end, or until ``left`` is set, when nobody reads the result."""
        given, single = separate(prompt)
        prompts = [self.encode(one) for one in given]
        request = self.options(**options)
        check_request(
            prompts, [self.manifest.max_seq_len] * len(prompts), self.manifest, request, self.tokenizer is not None
        )
        self.warn(request)
        results: list[Generation] = []
        with self._generating:
            for start in range(0, len(prompts), self.manifest.max_batch):
                results += self._together(prompts[start : start + self.manifest.max_batch], request, start, left)
        return results[0] if single and results else results

    def _together(
        self, prompts: list[list[int]], request: GenerationOptions, first: int, left: threading.Event | None
    ) -> list[Generation]:
        if left is not None and left.is_set():
            return []
        with self._states.lease(len(prompts)) as lease, lease.step() as driver:
            generator = Generator(driver, prompts, request, self.tokenizer, streamed=False, first=first)
            for _ in generator:
                if left is not None and left.is_set():
                    return []
            return generator.results()

    def loops(
        self,
        prompt: Prompt,
        *,
        loops: int | None = None,
        chunk: int | None = None,
        start_seed: int = 0,
        start_state: str | None = None,
        logits: bool = True,
    ) -> LoopStates:
        """Run a prompt, no token leaving early, and return hidden states and logits after every loop.

        Options as in ``generate``; ``logits`` False leaves out the logits, which are as wide as the vocabulary. Raises
        PromptError, ArgumentError, BackendError.
        """
        ids = self.encode(prompt)
        depth = self.options(
            loops=loops, chunk=chunk, exit_threshold=1.0, start_seed=start_seed, start_state=start_state
        ).loops
        check_not_empty(ids)
        with self._generating, self._states.lease(1) as lease, lease.step() as driver:
            return loop_states(driver, driver.check([ids])[0].tolist(), depth, logits=logits)

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Continue one prompt and yield text as it is generated: whole characters, never part of a stop string.

        Options: as in ``generate``. The prompt is checked at the call, not at the first delta.
        """
        if self.tokenizer is None:
            raise ArgumentError("the package has no tokenizer; use generate with token ids")
        ids, request = self.encode(prompt), self.options(**options)
        check_request([ids], [self.manifest.max_seq_len], self.manifest, request, self.tokenizer is not None)
        self.warn(request)

        def begin(driver: LoopDriver) -> Iterator[str]:
            return filter(None, map(attrgetter("text"), Generator(driver, [ids], request, self.tokenizer)))

        return self._states.steps(1, begin)

    def astream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncGenerator[str, None]:
        """Continue one prompt as ``stream`` does, for ``async for``, without blocking the event loop.

        The prompt is checked at the call. A stream whose task is cancelled ends after its current token. To end it
        early, close it (``aclose``, or ``contextlib.aclosing``).
        """
        return self._awaiting.iterate(self.stream(prompt, **options))

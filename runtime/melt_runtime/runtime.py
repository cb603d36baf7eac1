"""The Python API: load a package once, then generate, stream, or hold sessions of your own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Unpack, overload

from .backends.base import Backend
from .decoding.generator import Generator, check_request
from .decoding.loop_driver import LoopDriver
from .decoding.prefix_cache import Prefixes
from .decoding.request_options import GenerateOptions
from .decoding.settings import GenerationOptions
from .decoding.state_memory import Memory, memory
from .decoding.state_pool import StatePool
from .errors import ArgumentError
from .loaded_model import LoadedModel
from .package.reader import Package
from .results import Generation
from .session.session import Session
from .text.prompts import Array, Prompt, separate
from .text.tokenizer import TextCodec


class Runtime(LoadedModel):
    """A package, loaded::

        runtime = Runtime.load("package")
        print(runtime.generate("2+2=", loops=4).text)
        for delta in runtime.stream("Once upon a time", max_tokens=64):
            print(delta, end="")

    For any number of threads: each call gives what it gives alone. Calls of ``generate`` wait for each other. They and
    ``stream`` reuse one set of state buffers, allocated at the first call; a stream that is read while another call
    has them has a set of its own until it ends. Where there is no memory for that, the call takes the buffers of the
    stream that was read longest ago, which raises OvertakenError when it is read again. Raises errors of the MeltError
    family only.
    """

    def __init__(self, package: Package, backend: Backend, codec: TextCodec | None, backend_reason: str = ""):
        super().__init__(package, backend, codec, backend_reason)
        self._states = StatePool(self.driver)
        self._generating = threading.RLock()

    def session(self, *, prefixes: Prefixes | None = None, **options: Unpack[GenerateOptions]) -> Session:
        """A conversation with state of its own. ``options``, as of ``generate``, hold for all its calls; ``prefixes``:
        beginnings of prompts that need not run again. Raises ArgumentError, BackendError."""
        return Session(self, prefixes=prefixes, **options)

    def load_session(self, path: Path | str, *, prefixes: Prefixes | None = None) -> Session:
        """A session as it was saved. Raises SessionError, BackendError."""
        return Session.load(self, path, prefixes=prefixes)

    def memory(self, max_seq_len: int | None = None, batch: int = 1) -> Memory:
        """What a session of this batch would cost, before it is made. ``max_seq_len``: were the package exported for
        so many tokens; None: as it is. Raises ArgumentError."""
        return memory(self.manifest, self.backend, max_seq_len, batch)

    def state_bytes(self, batch: int = 1) -> int:
        """Bytes of state that a session of this batch allocates, whatever the number of loops."""
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
        """Continues a prompt, or each of a list of prompts; a prompt is a string or token ids: a list, a NumPy array
        or a tensor, of which two axes are several prompts.

        Options: max_tokens=256, loops (the package's), exit_threshold (the package's), chunk (the package's),
        min_loops=1, exit_change=0, temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, seed=None,
        stop=None (a string or several), stop_ids=None, ignore_eos=False; LoopSettings and SamplingParams say what
        they mean. Prompts of different lengths run together, at most the package's max_batch
        at a time; each gives what it gives alone. With a temperature each draws by the seed and its place in the list,
        so that a prompt given several times has several answers. Raises PromptError, ArgumentError, BackendError.
        """
        given, single = separate(prompt)
        prompts = [self.encode(one) for one in given]
        request = self.options(**options)
        check_request(
            prompts, [self.manifest.max_seq_len] * len(prompts), self.manifest, request, self.codec is not None
        )
        self.warn(request)
        results: list[Generation] = []
        with self._generating:
            for start in range(0, len(prompts), self.manifest.max_batch):
                results += self._together(prompts[start : start + self.manifest.max_batch], request, start)
        return results[0] if single else results

    def _together(self, prompts: list[list[int]], request: GenerationOptions, first: int) -> list[Generation]:
        with self._states.lease(len(prompts)) as lease, lease.step() as driver:
            generator = Generator(driver, prompts, request, self.codec, streamed=False, first=first)
            for _ in generator:
                pass
            return generator.results()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Iterator[str]:
        """Continues one prompt and yields text as it comes: whole characters, never part of a stop string.

        Options as in ``generate``. The prompt is checked at the call, not at the first delta.
        """
        if self.codec is None:
            raise ArgumentError("the package has no tokenizer; use generate with token ids")
        ids, request = self.encode(prompt), self.options(**options)
        check_request([ids], [self.manifest.max_seq_len], self.manifest, request, self.codec is not None)
        self.warn(request)

        def begin(driver: LoopDriver) -> Iterator[str]:
            return filter(None, map(attrgetter("text"), Generator(driver, [ids], request, self.codec)))

        return self._states.steps(1, begin)

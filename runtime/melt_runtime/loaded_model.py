"""A package loaded into a backend, with its tokenizer: shared by sessions, the scheduler and the Python API."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

from melt_hub import PACKAGE, HubError, is_explicit, local_directory

from .backends.base import Backend
from .backends.large_pages import NewMemory
from .backends.open import open_backend
from .decoding.early_exit import depth_warnings
from .decoding.exit_options import exit_options, usual_loops
from .decoding.loop_driver import LoopDriver
from .decoding.pipeline_choice import PipelineChoice
from .decoding.request_options import GenerateOptions, plain_options
from .decoding.settings import GenerationOptions, LoopSettings
from .errors import ArgumentError, MeltWarning, PackageError, PromptError
from .package.example_prompt import example_prompt
from .package.manifest import Manifest
from .package.reader import Package
from .sampling.sampler import SamplingParams
from .text.end_tokens import end_tokens
from .text.prompts import Prompt, token_ids
from .text.stop_strings import stop_strings, stop_tokens
from .text.tokenizer import TextTokenizer


class LoadedModel:
    """A loaded package, ready to open states; ``Runtime`` adds generation. All errors are MeltErrors."""

    def __init__(self, package: Package, backend: Backend, tokenizer: TextTokenizer | None, backend_reason: str = ""):
        self.package, self.backend, self.tokenizer = package, backend, tokenizer
        self.backend_reason = backend_reason  # a sentence that says why this backend was chosen
        self.end_tokens = end_tokens(package, tokenizer)
        self.stop_ids = {token.id for token in self.end_tokens if not token.chats_only}
        self.chat_stop_ids = {token.id for token in self.end_tokens}  # with those that end only a chat's answers
        self._warned: set[str] = set()
        self._pipeline_choice = PipelineChoice()

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        backend: str = "auto",
        threads: int | None = None,
        low_memory: bool = False,
        engine: str | None = None,
        device: int = 0,
        check_hashes: bool = True,
        expected_hash: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Self:
        """Open a package directory. Raises PackageError, BackendError, ArgumentError.

        ``hf://org/name[@revision]`` is fetched from a hub into huggingface_hub's cache, unless it is there.

        ``backend``: "tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt-rtx", "onnxruntime" (CPU), or "auto" for the
        first of tensorrt, onnxruntime-cuda and onnxruntime that can run the package here; ``backend.name`` and
        ``backend_reason`` tell which was chosen and why.

        ``device``: index of the NVIDIA device. ``engine`` (tensorrt only): the name of one of the package's engines;
        None takes the first that runs here. ``threads`` (CPU only): None takes the physical cores, and
        on Linux only as many of them as other processes leave free at the moment; a number is kept.

        ``low_memory`` (CPU only): leave weights memory-mapped, so that each loop takes several times longer. Otherwise
        an fp16 package needs twice its size in memory, because CPUs compute in float32.

        ``expected_hash``: refuse a package whose hash, as shown by ``melt-run inspect``, differs. ``progress``: called
        with the number of bytes hashed since its last call.
        """
        directory, memory = _local(directory), NewMemory()
        package = Package.open(directory, check_hashes=check_hashes, expected_hash=expected_hash, progress=progress)
        tokenizer = load_tokenizer(package)
        opened = open_backend(package, backend, threads, low_memory, engine, device, check_hashes)
        memory.in_large_pages()
        return cls(package, opened.backend, tokenizer, opened.reason)

    @property
    def manifest(self) -> Manifest:
        """The package's manifest."""
        return self.package.manifest

    @property
    def example_prompt(self) -> str | None:
        """The package's example prompt, or None. Raises PackageError."""
        return example_prompt(self.package)

    def driver(self, batch: int = 1) -> LoopDriver:
        """Open a loop driver with its own state. Raises ArgumentError for a batch above the package's max_batch,
        BackendError."""
        return LoopDriver(self.backend.open_state(batch), self.manifest, choice=self._pipeline_choice)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, which may be ids already. Raises PromptError."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError("the package has no tokenizer; give the prompt as token ids")
            return self.tokenizer.encode(prompt)
        return token_ids(prompt)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> list[int]:
        """Return the token ids of a conversation, rendered by the package's chat template.

        ``variables`` are passed to the template, for example ``enable_thinking=False``. To end generation with the
        turn, pass ``stop_ids=runtime.chat_stop_ids``. Raises ArgumentError, PromptError.
        """
        if self.tokenizer is None:
            raise ArgumentError("the package has no tokenizer, so no chat template")
        return self.tokenizer.encode(self.tokenizer.render_chat(messages, **variables), add_special_tokens=False)

    def warn(self, request: GenerationOptions) -> None:
        """Emit a request's warnings as MeltWarning, each sentence once per model."""
        for sentence in request.warnings:
            if sentence not in self._warned:
                self._warned.add(sentence)
                warnings.warn(sentence, MeltWarning, stacklevel=_callers_level())

    def options(self, **options: Unpack[GenerateOptions]) -> GenerationOptions:
        """Fill in the package's defaults. Raises ArgumentError for unknown names and values out of range."""
        return self._options(**plain_options(options))

    def _options(
        self,
        *,
        max_tokens: int = 256,
        loops: int | None = None,
        exit_threshold: float | None = None,
        chunk: int | None = None,
        min_loops: int = 1,
        exit_change: float | None = None,
        exit_kl: float | None = None,
        exit_same: int | None = None,
        exit_entropy: float | None = None,
        exit_margin: float | None = None,
        exit: str | None = None,
        exit_at_step: int | None = None,
        start_seed: int = 0,
        start_state: str | None = None,
        stop: str | Iterable[str] | None = None,
        stop_ids: int | Iterable[int] | None = None,
        ignore_eos: bool = False,
        pipeline: str = "auto",
        **sampling: Any,
    ) -> GenerationOptions:
        if not isinstance(ignore_eos, bool):
            raise ArgumentError(f"ignore_eos is {ignore_eos!r}; it must be True or False")
        given = {
            "exit_threshold": exit_threshold,
            "exit_change": exit_change,
            "exit_kl": exit_kl,
            "exit_same": exit_same,
            "exit_entropy": exit_entropy,
            "exit_margin": exit_margin,
        }
        if loops is None:
            loops = usual_loops(self.manifest, exit, min_loops, exit_at_step)
        depth = LoopSettings(
            _last_loop(loops, exit_at_step),
            chunk=chunk,
            min_loops=min_loops,
            start_seed=start_seed,
            start_state=start_state,
            **exit_options(self.manifest, exit, given),
        )
        depth.check(self.manifest)
        ids = stop_tokens(stop_ids) | (frozenset() if ignore_eos else self.stop_ids)
        said = depth_warnings(self.manifest, depth.loops)
        chosen = SamplingParams(**sampling)
        chosen.check(self.manifest.vocab_size)
        return GenerationOptions(depth, max_tokens, chosen, stop_strings(stop), ids, said, pipeline)


def _last_loop(loops: int, exit_at_step: int | None) -> int:
    """Return how many loops to run where the loop ``exit_at_step``, counted from 0, is the last one that is read.

    Raises ArgumentError for a step beyond the loops.
    """
    if exit_at_step is None:
        return loops
    whole = isinstance(exit_at_step, int) and not isinstance(exit_at_step, bool)
    if not whole or not isinstance(loops, int) or not 0 <= exit_at_step < loops:
        raise ArgumentError(
            f"exit_at_step is {exit_at_step!r}; counting {loops!r} loops from 0, it must be a whole number below that"
        )
    return exit_at_step + 1


def _callers_level() -> int:
    """Return the ``stacklevel`` of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == __name__.split(".")[0]:
        level, frame = level + 1, frame.f_back
    return level


def _local(directory: Path | str) -> Path | str:
    """Return the directory of a package. Raises PackageError for one that cannot be fetched.

    Only ``hf://`` is fetched: a program must not turn a mistyped path into a request to a hub.
    """
    if not is_explicit(directory):
        return directory
    try:
        return local_directory(directory, PACKAGE)
    except HubError as error:
        raise PackageError(str(error)) from error


def load_tokenizer(package: Package) -> TextTokenizer | None:
    """Load the tokenizer among the files that the manifest lists; None where there is none. Raises PackageError."""
    files = package.manifest.files
    return TextTokenizer.load(package.directory, files) if "tokenizer.json" in files else None

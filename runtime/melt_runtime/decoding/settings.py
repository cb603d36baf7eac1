"""The settings of a request: depth, number of tokens, sampling, stopping."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import ArgumentError
from ..package.manifest import Manifest
from ..package.specs import MAX_LOOPS, START_STATES
from ..sampling.sampler import SamplingParams
from ..text.stop_strings import stop_strings, stop_tokens
from ..untrusted import shown, whole_number
from .exit_criteria import CRITERIA

PIPELINE = ("auto", "on", "off")


@dataclass(frozen=True)
class LoopSettings:
    """The depth of a sequence: at most ``loops`` loops per token, and at least ``min_loops``. Raises ArgumentError.

    A token leaves the loop once its cumulative exit probability reaches ``exit_threshold`` (1.0: never), or once its
    hidden state changes between loops by less than ``exit_change`` times its norm: ||h_t - h_{t-1}|| < exit_change *
    ||h_t|| (0.0: never). ``exit_change`` needs no trained exit gate, but reads hidden back after every loop.

    A token that runs by itself, as generated ones do, also leaves once what the head says of it stands still: once
    KL(p_t || p_{t-1}) of successive loops is below ``exit_kl``, in nats (0.0: never), or once the likeliest token has
    been the same in ``exit_same`` loops more (0: never); or once the head is sure: once the entropy of its words is
    below ``exit_entropy``, in nats (0.0: never), or the likeliest leads the second by a probability of ``exit_margin``
    (0.0: never). All of these run the head, and what precedes it, after every loop.

    ``chunk``: how many prompt tokens run their loops together (None: the package's). It changes results, because a
    chunk's tokens attend to each other loop by loop.

    ``start_seed``: of the noise that the loops of some models start from; ``start_state`` "zeros" replaces that noise,
    None keeps what the model was trained with. Beside "zeros", only the seed 0 is possible.
    """

    loops: int
    exit_threshold: float = 1.0
    chunk: int | None = None
    min_loops: int = 1
    exit_change: float = 0.0
    start_seed: int = 0
    start_state: str | None = None
    exit_kl: float = 0.0
    exit_same: int = 0
    exit_entropy: float = 0.0
    exit_margin: float = 0.0

    def __post_init__(self) -> None:
        whole_number("loops", self.loops)
        whole_number("min_loops", self.min_loops)
        if self.loops > MAX_LOOPS:
            raise ArgumentError(f"loops is above {MAX_LOOPS:,}, the most that a token may have")
        if self.chunk is not None:
            whole_number("chunk", self.chunk)
        if self.min_loops > self.loops:
            raise ArgumentError(f"min_loops is {self.min_loops}, above the {self.loops} loops that a token may have")
        for one in CRITERIA.values():
            one.check(getattr(self, one.option))
        seed = self.start_seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ArgumentError(f"start_seed is {shown(seed)}; it must be a whole number from 0 to 2^64 - 1")
        if self.start_state is not None and self.start_state not in START_STATES:
            raise ArgumentError(
                f"start_state is {shown(self.start_state)}; it must be one of {', '.join(START_STATES)}"
            )
        if seed and self.start_state not in (None, "noise"):
            raise ArgumentError(
                f"start_seed is {seed} and start_state is {self.start_state!r}, which has no noise; give one of them"
            )

    @property
    def adaptive(self) -> bool:
        """Whether a token may leave before its last loop."""
        return self.min_loops < self.loops and any(self._used(one) for one in CRITERIA)

    @property
    def hears_head(self) -> bool:
        """Whether a token may leave by what the head says after a loop."""
        return any(self._used(name) for name, one in CRITERIA.items() if one.reads == "head")

    def _used(self, criterion: str) -> bool:
        one = CRITERIA[criterion]
        return bool(getattr(self, one.option) != one.never)

    def check(self, manifest: Manifest) -> None:
        """Raise ArgumentError for a depth or chunk that the package does not allow."""
        manifest.check_depth(self.loops, self.exit_threshold)
        for name, one in CRITERIA.items():
            if manifest.cache_loops is not None and self._used(name):
                raise ArgumentError(
                    f"{one.option} is {getattr(self, one.option)}; a token of a LoopLM that left early would be "
                    f"missing from the later loops' caches, so only {one.never:g} is possible"
                )
        own = manifest.start.get("state", "embedding")
        if self.start_state == "zeros" and own == "embedding":
            raise ArgumentError(
                "start_state is 'zeros', but this model's loops start from the embedding, without which no token would "
                "be read"
            )
        if self.start_state not in (None, own, "zeros"):
            raise ArgumentError(f"start_state is {self.start_state!r}; this model starts from {own!r} or 'zeros'")
        if self.chunk is not None and self.chunk > manifest.chunk:
            raise ArgumentError(f"chunk is {self.chunk}; this package was exported for at most {manifest.chunk}")


@dataclass(frozen=True)
class GenerationOptions:
    """The options of one request: depth, number of tokens, sampling, stopping.

    ``pipeline``: whether several successive tokens run at once, each in a loop of its own: "on", "off", or "auto":
    where the tokens are the same and it is faster. ``shown_ids``: special tokens that the text has, although it leaves
    out others.
    """

    loops: LoopSettings
    max_tokens: int = 256
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    warnings: tuple[str, ...] = field(default=(), compare=False)  # sentences that the reply should carry
    pipeline: str = "auto"
    shown_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        whole_number("max_tokens", self.max_tokens)
        if not isinstance(self.pipeline, str) or self.pipeline not in PIPELINE:
            raise ArgumentError(f"pipeline is {shown(self.pipeline)}; it must be one of {', '.join(PIPELINE)}")
        object.__setattr__(self, "stop", stop_strings(self.stop))
        object.__setattr__(self, "stop_ids", stop_tokens(self.stop_ids))

"""Choose the next token from logits: greedy, or sampled after biases, penalties, temperature, top-k, top-p and
min-p."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from ..untrusted import shown
from .penalties import Biases, biased, by_count, penalise


def _check(name: str, value: object, whole: bool, valid: str, low: float, high: float, open_low: bool = False) -> None:
    """Raise ArgumentError unless `value` is a finite number from low to high (low itself excluded if open_low)."""
    kind = Integral if whole else Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ArgumentError(f"{name} must be {valid}, not {shown(value)}.")
    try:
        number: float = int(value) if whole and isinstance(value, Integral) else float(value)
    except OverflowError:
        number = math.inf
    too_low = number <= low if open_low else number < low
    if (isinstance(number, float) and not math.isfinite(number)) or too_low or number > high:
        raise ArgumentError(f"{name} must be {valid}, not {shown(value)}.")


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen; greedy by default. Raises ArgumentError for values out of range.

    ``temperature``: divides the logits; 0 takes the likeliest token.

    ``top_k``: keeps the k likeliest tokens; 0 keeps all.

    ``top_p``: keeps the smallest set of tokens with at least this share of the probability; 1 keeps all.

    ``min_p``: keeps tokens with at least this fraction of the likeliest token's probability; 0 keeps all.

    ``repetition_penalty``: above 1 makes tokens of the history less likely, below 1 more likely; 1 changes nothing.

    ``seed``: equal seeds give equal samples; None gives new ones each time.

    ``frequency_penalty``, ``presence_penalty``: subtracted from the logit of each token generated so far, the first as
    often as it was generated, the second once. The prompt does not count, nor what earlier calls of a session
    generated. 0 changes nothing.

    ``logit_bias``: added to the logits of tokens, by their id.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Biases | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, False, "a finite number of at least 0 (0 is greedy)", 0, math.inf)
        _check("top_k", self.top_k, True, "a whole number of at least 0 (0 is off)", 0, math.inf)
        _check("top_p", self.top_p, False, "a number above 0 and at most 1 (1 is off)", 0, 1, open_low=True)
        _check("min_p", self.min_p, False, "a number from 0 to 1 (0 is off)", 0, 1)
        valid = "a finite number above 0 (1 is off)"
        _check("repetition_penalty", self.repetition_penalty, False, valid, 0, math.inf, open_low=True)
        if self.seed is not None:
            _check(
                "seed", self.seed, True, "a whole number of at least 0, or None for a new one each time", 0, math.inf
            )
        for name in ("frequency_penalty", "presence_penalty"):
            _check(name, getattr(self, name), False, "a number from -2 to 2 (0 is off)", -2, 2)
        if not isinstance(self.logit_bias, Biases):
            object.__setattr__(self, "logit_bias", Biases.of(self.logit_bias))

    def check(self, vocab: int) -> None:
        """Raise ArgumentError for a bias of a token outside the vocabulary."""
        assert isinstance(self.logit_bias, Biases)
        self.logit_bias.check(vocab)

    @cached_property
    def counts(self) -> bool:
        """Whether tokens generated before are penalised by their number."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    @cached_property  # asked for every token
    def adjusts(self) -> bool:
        """Whether logits are changed before the likeliest token is looked for."""
        return self.repetition_penalty != 1.0 or self.counts or bool(self.logit_bias)


class Sampler:
    """The sampling parameters and random state of one sequence.

    ``stream``: the number of the sequence in its batch. With one seed, each stream has its own reproducible random
    numbers. ``prompt_tokens``: how many tokens of the history are the prompt's. Raises ArgumentError for a stream below
    0.
    """

    def __init__(self, params: SamplingParams, stream: int = 0, prompt_tokens: int = 0) -> None:
        _check("stream", stream, True, "a whole number of at least 0", 0, math.inf)
        self.params, self.prompt_tokens = params, prompt_tokens
        seed = None if params.seed is None else int(params.seed)
        source = np.random.SeedSequence(seed, spawn_key=(int(stream),))
        self._random = np.random.Generator(np.random.PCG64(source))

    def sample(self, logits: npt.NDArray[Any], history: Sequence[int] | npt.NDArray[Any] = ()) -> int:
        """Return the id of the next token.

        ``logits``: (vocab,) real numbers, -inf for forbidden tokens; not modified. ``history``: token ids (tokens,) for
        the penalties; read only if one is on.

        Sampling uses one random number per token, greedy none. Raises ArgumentError for logits of another shape, with
        NaN or +inf, or all -inf, and for history ids outside the vocabulary.
        """
        scores = np.asarray(logits)
        if scores.ndim != 1 or scores.size == 0:
            raise ArgumentError(f"The logits must be one row of shape (vocab,), not of shape {scores.shape}.")
        best = int(scores.argmax())  # NaN counts as the largest
        top = float(scores.item(best))
        if not math.isfinite(top):
            what = "infinite logits" if top > 0 else "logits that are all -inf, so no token is left to choose"
            what = "NaN logits" if math.isnan(top) else what
            raise ArgumentError(f"The model returned {what}; check its weights and the precision it runs in.")
        if self.params.adjusts:
            scores = self.adjusted(scores, history)
            best = int(scores.argmax())
            if not math.isfinite(scores.item(best)):
                raise ArgumentError("The penalties and biases make the logits infinite; choose smaller ones.")
        if self.params.temperature == 0:
            return best
        ids = top_k_ids(scores, int(self.params.top_k)) if 0 < self.params.top_k < scores.size else None
        return self.sample_from(*self.narrow(ids, scores if ids is None else scores[ids]))

    def adjusted(self, scores: npt.NDArray[Any], history: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return a copy of all logits (vocab,) with biases and penalties applied. Raises ArgumentError."""
        params = self.params
        assert isinstance(params.logit_bias, Biases)
        with np.errstate(over="ignore"):
            made = biased(scores, params.logit_bias)
            if params.repetition_penalty != 1.0:
                made = penalise(made, history, float(params.repetition_penalty))
            if params.counts:
                generated = history[self.prompt_tokens :]
                made = by_count(made, generated, float(params.frequency_penalty), float(params.presence_penalty))
        return made

    def narrow(
        self, ids: npt.NDArray[Any] | None, scores: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[Any] | None, npt.NDArray[np.float64]]:
        """Apply temperature, top-p and min-p. Return the ids that remain (None: all) and their unnormalised weights.

        ``ids``: those that top-k kept, ascending, or None. ``scores``: their logits.
        """
        params = self.params
        kept = scores.astype(np.float64)
        # Subtracting the maximum before dividing keeps a tiny temperature from giving NaN.
        with np.errstate(over="ignore"):
            weights = np.exp((kept - kept.max()) / float(params.temperature))
        if params.top_p < 1:
            nucleus = _top_p(weights, float(params.top_p))
            ids = nucleus if ids is None else ids[nucleus]
            weights = weights[nucleus]
        if params.min_p > 0:
            # The largest weight is exactly 1, so weights are fractions of the likeliest token's.
            likely = np.flatnonzero(weights >= float(params.min_p))
            ids = likely if ids is None else ids[likely]
            weights = weights[likely]
        return ids, weights

    def sample_from(self, ids: npt.NDArray[Any] | None, weights: npt.NDArray[np.float64]) -> int:
        """Sample one of the ids in proportion to its weight, with one random number."""
        mass = np.cumsum(weights)
        drawn = int(np.searchsorted(mass, self._random.random() * mass[-1], side="right"))
        # The product may round up to the total; the last token with any weight is then correct.
        drawn = min(drawn, int(np.searchsorted(mass, mass[-1], side="left")))
        return drawn if ids is None else int(ids[drawn])

    def ahead(self, tokens: int) -> Sampler:
        """Return a sampler whose next random number is this one's after ``tokens`` more tokens."""
        made = copy(self)
        if self.params.temperature > 0:
            bits = np.random.PCG64(0)
            bits.state = dict(self._random.bit_generator.state)  # type: ignore[assignment]
            made._random = np.random.Generator(bits.advance(tokens))
        return made

    def state(self) -> dict[str, Any]:
        """Return the random state as dicts, strings and ints that JSON can hold, for ``restore``."""
        return dict(self._random.bit_generator.state)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that ``state()`` returned. Raises ArgumentError, without changes, for anything else."""
        bits = np.random.PCG64(0)
        try:
            saved: Any = dict(state)
            bits.state = saved
        except (TypeError, ValueError, KeyError, OverflowError) as error:
            raise ArgumentError("This is not a saved sampler state; pass what Sampler.state() returned.") from error
        self._random = np.random.Generator(bits)


def top_k_ids(scores: npt.NDArray[Any], k: int) -> npt.NDArray[np.intp]:
    """Return the ids, ascending, of exactly the k largest scores."""
    threshold = scores[np.argpartition(scores, scores.size - k)[scores.size - k]]
    return largest(scores, k, threshold)


def _top_p(weights: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.intp]:
    """Return the indices, ascending, of the smallest set with at least ``share`` of the weight; never empty."""
    descending = np.sort(weights)[::-1]  # sorting values is several times faster than sorting indices
    mass = np.cumsum(descending)
    count = min(int(np.searchsorted(mass, share * mass[-1], side="left")) + 1, weights.size)
    return largest(weights, count, descending[count - 1])


def largest(values: npt.NDArray[Any], count: int, threshold: Any) -> npt.NDArray[np.intp]:
    """Return the indices, ascending, of the ``count`` largest values, the smallest of which is ``threshold``.

    Of equal values the lowest indices are kept, as in greedy; half-precision logits are often equal.
    """
    above = np.flatnonzero(values > threshold)
    equal = np.flatnonzero(values == threshold)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))

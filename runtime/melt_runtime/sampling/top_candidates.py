"""Sample from the top candidates where they determine the result, so that a device need not send all logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .penalties import penalise
from .sampler import Sampler, SamplingParams, largest, top_k_ids

# Bound on the relative error of a float32 sum of exp over a vocabulary; ten times the error seen.
_SLACK = 2.0**-12


@dataclass(frozen=True)
class Candidates:
    """The k largest logits of a row and their ids, in any order; no other logit is larger.

    ``logits``: (k,) float32. ``ids``: (k,). ``log_sum``: log of the sum of exp over the whole row. ``vocab``: the row's
    length. Of equal logits, any may be among the k.
    """

    logits: NDArray[np.float32]
    ids: NDArray[np.integer[Any]]
    log_sum: float
    vocab: int


def sample_candidates(
    sampler: Sampler, candidates: Candidates, history: Sequence[int] | NDArray[Any] = ()
) -> int | None:
    """Return the token that ``Sampler.sample`` would return for the whole row, using the same random number.

    None if the candidates do not determine it; then no random number is used. Raises ArgumentError as ``sample`` does.
    """
    params = sampler.params
    order = np.argsort(candidates.ids)
    ids = candidates.ids[order]
    scores: NDArray[np.floating[Any]] = candidates.logits[order]
    if len(ids) == candidates.vocab:
        return sampler.sample(scores, history)
    if params.counts or params.logit_bias:
        return None  # a token outside the candidates may become the likeliest
    if not np.isfinite(candidates.log_sum) or not np.isfinite(scores.max(initial=-np.inf)):
        return None  # sampling from the whole row reports the error
    bound = float(scores.min())
    if params.repetition_penalty != 1.0:
        penalty = float(params.repetition_penalty)
        scores = penalise(scores, history, penalty, ids, candidates.vocab)
        bound = max(bound, bound / penalty if bound > 0 else bound * penalty)
    top = float(scores.max())
    if not np.inf > top > bound:
        return None
    if params.temperature == 0:
        return int(ids[np.argmax(scores)])
    if 0 < params.top_k < candidates.vocab:
        return _from_top_k(sampler, ids, scores, bound)
    return _from_mass(sampler, candidates, ids, scores, bound)


def _from_top_k(sampler: Sampler, ids: NDArray[Any], scores: NDArray[Any], bound: float) -> int | None:
    """Sample with top-k. None unless all k tokens are above every token outside the candidates."""
    count = int(sampler.params.top_k)
    if count > len(ids):
        return None
    kept = top_k_ids(scores, count)
    if not scores[kept].min() > bound:
        return None
    return sampler.sample_from(*sampler.narrow(ids[kept], scores[kept]))


def _from_mass(
    sampler: Sampler, candidates: Candidates, ids: NDArray[Any], scores: NDArray[Any], bound: float
) -> int | None:
    """Sample with top-p and min-p over the whole vocabulary. None unless every possible mass of the other tokens gives
    the same set."""
    params = sampler.params
    top, temperature = float(scores.max()), float(params.temperature)
    with np.errstate(over="ignore"):
        weights = np.exp((scores.astype(np.float64) - top) / temperature)
        most = float(np.exp((bound - top) / temperature))  # of a token outside the candidates
    likely = None  # how many tokens min-p keeps
    if params.min_p > 0 and most < params.min_p:
        likely = int(np.count_nonzero(weights >= float(params.min_p)))
    if params.top_p == 1:
        chosen = None if likely is None else np.flatnonzero(weights >= float(params.min_p))
        return None if chosen is None else sampler.sample_from(ids[chosen], weights[chosen])

    descending = np.sort(weights)[::-1]
    mass = np.cumsum(descending)
    counts = set()
    for rest in _rest(params, candidates, ids, scores, bound):
        count = int(np.searchsorted(mass, float(params.top_p) * (mass[-1] + rest), side="left")) + 1
        counts.add(count if likely is None else min(count, likely))
    if len(counts) > 1 or max(counts) > len(ids):
        return None
    count = counts.pop()
    if not descending[count - 1] > most:
        return None
    kept = largest(weights, count, descending[count - 1])
    if params.min_p > 0:
        kept = kept[weights[kept] >= float(params.min_p)]
    return sampler.sample_from(ids[kept], weights[kept])


def _rest(
    params: SamplingParams, candidates: Candidates, ids: NDArray[Any], scores: NDArray[Any], bound: float
) -> tuple[float, float]:
    """Return the least and most mass of the tokens outside the candidates, in units of the likeliest token's weight.

    Each weighs at most as much as the least candidate. Without a penalty, ``log_sum`` gives their sum at temperature 1;
    at other temperatures, x -> x**(1/temperature) is convex or concave, which bounds the sum from both sides.
    """
    count = candidates.vocab - len(ids)
    top, power = float(scores.max()), 1 / float(params.temperature)
    each = float(np.exp(bound - top))
    with np.errstate(over="ignore", under="ignore"):
        low, high = 0.0, count * each**power
        if params.repetition_penalty == 1.0 and each > 0:
            known = float(np.exp(scores.astype(np.float64) - top).sum())
            total = float(np.exp(candidates.log_sum - top))
            least, most = (max(total * (1 + slack) - known, 0.0) for slack in (-_SLACK, _SLACK))
            spread = [count * (rest / count) ** power for rest in (least, most)]
            packed = [rest * each ** (power - 1) for rest in (least, most)]
            lows, highs = (spread, packed) if power >= 1 else (packed, spread)
            low, high = lows[0], min(high, highs[1])
    return min(low, high) * (1 - 1e-9), high * (1 + 1e-9) + 1e-12

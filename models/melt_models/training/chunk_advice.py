"""Warnings about chunk sizes with which a MELT does not learn to decode."""

from __future__ import annotations

from collections.abc import Sequence

from ..configuration import LoopedConfig, MeltConfig
from .gate import GateOptions
from .objectives import DistillOptions, TeacherOptions

# With 1 token in 417 a text model's perplexity was twice as high in writing as in reading; 1 in 31 teaches addition.
_RARELY = 0.01


def chunk_warnings(
    options: TeacherOptions | DistillOptions | GateOptions, config: LoopedConfig, tokens: int
) -> list[str]:
    """Return what a phase's chunk sizes leave unlearned, in sentences. ``tokens``: those of a training sequence."""
    if isinstance(options, TeacherOptions) or not isinstance(config, MeltConfig):
        return []
    sizes = list(options.chunk_sizes) or [config.chunk_size]
    source = f"chunk_sizes {sizes}" if options.chunk_sizes else f"melt.chunk_size {config.chunk_size}"
    if isinstance(options, DistillOptions) and not options.chunk_wise:
        return [
            "chunk_wise is false, so no token is trained on the keys and values that earlier chunks leave, which "
            "decoding reads"
        ]
    found = []
    if min(sizes) >= tokens and not options.decoding_share:
        found.append(
            f"a sequence has {tokens} tokens and {source} puts them all into one chunk, so no token is trained on the "
            "keys and values that earlier chunks leave, which decoding reads; choose smaller chunks or longer sequences"
        )
    elif 1 not in sizes and not options.decoding_share:
        found.append(
            f"{source} never draws chunks of one token, in which the model decodes; `decoding_share: 0.5` gives half "
            "of the tokens a chunk of their own"
        )
    elif (alone := _alone(sizes, tokens, options.decoding_share)) < _RARELY:
        found.append(
            f"{source} puts 1 token in {round(1 / alone)} into a chunk of its own, in which the model decodes: it may "
            "then write much worse than it reads; `decoding_share: 0.5` does so with half of the tokens"
        )
    return found


def _alone(sizes: Sequence[int], tokens: int, decoding_share: float) -> float:
    """Return the share of the tokens that have a chunk of their own."""
    drawn = sizes.count(1) / sum(min(size, tokens) for size in sizes)
    return decoding_share + (1 - decoding_share) * drawn

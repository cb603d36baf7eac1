"""Loops, positions and tokens per chunk of a package."""

from __future__ import annotations

from dataclasses import dataclass

from melt_models import MeltConfig
from melt_models.configuration import LoopedConfig
from melt_runtime.package.specs import MAX_LOOPS

from .errors import ExportError
from .options import ExportOptions
from .reference.depth import default_depth

_MAX_DEFAULT_SEQ_LEN = 4096
_LOOPLM_CHUNK = 128  # a LoopLM's results do not depend on its chunk


@dataclass(frozen=True)
class Sizes:
    """Sizes of a package.

    - ``loops``: run by default.
    - ``chunk``: prompt tokens that run their loops together.
    - ``max_seq_len``: tokens per sequence.
    - ``cache_rows``: positions per cache.
    """

    loops: int
    chunk: int
    max_seq_len: int
    cache_rows: int


def package_sizes(config: LoopedConfig, options: ExportOptions) -> Sizes:
    """Return the sizes of a checkpoint's package. Raises ExportError for sizes that the checkpoint does not allow."""
    loops = default_depth(config)
    if loops > MAX_LOOPS:
        raise ExportError(f"the checkpoint runs {loops:,} loops per token; a package runs {MAX_LOOPS:,} at most")
    positions = config.max_position_embeddings
    max_seq_len = options.max_seq_len or min(positions, _MAX_DEFAULT_SEQ_LEN)
    if max_seq_len > positions:
        raise ExportError(f"--max-seq-len {max_seq_len} is more than the checkpoint's {positions} positions")
    wanted = config.chunk_size if isinstance(config, MeltConfig) else _LOOPLM_CHUNK
    chunk = min(options.chunk or wanted, max_seq_len)
    # In a batch of different lengths a full sequence must have room for the longest chunk's padding.
    return Sizes(loops, chunk, max_seq_len, max_seq_len + (chunk if options.max_batch > 1 else 0))

"""The sizes that an engine is built for: attention lengths, and profiles for decoding and prefill."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

from ..errors import ArgumentError
from ..package.engine_spec import ProfileSpec

PIPELINED = "pipelined"  # the name of the profile of pipelined runs
_SMALLEST_BUCKET = 64
# With fewer heads TensorRT-RTX 1.7 has no fused attention for a fixed chunk of one token (found by experiment), but
# it has for a chunk of one or two.
_FUSED_ONE_TOKEN_HEADS = 4


def length_buckets(positions: int) -> tuple[int, ...]:
    """Return the attention lengths for a cache: 64, 96, 128, 192, 256 and so on, up to all positions.

    Few enough to capture a CUDA graph for each; at most 1.5 times the needed length.
    """
    buckets, size = [], _SMALLEST_BUCKET
    while size < positions:
        buckets.append(size)
        if size * 3 // 2 < positions:
            buckets.append(size * 3 // 2)
        size *= 2
    return (*buckets, positions)


def bucket_for(buckets: tuple[int, ...], length: int) -> int:
    """Return the smallest bucket that holds a length. Raises ArgumentError above the largest."""
    at = bisect_left(buckets, length)
    if at == len(buckets):
        raise ArgumentError(f"{length} tokens are more than the engine's {buckets[-1]} cache positions")
    return buckets[at]


def make_profiles(
    max_batch: int, chunk: int, heads: int, buckets: tuple[int, ...], lanes: tuple[int, int] = (1, 1)
) -> tuple[ProfileSpec, ...]:
    """Make the profiles: decode for one token, pipelined for the tokens of a sequence in flight and, if the package has
    a chunk, prefill for up to a chunk.

    ``lanes``: rows and columns of a pipelined run; (1, 1), or more than the engine holds: none.
    """
    batch = (1, 1, max_batch)
    context = (buckets[0], buckets[len(buckets) // 2], buckets[-1])
    widest = 1 if heads >= _FUSED_ONE_TOKEN_HEADS else 2
    made = [ProfileSpec("decode", batch, (1, 1, widest), context)]
    rows, columns = lanes
    if 1 < rows <= max_batch or 1 < columns <= chunk:
        made.append(ProfileSpec(PIPELINED, (1, rows, max_batch), (1, columns, max(columns, widest)), context))
    return (*made, ProfileSpec("prefill", batch, (1, chunk, chunk), context)) if chunk > 1 else tuple(made)


def profile_for(
    profiles: tuple[ProfileSpec, ...], batch: int, chunk: int, context: int, pipelined: bool = False
) -> int:
    """Return the index of the first profile that allows these sizes. Raises ArgumentError if none does.

    ``pipelined``: of a pipelined run, for which its own profile comes first. Engines built before have none.
    """

    def admits(profile: ProfileSpec) -> bool:
        sizes = ((profile.batch, batch), (profile.chunk, chunk), (profile.context, context))
        return all(least <= size <= most for (least, _, most), size in sizes)

    fitting = [index for index, profile in enumerate(profiles) if admits(profile)]
    fitting.sort(key=lambda index: (profiles[index].name == PIPELINED) is not pipelined)
    found = fitting[0] if fitting else None
    if found is None:
        last = profiles[-1]
        raise ArgumentError(
            f"batch {batch}, chunk {chunk} and {context} cache positions are beyond what the engine was built for: "
            f"batch {last.batch[2]}, chunk {last.chunk[2]} and {last.context[2]} positions"
        )
    return found


def resolve(shape: tuple[int | str, ...], profile: ProfileSpec) -> tuple[tuple[int, ...], ...]:
    """Return minimum, optimum and maximum of a shape with named dimensions."""
    named: Mapping[str, tuple[int, int, int]] = {
        "batch": profile.batch,
        "chunk": profile.chunk,
        "context": profile.context,
    }
    return tuple(tuple(named[d][at] if isinstance(d, str) else d for d in shape) for at in range(3))

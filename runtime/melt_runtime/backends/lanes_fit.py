"""Whether the tokens of a package's sequences can run in different loops."""

from __future__ import annotations

from ..package.manifest import Manifest
from ..package.specs import ITEM_BYTES
from .bindings import lane_window, slot_bytes


def why_no_lanes(manifest: Manifest, batch: int, first: int, pitch: int, alignment: int) -> str | None:
    """Return why one run cannot hold a token of every sequence in every loop, or None if it can.

    ``batch``, ``first``: the sequences, ``pitch``: of those in each part of the caches. ``alignment``: bytes to a
    multiple of which bound tensors begin.
    """
    if lane_window(manifest) == 1:
        if manifest.cache_loops is not None:
            return "the package's chunk is 1, and its coda reads the tokens in flight as one chunk: export a larger one"
        return "the package runs one loop, or was exported without a first_loop for each token"
    if manifest.cache_loops is None:
        return _why_no_chunk(manifest, batch, alignment)
    if first or batch != pitch:
        return "the caches of these sequences do not lie side by side"
    if any(pitch * step % alignment for step in slot_bytes(manifest).values()):
        return f"its caches do not begin at multiples of {alignment} bytes"
    if manifest.dialect == "standard" and manifest.cache_rows == manifest.max_seq_len:
        return "a package exported with --max-batch 1 has no spare position for loops without a token"
    return None


def _why_no_chunk(manifest: Manifest, batch: int, alignment: int) -> str | None:
    """Return why a MELT's tokens cannot share a chunk in different loops, or None if they can."""
    if batch > 1 and manifest.has_stages:
        return "with layers outside the loops, a shared cache takes the tokens in flight of one sequence only"
    swapped = [state for state in manifest.states if state.kind == "swap"]
    if any(int(state.shape[-1]) * ITEM_BYTES[state.dtype] % alignment for state in swapped):
        return f"its hidden states or latents do not begin at multiples of {alignment} bytes"
    return None

"""What a loop step is bound to: which buffer is behind each tensor, and what must be allocated once for a batch.

Caches are one buffer, bound as input and output. Hidden and latent are two buffers each, which trade places every loop:
the plan of an even loop and of an odd one differ in nothing else, and neither moves while a session lives.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..package import Manifest, StateSpec, rows_shape, size_of


@dataclass(frozen=True)
class Binding:
    """A graph's input or output: the buffer behind it and its shape at this width."""

    tensor: str
    buffer: str
    shape: tuple[int, ...]


def state_buffers(manifest: Manifest, batch: int) -> dict[str, int]:
    """The bytes of every state buffer of a batch, by name: allocated once, for the widest chunk."""
    sizes: dict[str, int] = {}
    for state in manifest.states:
        names = [_behind(state, 0), _behind(state, 1)] if state.kind == "swap" else [state.input]
        for name in names:
            sizes[name] = size_of(state.shape, state.dtype, batch=batch, chunk=manifest.chunk)
        if state.kind == "read_only":
            sizes[state.output] = size_of(rows_shape(state.shape), state.dtype, batch=batch, chunk=manifest.chunk)
    return sizes


def loop_bindings(
    manifest: Manifest, batch: int, chunk: int, context: int, current: int
) -> tuple[tuple[Binding, ...], tuple[Binding, ...]]:
    """The loop step's inputs and outputs. ``current``: which of the swapped buffers holds the newest states.

    What is no state (masks, lengths, exit probability) is bound to a buffer of its own name.
    """
    named = {"batch": batch, "chunk": chunk, "context": context}
    graph = manifest.graphs["loop_step"]
    sources = {state.input: _behind(state, current) for state in manifest.states}
    targets = {state.output: _written(state, current) for state in manifest.states}

    def bound(tensor: str, shape: tuple[int | str, ...], behind: dict[str, str]) -> Binding:
        return Binding(tensor, behind.get(tensor, tensor), tuple(named[d] if isinstance(d, str) else d for d in shape))

    inputs = tuple(bound(spec.name, spec.shape, sources) for spec in graph.inputs)
    outputs = tuple(bound(spec.name, spec.shape, targets) for spec in graph.outputs)
    return inputs, outputs


def _behind(state: StateSpec, which: int) -> str:
    return f"{state.input}/{which}" if state.kind == "swap" else state.input


def _written(state: StateSpec, current: int) -> str:
    """The other of two swapped buffers; the cache itself; a read-only cache's rows."""
    return state.output if state.kind == "read_only" else _behind(state, 1 - current)

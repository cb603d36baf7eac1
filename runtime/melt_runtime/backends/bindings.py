"""What a graph is bound to: which buffer is behind each tensor, and what must be allocated once for a batch.

Caches are one buffer, bound as input and output. Hidden and latent are two buffers each, which trade places every loop:
an even loop and an odd one differ in nothing else, and no buffer moves while a session lives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..package.manifest import Manifest
from ..package.specs import StateSpec, TensorSpec, new_positions_shape, size_of


@dataclass(frozen=True)
class Binding:
    """A graph's input or output: the buffer behind it, in which it is laid out in its shape at this width, from the
    front or ``offset`` bytes behind it (the caches of slots past the first)."""

    tensor: str
    buffer: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0


Bindings = tuple[tuple[Binding, ...], tuple[Binding, ...]]  # inputs, outputs


def state_buffers(manifest: Manifest, batch: int) -> dict[str, int]:
    """The bytes of every state buffer of a batch, by name: allocated once, for the widest chunk."""
    sizes: dict[str, int] = {}
    for state in manifest.states:
        for name in buffers_of(state):
            sizes[name] = size_of(state.bound_shape, state.dtype, batch=batch, chunk=manifest.chunk)
        if state.kind == "read_only":
            sizes[state.output] = size_of(
                new_positions_shape(state.shape), state.dtype, batch=batch, chunk=manifest.chunk
            )
    return sizes


def scratch_buffers(manifest: Manifest, batch: int) -> dict[str, int]:
    """The bytes of everything else that graphs are bound to, by name; for the widest chunk and the whole cache.

    ``first_loop/1`` and ``first_loop/0`` are for a batch whose sequences are all in their first loop, or all past it:
    they are filled once. ``first_loop`` is for a mixed batch. ``head_hidden`` holds one column a sequence.
    """
    hidden = manifest.states[0]
    shapes: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "input_ids": ("int64", ("batch", "chunk")),
        "first_loop/0": ("bool", ("batch",)),
        "first_loop/1": ("bool", ("batch",)),
        "first_loop": ("bool", ("batch",)),
        "active": ("bool", ("batch", "chunk")),
        "lengths": ("int64", ("batch",)),
        "exit_probability": ("float32", ("batch", "chunk")),
        "head_hidden": (hidden.dtype, ("batch", hidden.shape[-1])),
        "logits": ("float32", ("batch", manifest.vocab_size)),
    }
    inputs = {spec.name for spec in manifest.graphs["loop_step"].inputs}
    if "chunk_lengths" in inputs:
        shapes["chunk_lengths"] = ("int64", ("batch",))
    if "attention_mask" in inputs:
        shapes["attention_mask"] = ("bool", ("batch", "chunk", manifest.cache_rows))
    return {name: size_of(shape, dtype, batch=batch, chunk=manifest.chunk) for name, (dtype, shape) in shapes.items()}


def embed_bindings(manifest: Manifest, batch: int, chunk: int) -> Bindings:
    """Token ids -> the first of the two hidden buffers."""
    graph, named = manifest.graphs["embed"], {"batch": batch, "chunk": chunk}
    hidden = behind(manifest.states[0], 0)
    inputs = tuple(_bound(spec, "input_ids", named) for spec in graph.inputs)
    return inputs, tuple(_bound(spec, hidden, named) for spec in graph.outputs)


def loop_bindings(
    manifest: Manifest,
    batch: int,
    chunk: int,
    context: int,
    current: int,
    first_loop: str = "first_loop",
    loop: int = 0,
) -> Bindings:
    """The loop step. ``current``: which of the swapped buffers holds the newest states. ``loop``: whose caches, where
    each has its own.

    What is no state (masks, lengths, exit probability) is bound to a buffer of its own name, or to ``first_loop``.
    """
    named = {"batch": batch, "chunk": chunk, "context": context}
    graph = manifest.graphs["loop_step"]
    sources = {state.input: behind(state, current, loop) for state in manifest.states} | {"first_loop": first_loop}
    targets = {state.output: _written(state, current, loop) for state in manifest.states}
    inputs = tuple(_bound(spec, sources.get(spec.name, spec.name), named) for spec in graph.inputs)
    outputs = tuple(_bound(spec, targets.get(spec.name, spec.name), named) for spec in graph.outputs)
    return inputs, outputs


def head_bindings(manifest: Manifest, batch: int, hidden: str) -> Bindings:
    """One column of each sequence in the buffer ``hidden`` -> logits."""
    graph, named = manifest.graphs["lm_head"], {"batch": batch, "chunk": 1}
    inputs = tuple(_bound(spec, hidden, named) for spec in graph.inputs)
    return inputs, tuple(_bound(spec, spec.name, named) for spec in graph.outputs)


def buffers_of(state: StateSpec) -> list[str]:
    """All buffers of a state: two that trade places, one a loop, or its only one."""
    if state.kind == "swap":
        return [behind(state, 0), behind(state, 1)]
    if state.kind == "per_loop":
        return [behind(state, 0, loop) for loop in range(int(state.shape[0]))]
    return [state.input]


def slot_bytes(manifest: Manifest) -> dict[str, int]:
    """The bytes that one sequence takes in every buffer that outlives a chunk: the caches, which are slot-major."""
    caches = [state for state in manifest.states if state.kind != "swap"]
    return {name: size_of(state.bound_shape, state.dtype, batch=1) for state in caches for name in buffers_of(state)}


def cache_buffers(manifest: Manifest, loops: int | None = None) -> dict[str, StateSpec]:
    """The buffers that outlive a chunk, and whose state each is. ``loops``: of a LoopLM only those of so many loops."""
    found: dict[str, StateSpec] = {}
    for state in manifest.states:
        if state.kind != "swap":
            found |= dict.fromkeys(buffers_of(state)[: loops if state.kind == "per_loop" else None], state)
    return found


def moved(bindings: Bindings, offsets: dict[str, int]) -> Bindings:
    """The same bindings, those of some buffers so many bytes further in."""
    inputs, outputs = (
        tuple(replace(tensor, offset=offsets.get(tensor.buffer, 0)) for tensor in tensors) for tensors in bindings
    )
    return inputs, outputs


def behind(state: StateSpec, which: int, loop: int = 0) -> str:
    """The buffer of a state: one of the two that trade places, a loop's own, or its only one."""
    if state.kind == "per_loop":
        return f"{state.input}/{loop}"
    return f"{state.input}/{which}" if state.kind == "swap" else state.input


def _written(state: StateSpec, current: int, loop: int) -> str:
    """The other of two swapped buffers; the cache itself; a read-only cache's rows."""
    return state.output if state.kind == "read_only" else behind(state, 1 - current, loop)


def _bound(spec: TensorSpec, buffer: str, named: dict[str, int]) -> Binding:
    shape = tuple(named[dim] if isinstance(dim, str) else dim for dim in spec.shape)
    return Binding(spec.name, buffer, spec.dtype, shape)

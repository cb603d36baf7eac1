"""Which buffer each graph input and output is bound to, and the sizes of all buffers of a batch.

A cache is one buffer, bound as input and output. Hidden and latent have two buffers each, swapped after every loop; so
there are two sets of bindings, for even and odd loops, and no buffer moves while a session lives. The caches of a
LoopLM's loops lie in one buffer, loop after loop, so that they can also be bound as a batch whose rows are loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..package.manifest import Manifest
from ..package.manifest_facts import lane_window
from ..package.specs import CODA, PRELUDE, Shape, StateSpec, TensorSpec, size_of


@dataclass(frozen=True)
class Binding:
    """A graph input or output bound to a buffer, in this shape.

    ``offset``: bytes from the buffer's start (the caches of slots after the first).
    """

    tensor: str
    buffer: str
    dtype: str
    shape: tuple[int, ...]
    offset: int = 0


Shapes = dict[str, tuple[str, Shape]]  # of buffers: type and shape by name
Bindings = tuple[tuple[Binding, ...], tuple[Binding, ...]]  # inputs, outputs
LANES = "lanes/"  # prefix of the scratch buffers of a state whose batch is loops


def state_buffers(manifest: Manifest, batch: int, alignment: int = 1) -> dict[str, int]:
    """Return the bytes of every state buffer of a batch, by name, for the widest chunk.

    ``alignment``: bytes to a multiple of which the caches of each loop begin.
    """
    sizes: dict[str, int] = {}
    for state in manifest.states:
        parts = int(state.shape[0]) if state.by_loop else 1
        if state.by_loop:
            of_loop = size_of(state.bound_shape, state.dtype, batch=batch)
            sizes[state.input] = parts * rounded_up(of_loop, alignment)
        else:
            for name in buffers_of(state):
                sizes[name] = size_of(state.bound_shape, state.dtype, batch=batch, chunk=manifest.chunk)
        if state.gives_rows:
            sizes[state.output] = parts * rounded_up(rows_bytes(manifest, state, batch), alignment)
    return sizes


def scratch_buffers(manifest: Manifest, batch: int) -> dict[str, int]:
    """Return the bytes of all other buffers that graphs are bound to, by name, for the widest chunk and the whole
    cache.

    ``first_loop/1`` and ``first_loop/0``: constants for a batch whose tokens are all in their first loop, or all
    past it. ``first_loop``: for a mixed batch. ``head_hidden``: one column per sequence. ``injected``: what every loop
    reads. ``start``: the hidden state before the first loop, where it is not the embedding.
    """
    hidden = manifest.states[0]
    shapes: Shapes = {
        "input_ids": ("int64", ("batch", "chunk")),
        "lengths": ("int64", ("batch",)),
        "exit_probability": ("float32", ("batch", "chunk")),
        "head_hidden": (hidden.dtype, ("batch", hidden.shape[-1])),
        "logits": ("float32", ("batch", manifest.vocab_size)),
    }
    if manifest.injects:
        shapes["injected"] = (hidden.dtype, hidden.shape)
    if manifest.start:
        shapes["start"] = (hidden.dtype, hidden.shape)
    inputs = {spec.name for spec in manifest.graphs["loop_step"].inputs}
    if "active" in inputs:
        tokens = ("bool", ("batch", "chunk"))
        per_token = tokens if manifest.staggers else ("bool", ("batch",))
        shapes |= {"active": tokens, **dict.fromkeys(("first_loop/0", "first_loop/1", "first_loop"), per_token)}
    if "chunk_lengths" in inputs:
        shapes["chunk_lengths"] = ("int64", ("batch",))
    if "attention_mask" in inputs:
        shapes["attention_mask"] = ("bool", ("batch", "chunk", manifest.cache_rows))
    sizes = {name: size_of(shape, dtype, batch=batch, chunk=manifest.chunk) for name, (dtype, shape) in shapes.items()}
    return sizes | lane_buffers(manifest, batch)


def lane_buffers(manifest: Manifest, batch: int) -> dict[str, int]:
    """Return the bytes of the buffers for runs whose tokens are in different loops (see ``lanes.py``), by name."""
    window = lane_window(manifest)
    if window == 1:
        return {}
    by_loop = manifest.cache_loops is not None
    rows = batch * (manifest.cache_loops or window)
    shapes: Shapes = {
        "input_ids": ("int64", (batch,)),
        "lengths": ("int64", (rows if by_loop else batch,)),
        "exit_probability": ("float32", (rows,)),
        "logits": ("float32", (rows, manifest.vocab_size)),
    }
    for state in manifest.states:
        if state.kind == "swap":
            # In the chunk of one sequence a new token stands a column further while the oldest one's is still there.
            shape = (rows if by_loop or batch > 1 else rows + 1, state.shape[-1])
            shapes |= {buffer_name(state, which): (state.dtype, shape) for which in (0, 1)}
    if not by_loop:
        shapes |= {"first_loop": ("bool", (rows,)), "active": ("bool", (rows,))}
    shapes |= _control_shape(manifest, "", rows, 1)
    if manifest.has_stages:
        shapes |= _stage_shapes(manifest, batch if by_loop else 1, rows, window)
    return {LANES + name: size_of(shape, dtype) for name, (dtype, shape) in shapes.items()}


def _control_shape(manifest: Manifest, prefix: str, batch: int, chunk: int) -> Shapes:
    """Return type and shape of the dialect's control input for lanes, or for a stage around them."""
    if manifest.dialect == "onnxruntime":
        return {prefix + "chunk_lengths": ("int64", (batch,))}
    return {prefix + "attention_mask": ("bool", (batch, chunk, manifest.cache_rows))}


def _stage_shapes(manifest: Manifest, batch: int, rows: int, window: int) -> Shapes:
    """Return type and shape of what the stages around the lanes need (see ``lane_stages.py``).

    A MELT's coda reads the loop step's own inputs.
    """
    hidden = manifest.states[0]
    shapes: Shapes = {}
    if manifest.injects:
        shapes |= dict.fromkeys(("injected", "injected/moved"), (hidden.dtype, (rows, hidden.shape[-1])))
        shapes["start"] = (hidden.dtype, (batch, hidden.shape[-1]))
    for stage, chunk in ((PRELUDE, 1), (CODA, window)) if manifest.cache_loops else ((PRELUDE, 1),):
        shapes[f"{stage}/lengths"] = ("int64", (batch,))
        shapes |= _control_shape(manifest, f"{stage}/", batch, chunk)
    if manifest.cache_loops:
        gathered = (hidden.dtype, (batch * window, hidden.shape[-1]))
        shapes |= {f"{CODA}/{buffer_name(hidden, which)}": gathered for which in (0, 1)}
    return shapes


def embed_bindings(manifest: Manifest, batch: int, chunk: int, context: int = 0) -> Bindings:
    """Bind the embedding, with the prelude where there is one: token ids -> the first hidden buffer, or what is
    injected into the loops."""
    graph, named = manifest.graphs["embed"], {"batch": batch, "chunk": chunk, "context": context}
    targets = {state.output: _output_buffer(state, 0, 0) for state in manifest.caches if state.stage == PRELUDE}
    targets["hidden"] = buffer_name(manifest.states[0], 0)
    inputs = tuple(_binding(spec, spec.name, named) for spec in graph.inputs)
    return inputs, tuple(_binding(spec, targets.get(spec.name, spec.name), named) for spec in graph.outputs)


def loop_bindings(
    manifest: Manifest,
    batch: int,
    chunk: int,
    context: int,
    current: int,
    first_loop: str = "first_loop",
    loop: int = 0,
    step: str = "loop_step",
) -> Bindings:
    """Bind the loop step, or another ``step`` from hidden to hidden: the coda.

    ``current``: the swap buffers that hold the newest states. ``loop``: whose caches to bind, if each loop has its own.
    Other inputs and outputs (masks, lengths, exit probability) are bound to buffers of their own name, or to
    ``first_loop``.
    """
    named = {"batch": batch, "chunk": chunk, "context": context}
    graph = manifest.graphs[step]
    sources = {state.input: buffer_name(state, current, loop) for state in manifest.states} | {"first_loop": first_loop}
    targets = {state.output: _output_buffer(state, current, loop) for state in manifest.states}
    inputs = tuple(_binding(spec, sources.get(spec.name, spec.name), named) for spec in graph.inputs)
    outputs = tuple(_binding(spec, targets.get(spec.name, spec.name), named) for spec in graph.outputs)
    return inputs, outputs


def head_bindings(manifest: Manifest, batch: int, hidden: str) -> Bindings:
    """Bind the head: one column of each sequence in the buffer ``hidden`` -> logits."""
    graph, named = manifest.graphs["lm_head"], {"batch": batch, "chunk": 1}
    inputs = tuple(_binding(spec, hidden, named) for spec in graph.inputs)
    return inputs, tuple(_binding(spec, spec.name, named) for spec in graph.outputs)


def buffers_of(state: StateSpec) -> list[str]:
    """Return the names of a state's parts: both swap buffers, the cache of each loop, or the only buffer."""
    if state.kind == "swap":
        return [buffer_name(state, 0), buffer_name(state, 1)]
    if state.by_loop:
        return [buffer_name(state, 0, loop) for loop in range(int(state.shape[0]))]
    return [state.input]


def slot_bytes(manifest: Manifest) -> dict[str, int]:
    """Return the bytes per sequence of every buffer that outlives a chunk: the caches, which are slot-major."""
    caches = [state for state in manifest.states if state.kind != "swap"]
    return {name: size_of(state.bound_shape, state.dtype, batch=1) for state in caches for name in buffers_of(state)}


def cache_buffers(manifest: Manifest, loops: int | None = None) -> dict[str, StateSpec]:
    """Return the state of every cache buffer. ``loops``: a LoopLM's only up to this many loops."""
    found: dict[str, StateSpec] = {}
    for state in manifest.states:
        if state.kind != "swap":
            found |= dict.fromkeys(buffers_of(state)[: loops if state.by_loop else None], state)
    return found


def placed(bindings: Bindings, places: Mapping[str, tuple[str, int]]) -> Bindings:
    """Return the bindings with the buffers of ``places`` replaced by where they lie: a buffer, and bytes from its
    start."""

    def moved(tensor: Binding) -> Binding:
        buffer, offset = places.get(tensor.buffer, (tensor.buffer, 0))
        return replace(tensor, buffer=buffer, offset=offset)

    inputs, outputs = (tuple(moved(tensor) for tensor in tensors) for tensors in bindings)
    return inputs, outputs


def cache_places(manifest: Manifest, pitch: int, first: int, alignment: int = 1) -> dict[str, tuple[str, int]]:
    """Return where the caches lie from sequence ``first`` on, and new positions of those that are only read: the
    buffer, and bytes from its start, by name.

    ``pitch``: sequences per loop, in caches with a part for each loop.
    """
    places = {}
    for state in manifest.states:
        if state.kind != "swap":
            step = size_of(state.bound_shape, state.dtype, batch=1)
            of_loop = rounded_up(pitch * step, alignment)
            of_rows = rounded_up(rows_bytes(manifest, state, pitch), alignment) if state.gives_rows else 0
            for loop, name in enumerate(buffers_of(state)):
                places[name] = (state.input, loop * of_loop + first * step)
                if state.gives_rows:
                    places[rows_name(state, loop)] = (state.output, loop * of_rows)
    return places


def rounded_up(count: int, multiple: int) -> int:
    """Return the least multiple that is not below ``count``."""
    return -(-count // multiple) * multiple


def buffer_name(state: StateSpec, which: int, loop: int = 0) -> str:
    """Return the name of a state's buffer: swap buffer ``which``, the loop's own, or the only one."""
    if state.by_loop:
        return f"{state.input}/{loop}"
    return f"{state.input}/{which}" if state.kind == "swap" else state.input


def rows_name(state: StateSpec, loop: int = 0) -> str:
    """Return the name of what receives the new positions of a cache that is only read: the loop's own, or the only
    one."""
    return f"{state.output}/{loop}" if state.by_loop else state.output


def rows_bytes(manifest: Manifest, state: StateSpec, batch: int) -> int:
    """Return the bytes of a chunk's new positions of a cache that is only read, in one loop."""
    return size_of(state.output_shape, state.dtype, batch=batch, chunk=manifest.chunk)


def _output_buffer(state: StateSpec, current: int, loop: int) -> str:
    """Return the buffer that receives this state's output: the swap partner, the cache, or the new positions."""
    return rows_name(state, loop) if state.gives_rows else buffer_name(state, 1 - current, loop)


def _binding(spec: TensorSpec, buffer: str, named: dict[str, int]) -> Binding:
    shape = tuple(named[dim] if isinstance(dim, str) else dim for dim in spec.shape)
    return Binding(spec.name, buffer, spec.dtype, shape)

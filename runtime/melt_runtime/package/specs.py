"""The parts of a package: tensors, graphs, states, and their allowed names."""

from __future__ import annotations

from dataclasses import dataclass

DIALECTS = ("onnxruntime", "standard", "portable")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
MAX_BATCH = 1 << 16
MAX_LOOPS = 1024  # per token, for every source: package, session file, request, program
STATE_KINDS = ("swap", "in_place", "read_only", "per_loop", "per_loop_read_only")
GRAPHS = ("embed", "loop_step", "lm_head")  # of every package
PRELUDE = "prelude"  # the layers between embedding and loops, in the embedding's graph
CODA = "coda"  # the graph of packages with layers, or a norm, between the last loop and the head
NOISE = "philox4x32-10"  # the generator of ``decoding/start_state.py``
START_STATES = ("embedding", "noise", "zeros")
NAMED_SIZES = ("batch", "chunk", "context")

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. ``shape``: sizes and the names "batch", "chunk", "context"."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class GraphSpec:
    """An ONNX file with its inputs and outputs."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StateSpec:
    """A state tensor, allocated once and reused for every loop and token: the loop step's, or a cache of another stage,
    whose name begins with the stage ("prelude_key_cache.0").

    ``kind``: "swap" (hidden and latent: two buffers that are swapped after each loop), "in_place" (caches: one buffer,
    bound as ``input`` and ``output``), "read_only" (caches of the portable dialect: ``output`` holds the chunk's new
    positions, which the runtime copies into the cache after the last loop), "per_loop" (a LoopLM's caches: the first
    axis of ``shape`` is the loop, and each loop binds its own part in place), "per_loop_read_only" (the same in the
    portable dialect, with new positions per loop).
    """

    input: str
    output: str
    dtype: str
    shape: Shape
    kind: str

    @property
    def by_loop(self) -> bool:
        """Whether each loop has a part of its own."""
        return self.kind in ("per_loop", "per_loop_read_only")

    @property
    def gives_rows(self) -> bool:
        """Whether the graph only reads it and gives the chunk's new positions."""
        return self.kind in ("read_only", "per_loop_read_only")

    @property
    def bound_shape(self) -> Shape:
        """The shape of the loop step's input: without the axis of loops."""
        return self.shape[1:] if self.by_loop else self.shape

    @property
    def output_shape(self) -> Shape:
        """The shape of the loop step's output."""
        return new_positions_shape(self.bound_shape) if self.gives_rows else self.bound_shape

    @property
    def stage(self) -> str:
        """Which graph owns the state: "prelude" (the embedding's graph), "core" (the loop step) or "coda"."""
        return next((stage for stage in (PRELUDE, CODA) if self.input.startswith(f"{stage}_")), "core")

    def bytes(self, batch: int, chunk: int) -> int:
        """Return the bytes that the runtime allocates, with both swap buffers or the new positions."""
        total = size_of(self.shape, self.dtype, batch=batch, chunk=chunk)
        if self.kind == "swap":
            return 2 * total
        if self.gives_rows:
            rows = size_of(self.output_shape, self.dtype, batch=batch, chunk=chunk)
            return total + rows * (int(self.shape[0]) if self.by_loop else 1)
        return total


def new_positions_shape(cache: Shape) -> Shape:
    """Return the shape of a chunk's new positions of a cache (batch, kv_heads, chunk, head_dim)."""
    return (cache[0], cache[1], "chunk", cache[3])


def is_latent(state: StateSpec) -> bool:
    """Whether a state is a latent: of one layer ("latent.0"), or of all in one (format 1)."""
    return state.input == "latent" or state.input.startswith("latent.")


def size_of(shape: Shape, dtype: str, **sizes: int) -> int:
    """Return the bytes of a tensor. ``sizes``: of its named dimensions."""
    total = ITEM_BYTES[dtype]
    for dim in shape:
        total *= sizes[dim] if isinstance(dim, str) else dim
    return total

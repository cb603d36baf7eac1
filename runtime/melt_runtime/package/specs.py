"""What a package consists of: tensors, graphs and states, and the names that may stand in them."""

from __future__ import annotations

from dataclasses import dataclass

DIALECTS = ("onnxruntime", "standard", "portable")
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
MAX_BATCH = 1 << 16
MAX_LOOPS = 1024  # of a token, whoever asks: a package, a session file, a request or a program
STATE_KINDS = ("swap", "in_place", "read_only", "per_loop")
GRAPHS = ("embed", "loop_step", "lm_head")
NAMED_SIZES = ("batch", "chunk", "context")

Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. ``shape`` mixes sizes with the names "batch", "chunk" and "context"."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file and what goes in and out."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StateSpec:
    """A state tensor of the loop step: allocated once, then reused for every loop and token.

    ``kind``: "swap" (two buffers trade places each loop: hidden, latent), "in_place" (one buffer is bound as
    ``input`` and ``output``: the caches), "read_only" (caches of the portable dialect, whose ``output`` holds the
    chunk's new rows, which the runtime copies in after the last loop), "per_loop" (a LoopLM's caches: ``shape`` begins
    with the number of loops, and loop t binds the t-th part in place).
    """

    input: str
    output: str
    dtype: str
    shape: Shape
    kind: str

    @property
    def bound_shape(self) -> Shape:
        """What one loop step is given of it: all, or of a cache a loop its own."""
        return self.shape[1:] if self.kind == "per_loop" else self.shape

    @property
    def output_shape(self) -> Shape:
        """The shape of what one loop step gives back for it."""
        return rows_shape(self.shape) if self.kind == "read_only" else self.bound_shape

    def bytes(self, batch: int, chunk: int) -> int:
        """Bytes that the runtime allocates for it, both swap buffers or the new rows included."""
        total = size_of(self.shape, self.dtype, batch=batch, chunk=chunk)
        if self.kind == "swap":
            return 2 * total
        if self.kind == "read_only":
            return total + size_of(rows_shape(self.shape), self.dtype, batch=batch, chunk=chunk)
        return total


def rows_shape(cache: Shape) -> Shape:
    """The shape of a chunk's new rows of a cache (batch, kv_heads, rows, head_dim)."""
    return (cache[0], cache[1], "chunk", cache[3])


def size_of(shape: Shape, dtype: str, **sizes: int) -> int:
    """Bytes of a tensor, given the sizes of its named dimensions."""
    total = ITEM_BYTES[dtype]
    for dim in shape:
        total *= sizes[dim] if isinstance(dim, str) else dim
    return total

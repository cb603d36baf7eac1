"""The graphs of a package: embed, loop step, coda where the model has one, and language-modelling head.

They map token ids to hidden states, hidden states to hidden states (once per loop, then once more), and hidden states
to logits. PyTorch traces all that has layers or a norm; the others are written directly.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import onnx_ir as ir
import torch
import torch.fx.experimental._config
from melt_models import MeltConfig
from melt_models.checkpoint import LoopedModel
from melt_models.configuration import LoopedConfig
from melt_models.core import LoopedCore
from melt_models.layers import rotary_tables
from melt_models.looplm import LoopLMModel
from melt_models.melt import MeltModel
from melt_runtime.package.specs import StateSpec, TensorSpec
from onnx_ir import tensor_adapters
from onnx_ir.passes.common import CommonSubexpressionEliminationPass
from torch import Tensor, nn

from .cleanup import CHECKPOINT_NAME, SCOPE, TRANSPOSED, name_everything
from .dialects import Dialect, GraphAttention, GraphInputs
from .fuse_skip_norm import fuse_norms
from .lowering import lower
from .merge_matmuls import attend_merged, merge_matmuls
from .skip_first_gate import skip_first_gate

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPES = {**TORCH_DTYPES, "int64": torch.int64, "bool": torch.bool}
_IR_VERSION = 10
# Sizes of the named dimensions while tracing: distinct, and none of them 0 or 1.
_TRACE_SIZES = {"batch": 2, "chunk": 3, "context": 5}


class _Rotary(nn.Module):
    """Rotary tables under the names ``rotary.cos`` and ``rotary.sin``, (cache_rows, head_dim / 2) each."""

    def __init__(self, cos: Tensor, sin: Tensor):
        super().__init__()
        self.cos: Tensor = nn.Buffer(cos)
        self.sin: Tensor = nn.Buffer(sin)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Make PyTorch compute in one thread.

    With several threads its cosines may differ in the last bit from run to run, and so would packages of one
    checkpoint.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


M = TypeVar("M", MeltModel, LoopLMModel, LoopedCore)


class _LoopStep(nn.Module, Generic[M]):
    """A model's ``loop_step`` with a dialect's attention, and all state as inputs and outputs."""

    model: M

    def __init__(self, model: M, dialect: Dialect, cache_rows: int, dtype: torch.dtype):
        super().__init__()
        self.model, self.dialect = model, dialect
        with _one_thread():
            cos, sin = rotary_tables(model.config, torch.arange(cache_rows))
        self.rotary = _Rotary(cos.to(dtype), sin.to(dtype))

    def attend(self, lengths: Tensor, control: Tensor, caches: tuple[Tensor, ...]) -> GraphAttention:
        keys, values = list(caches[::2]), list(caches[1::2])
        inputs = GraphInputs(self.model.config, lengths, control, keys, values, self.rotary.cos, self.rotary.sin)
        return self.dialect.attention(inputs)

    def split(self, states: tuple[Tensor, ...]) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        """Return what is injected into the loops, which comes before the states, and these."""
        return (None, states) if self.model.adapter is None else (states[0], states[1:])

    def stage(self, given: tuple[Tensor, ...]) -> GraphAttention | _NoLayers:
        """Return the attention of a stage that runs once per token."""
        return self.attend(given[0], given[1], given[2:]) if given else _NoLayers()


class _MeltStep(_LoopStep[MeltModel]):
    """Loop step of a MELT: takes and returns each layer's latent, and freezes tokens that left the loop."""

    def forward(
        self,
        hidden: Tensor,
        first_loop: Tensor,
        active: Tensor,
        lengths: Tensor,
        control: Tensor,
        *states: Tensor,
    ) -> tuple[Tensor, ...]:
        layers = len(self.model.layers)
        injected, states = self.split(states)
        attend = self.attend(lengths, control, states[layers:])
        step = self.model.loop_step_by_layer(hidden, states[:layers], first_loop, active, attend, injected)
        hidden, latents, exit_probability = step
        return _given(hidden, exit_probability, *latents, *attend.outputs)


class _LoopLMStep(_LoopStep[LoopLMModel]):
    """Loop step of a LoopLM: takes the caches of the loop that runs, and keeps nothing else between loops."""

    def forward(self, hidden: Tensor, lengths: Tensor, control: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        injected, caches = self.split(caches)
        attend = self.attend(lengths, control, caches)
        return _given(*self.model.loop_step(hidden, attend, injected), *attend.outputs)


class _OnlyLoop(_LoopStep[MeltModel]):
    """Loop step of a MELT with one loop, which keeps nothing for a next one."""

    def forward(self, hidden: Tensor, lengths: Tensor, control: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        injected, caches = self.split(caches)
        attend = self.attend(lengths, control, caches)
        return _given(*self.model.only_loop(hidden, attend, injected), *attend.outputs)


class _Embed(_LoopStep[LoopedCore]):
    """Embedding and prelude. ``given``: lengths, control and caches, where the prelude has layers."""

    def forward(self, input_ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        attend = self.stage(given)
        hidden = self.model.prelude(self.model.embed_tokens(input_ids), attend)
        return (hidden, *attend.outputs)


class _Coda(_LoopStep[LoopedCore]):
    """What stands between the last loop and the head. ``given``: as for ``_Embed``."""

    def forward(self, hidden: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        attend = self.stage(given)
        return (self.model.coda(hidden, attend), *attend.outputs)


class _NoLayers:
    """The ``attend`` of a stage without layers."""

    outputs: tuple[Tensor, ...] = ()

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise AssertionError("a stage without layers attends to nothing")


def _given(*values: Tensor | None) -> tuple[Tensor, ...]:
    """Leave out what a model does not have: the exit probability without an exit gate."""
    return tuple(value for value in values if value is not None)


@dataclass(frozen=True)
class TracedGraph:
    """An ONNX model without weight data, and its inputs and outputs."""

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def staggers(config: LoopedConfig) -> bool:
    """Return whether a model's package lets the tokens of a chunk be in different loops: a MELT of several loops."""
    return isinstance(config, MeltConfig) and config.total_ut_steps > 1


def loop_states(config: LoopedConfig, dialect: Dialect, dtype: str, cache_rows: int) -> list[StateSpec]:
    """Return all state tensors of the loop step, in the order of its inputs."""
    states = [StateSpec("hidden", "next_hidden", dtype, ("batch", "chunk", config.hidden_size), "swap")]
    if isinstance(config, MeltConfig) and staggers(config):
        latent = ("batch", "chunk", config.latent_size)
        for layer in range(config.num_hidden_layers):
            states.append(StateSpec(f"latent.{layer}", f"next_latent.{layer}", dtype, latent, "swap"))
    return [*states, *dialect.cache_states(config, dtype, cache_rows)]


def embed_graph(
    model: LoopedModel,
    dialect: Dialect,
    dtype: str,
    states: Sequence[StateSpec] = (),
    cache_rows: int = 0,
    apart: Container[str] = (),
) -> TracedGraph:
    """Make the graph from token ids (batch, chunk) to hidden, or what is injected into the loops, (batch, chunk, d):
    one Gather, or with a prelude its layers too. ``states``: the prelude's caches."""
    config = model.config
    ids = TensorSpec("input_ids", "int64", ("batch", "chunk"))
    name = "hidden" if config.injection == "none" else "injected"
    hidden = TensorSpec(name, dtype, ("batch", "chunk", config.hidden_size))
    if states or config.embedding_scale != 1:
        return _once(_Embed, model, dialect, dtype, ids, hidden, states, cache_rows, apart)
    weight, given = _embedding(model.config, dtype), _value(ids)
    gather = _node("Gather", [weight, given], hidden, "embed_tokens", axis=0)
    return _finished(_graph([given], [gather], weight, dialect), (ids,), (hidden,))


def coda_graph(
    model: LoopedModel,
    dialect: Dialect,
    dtype: str,
    states: Sequence[StateSpec],
    cache_rows: int,
    apart: Container[str] = (),
) -> TracedGraph:
    """Make the graph from the last loop's hidden (batch, chunk, d) to what the head reads. ``states``: its caches."""
    shape = ("batch", "chunk", model.config.hidden_size)
    hidden, after = TensorSpec("hidden", dtype, shape), TensorSpec("next_hidden", dtype, shape)
    return _once(_Coda, model, dialect, dtype, hidden, after, states, cache_rows, apart)


def _once(
    kind: type[_LoopStep],
    model: LoopedModel,
    dialect: Dialect,
    dtype: str,
    given: TensorSpec,
    made: TensorSpec,
    states: Sequence[StateSpec],
    cache_rows: int,
    apart: Container[str],
) -> TracedGraph:
    """Trace a stage that runs once per token."""
    controls = (TensorSpec("lengths", "int64", ("batch",)), dialect.control) if states else ()
    inputs = (given, *controls, *(TensorSpec(s.input, s.dtype, s.bound_shape) for s in states))
    outputs = (made, *(TensorSpec(s.output, s.dtype, s.output_shape) for s in states))
    module = kind(model.model, dialect, cache_rows, TORCH_DTYPES[dtype])
    traced = _trace(module, dialect.opset, inputs, outputs, 1, cache_rows if states else None)
    if dialect.fuses:
        merge_matmuls(traced.model.graph, apart)
        attend_merged(traced.model.graph)
        fuse_norms(traced.model)
    return traced


def trace_loop_step(
    model: LoopedModel,
    dialect: Dialect,
    dtype: str,
    states: list[StateSpec],
    cache_rows: int,
    apart: Container[str] = (),
) -> TracedGraph:
    """Trace one loop over a chunk. ``apart``: weights that are merged with none but each other.

    The graph takes and returns every state tensor; it also returns the exit probability (batch, chunk) of a model with
    an exit gate, and takes what is injected into the loops.
    """
    hidden, *others = states
    steered = others[0].kind == "swap"
    steering = tuple(TensorSpec(name, "bool", ("batch", "chunk")) for name in ("first_loop", "active"))
    fixed = (
        TensorSpec(hidden.input, hidden.dtype, hidden.shape),
        *(steering if steered else ()),
        TensorSpec("lengths", "int64", ("batch",)),
        dialect.control,
    )
    injected = (TensorSpec("injected", hidden.dtype, hidden.shape),) if model.config.injection != "none" else ()
    inputs = (*fixed, *injected, *(TensorSpec(s.input, s.dtype, s.bound_shape) for s in others))
    exits = (TensorSpec("exit_probability", "float32", ("batch", "chunk")),) if model.config.exit_gate else ()
    outputs = (
        TensorSpec(hidden.output, hidden.dtype, hidden.shape),
        *exits,
        *(TensorSpec(s.output, s.dtype, s.output_shape) for s in others),
    )
    melt = isinstance(model.config, MeltConfig)
    step = _MeltStep if steered else _OnlyLoop if melt else _LoopLMStep
    module: nn.Module = step(model.model, dialect, cache_rows, TORCH_DTYPES[dtype])  # type: ignore[arg-type]
    traced = _trace(module, dialect.opset, inputs, outputs, len(fixed), cache_rows)
    if dialect.fuses:
        if steered and isinstance(model.config, MeltConfig) and model.config.gate_starts_at_input:
            skip_first_gate(traced.model.graph)
        merge_matmuls(traced.model.graph, apart)
        attend_merged(traced.model.graph)
        fuse_norms(traced.model)
    return traced


def lm_head_graph(model: LoopedModel, dialect: Dialect, dtype: str) -> TracedGraph:
    """Make the graph from hidden (batch, chunk, d) to float32 logits (batch, chunk, vocab).

    A tied head multiplies by the embedding itself, so that both graphs share its bytes.
    """
    config = model.config
    hidden = TensorSpec("hidden", dtype, ("batch", "chunk", config.hidden_size))
    logits = TensorSpec("logits", "float32", ("batch", "chunk", config.vocab_size))
    given, narrow = _value(hidden), TensorSpec("", dtype, logits.shape)
    if config.tie_word_embeddings:
        weight = _embedding(config, dtype)
        turned = TensorSpec("", dtype, (config.hidden_size, config.vocab_size))
        nodes = [_node("Transpose", [weight], turned, perm=[1, 0])]
        nodes.append(_node("MatMul", [given, nodes[0].outputs[0]], narrow))
    else:
        weight = _value(TensorSpec("lm_head.weight", dtype, (config.hidden_size, config.vocab_size)))
        weight.meta.update({CHECKPOINT_NAME: weight.name, TRANSPOSED: True})
        nodes = [_node("MatMul", [given, weight], narrow, "lm_head")]
    if dtype != logits.dtype:
        nodes.append(_node("Cast", nodes[-1].outputs, logits, to=int(ir.DataType.FLOAT)))
    return _finished(_graph([given], nodes, weight, dialect), (hidden,), (logits,))


def _embedding(config: LoopedConfig, dtype: str) -> ir.Value:
    weight = _value(TensorSpec("model.embed_tokens.weight", dtype, (config.vocab_size, config.hidden_size)))
    weight.meta[CHECKPOINT_NAME] = weight.name
    return weight


def _value(spec: TensorSpec) -> ir.Value:
    kind = tensor_adapters.from_torch_dtype(_DTYPES[spec.dtype])
    return ir.Value(name=spec.name or None, shape=ir.Shape(spec.shape), type=ir.TensorType(kind))


def _node(op_type: str, inputs: Sequence[ir.Value], output: TensorSpec, scope: str = "", **attributes: Any) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, outputs=[_value(output)])
    node.meta[SCOPE] = scope
    return node


def _graph(inputs: list[ir.Value], nodes: list[ir.Node], weight: ir.Value, dialect: Dialect) -> ir.Graph:
    imports = {"": dialect.opset}
    return ir.Graph(inputs, nodes[-1].outputs, nodes=nodes, initializers=[weight], opset_imports=imports)


def _trace(
    module: nn.Module,
    opset: int,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    fixed: int,
    cache_rows: int | None = None,
) -> TracedGraph:
    """Trace a module with named dynamic dimensions.

    ``fixed``: number of inputs that are parameters of their own; the others are caches, passed as ``*caches``.
    ``cache_rows``: number of positions in the caches, if there are any, and the largest context.
    """
    context = _TRACE_SIZES["context"] if cache_rows is None else min(cache_rows, _TRACE_SIZES["context"])
    sizes = {**_TRACE_SIZES, "context": context}
    # PyTorch 2.11 cannot slice a cache to a context without this bound.
    named = {name: torch.export.Dim(name, max=cache_rows if name == "context" else None) for name in sizes}
    # Expanded from one value: caches of a long sequence would not fit into memory.
    example = tuple(
        torch.zeros((), dtype=_DTYPES[spec.dtype]).expand([sizes.get(d, d) for d in spec.shape])  # type: ignore[arg-type]
        for spec in inputs
    )
    dynamic = tuple({i: named[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in inputs)
    shapes = (*dynamic[:fixed], dynamic[fixed:]) if len(inputs) > fixed else dynamic
    # Oblivious to sizes, so that a size of 1 gets no graph of its own.
    with warnings.catch_warnings(), torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        warnings.simplefilter("ignore")  # PyTorch's advice to its own developers
        program = torch.export.export(
            module, example, dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True
        )
    return _finished(lower(program, [(spec.name, spec.shape) for spec in inputs], opset), inputs, outputs)


def _finished(graph: ir.Graph, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> TracedGraph:
    """Name a graph's outputs, nodes and values."""
    for value, spec in zip(graph.outputs, outputs, strict=True):
        value.name, value.shape = spec.name, ir.Shape(spec.shape)
    model = ir.Model(graph, ir_version=_IR_VERSION)
    CommonSubexpressionEliminationPass()(model)
    name_everything(graph)
    return TracedGraph(model, inputs, outputs)

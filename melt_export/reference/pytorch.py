"""The PyTorch side of parity: the states of every loop and greedy tokens, computed from the checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from melt_models import LoopLMForCausalLM
from melt_models.cache import ChunkAttention, MeltCache, Stored
from melt_models.checkpoint import LoopedModel
from melt_models.looplm import causal_mask
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from .float32_matmul import FLOAT32, Arithmetic, Float32Matmul

# Logits are kept for the last so many tokens of a chunk: a vocabulary is wide.
LOGIT_COLUMNS = 8


@dataclass(frozen=True)
class LoopTrace:
    """States after one loop over one sequence's chunk.

    - ``hidden``: (chunk, d).
    - ``latent``: (layers, chunk, latent_size); None for a LoopLM.
    - ``exit_probability``: (chunk,); None without an exit gate.
    - ``keys``, ``values``: (layers, kv_heads, chunk, head_dim), of prelude, coda and this loop's core, in this order.
    - ``logits``: (up to LOGIT_COLUMNS, vocab), of the chunk's last tokens.
    """

    loop: int
    hidden: NDArray[Any]
    latent: NDArray[Any] | None
    exit_probability: NDArray[Any] | None
    keys: NDArray[Any]
    values: NDArray[Any]
    logits: NDArray[Any]


@contextmanager
def computing(arithmetic: Arithmetic = FLOAT32) -> Iterator[None]:
    with torch.inference_mode(), Float32Matmul(arithmetic):
        yield


def every_loop(model: nn.Module, loops: int, chunk: int) -> dict[str, Any]:
    """Return the arguments with which a MELT or LoopLM runs all loops for every token."""
    if isinstance(model, LoopLMForCausalLM):
        return {"num_loops": loops, "exit_at_step": loops - 1}
    return {"num_loops": loops, "chunk_size": chunk, "exit_threshold": 1.0}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a model by the checkpoint names of their weights."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


class Reference(ABC):
    """A checkpoint computed by PyTorch, one sequence at a time."""

    def __init__(self, model: Any, stored: Stored | None = None):
        self.model, self.config, self.stored = model, model.config, stored

    @abstractmethod
    def cache(self) -> Any:
        """Return an empty cache."""

    @abstractmethod
    def traces(
        self, chunks: Sequence[Sequence[int]], loops: int, threshold: float = 1.0, arithmetic: Arithmetic = FLOAT32
    ) -> tuple[list[list[LoopTrace]], list[int]]:
        """Run the chunks of one sequence in order. Returns every chunk's loops, in float32, and each token's depth."""

    def logits(self, ids: Sequence[int], loops: int, chunk: int) -> NDArray[Any]:
        """Return the float32 logits (tokens, vocab) of a new sequence; every token runs all loops."""
        with computing():
            output = self.model(
                torch.tensor([list(ids)]),
                past_key_values=self.cache(),
                **every_loop(self.model, loops, chunk),
            )
            return output.logits[0].float().numpy()

    def greedy(self, prompt: Sequence[int], count: int, loops: int, chunk: int) -> tuple[list[int], list[float]]:
        """Return ``count`` greedy tokens, and for each the difference between the best and the second-best logit."""
        cache = self.cache()
        ids, tokens, margins = list(prompt), [], []
        with computing():
            for _ in range(count):
                output = self.model(
                    torch.tensor([ids]),
                    past_key_values=cache,
                    **every_loop(self.model, loops, chunk),
                    logits_to_keep=1,
                )
                best = output.logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                ids = tokens[-1:]
        return tokens, margins


def reference_of(model: LoopedModel, stored: Stored | None = None) -> Reference:
    """Return the reference that runs a model. ``stored``: what its caches keep of new rows (see ``MeltCache``)."""
    if isinstance(model, LoopLMForCausalLM):
        return LoopLMReference(model, stored)
    return MeltReference(model, stored)


class MeltReference(Reference):
    """A MELT checkpoint computed by PyTorch."""

    def cache(self) -> MeltCache:
        return MeltCache(self.config.first_cache("core", 1), self.stored)

    def traces(
        self, chunks: Sequence[Sequence[int]], loops: int, threshold: float = 1.0, arithmetic: Arithmetic = FLOAT32
    ) -> tuple[list[list[LoopTrace]], list[int]]:
        cache = self.cache()
        traces: list[list[LoopTrace]] = []
        depths: list[int] = []
        with computing(arithmetic):
            for ids in chunks:
                valid = torch.ones(1, len(ids), dtype=torch.bool)
                core = self.model.model
                attend = ChunkAttention(self.config, cache, valid, self.config.first_cache("prelude"))
                injected = core.prelude(core.embed_tokens(torch.tensor([list(ids)])), attend)
                hidden = core.start(injected, attend.positions)
                attend.first = self.config.first_cache("coda")
                depth = torch.zeros(len(ids), dtype=torch.long)
                chunk: list[LoopTrace] = []
                for step, active in core.loops(hidden, valid, cache, loops, threshold, injected):
                    depth += active[0]
                    logits = self.model.lm_head(core.coda(step.hidden, attend)[0, -LOGIT_COLUMNS:])
                    rows = _last_rows(cache.layers, len(ids))
                    exits = None if step.exit_probability is None else step.exit_probability[0]
                    found = (step.hidden[0], step.latent[:, 0], exits, *rows, logits)
                    chunk.append(LoopTrace(len(chunk) + 1, *map(_array, found)))  # type: ignore[arg-type]
                cache.commit(valid)
                traces.append(chunk)
                depths += depth.tolist()
        return traces, depths


def _last_rows(layers: Sequence[Any], count: int) -> list[Tensor]:
    """Return the keys and the values of the last ``count`` positions, (layers, kv_heads, count, head_dim) each."""
    return [torch.stack([getattr(layer, part)[0, :, -count:] for layer in layers]) for part in ("keys", "values")]


def _array(x: Tensor | None) -> NDArray[Any] | None:
    return None if x is None else x.float().numpy().copy()


class _StoringCache(DynamicCache):
    """A cache that keeps ``stored(layer, key, value)`` instead of new keys and values, alike in every loop.

    ``once``: the caches before those of the loops.
    """

    def __init__(self, once: int, layers: int, stored: Stored):
        super().__init__()
        self.once, self.count, self.stored = once, layers, stored

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        in_loop = self.once + (layer_idx - self.once) % self.count
        rows = self.stored(layer_idx if layer_idx < self.once else in_loop, key_states, value_states)
        return super().update(*rows, layer_idx, *args, **kwargs)


class LoopLMReference(Reference):
    """A LoopLM checkpoint computed by PyTorch.

    Every loop has caches of its own, so results do not depend on chunks, and every token runs all loops.
    """

    def cache(self) -> DynamicCache:
        if self.stored is None:
            return DynamicCache()
        return _StoringCache(self.config.first_cache("core"), self.config.num_hidden_layers, self.stored)

    def traces(
        self, chunks: Sequence[Sequence[int]], loops: int, threshold: float = 1.0, arithmetic: Arithmetic = FLOAT32
    ) -> tuple[list[list[LoopTrace]], list[int]]:
        cache: Any = self.cache()
        traces: list[list[LoopTrace]] = []
        core = self.model.model
        first = self.config.first_cache
        with computing(arithmetic):
            for ids in chunks:
                seen = cache.get_seq_length() + len(ids)
                mask = causal_mask(torch.ones(1, seen, dtype=torch.bool), len(ids))
                positions = torch.arange(seen - len(ids), seen)[None]
                embedded = core.embed_tokens(torch.tensor([list(ids)]))
                hidden, exits = core.run(embedded, mask, positions, cache, loops)
                chunk: list[LoopTrace] = []
                for loop in range(loops):
                    for layer in cache.layers[first("coda") : first("core")]:
                        if layer.is_initialized:  # drop what the loop before left
                            layer.keys, layer.values = (
                                x[..., : seen - len(ids), :] for x in (layer.keys, layer.values)
                            )
                    read = core.read(hidden[loop], mask, positions, cache)
                    own = [*cache.layers[: first("core")], *cache.layers[first("core", loop) : first("core", loop + 1)]]
                    logits = self.model.lm_head(read[0, -LOGIT_COLUMNS:])
                    exit_probability = None if exits is None else exits[loop, 0]
                    found = (hidden[loop, 0], None, exit_probability, *_last_rows(own, len(ids)), logits)
                    chunk.append(LoopTrace(loop + 1, *map(_array, found)))  # type: ignore[arg-type]
                traces.append(chunk)
        return traces, [loops] * sum(map(len, chunks))

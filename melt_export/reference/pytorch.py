"""The PyTorch side of parity: every loop's states, and greedy tokens, from the checkpoint itself in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from melt_models import LoopLMForCausalLM, MeltForCausalLM
from melt_models.cache import MeltCache, Stored
from melt_models.checkpoint import load_model
from melt_models.looplm import causal_mask
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from .float32_matmul import FLOAT32, Arithmetic, Float32Matmul

# Logits are compared on so many columns at the end of each chunk: a vocabulary is wide.
LOGIT_COLUMNS = 8


@dataclass(frozen=True)
class LoopTrace:
    """One loop over one sequence's chunk: hidden (chunk, d), latent (layers, chunk, d; None: a LoopLM),
    exit_probability (chunk,),
    keys and values (layers, kv_heads, chunk, head_dim), logits (at most LOGIT_COLUMNS, vocab)."""

    loop: int
    hidden: NDArray[Any]
    latent: NDArray[Any] | None
    exit_probability: NDArray[Any]
    keys: NDArray[Any]
    values: NDArray[Any]
    logits: NDArray[Any]


@contextmanager
def _computing(arithmetic: Arithmetic = FLOAT32) -> Iterator[None]:
    with torch.inference_mode(), Float32Matmul(arithmetic):
        yield


def every_loop(model: nn.Module, loops: int, chunk: int) -> dict[str, Any]:
    """The arguments with which a MELT or LoopLM runs all loops for every token."""
    if isinstance(model, LoopLMForCausalLM):
        return {"num_loops": loops, "exit_at_step": loops - 1}
    return {"num_loops": loops, "chunk_size": chunk, "exit_threshold": 1.0}


class Reference(Protocol):
    """A checkpoint as PyTorch computes it, one sequence at a time."""

    def traces(
        self, pieces: Sequence[Sequence[int]], loops: int, threshold: float = 1.0, arithmetic: Arithmetic = FLOAT32
    ) -> tuple[list[list[LoopTrace]], list[int]]:
        """Runs chunks of one sequence one after the other: every chunk's loops (as float32, whatever the arithmetic),
        and each token's depth."""

    def logits(self, ids: Sequence[int], loops: int, chunk: int) -> NDArray[Any]:
        """Logits (tokens, vocab), float32, of a sequence of its own; every token runs all loops."""

    def greedy(self, prompt: Sequence[int], count: int, loops: int, chunk: int) -> tuple[list[int], list[float]]:
        """``count`` greedy tokens, and how far each one's logit stands above the runner-up's."""


def open_reference(
    checkpoint: Path, device: str = "cpu", prepare: Callable[[nn.Module], Stored | None] | None = None
) -> Reference:
    """The reference of a MELT or LoopLM checkpoint. device: where, as PyTorch names it. Raises CheckpointError.

    prepare: changes the model before anything runs, as ``quantization.stored_values.as_packaged`` gives it, and returns
    what its caches keep of rows.
    """
    model = load_model(checkpoint, as_stored=True)
    stored = None if prepare is None else prepare(model)
    found = LoopLMReference if isinstance(model, LoopLMForCausalLM) else MeltReference
    return found(model.to(device), device, stored)  # type: ignore[arg-type]


class MeltReference:
    """A MELT checkpoint as PyTorch computes it, one sequence at a time."""

    def __init__(self, model: MeltForCausalLM, device: str = "cpu", stored: Stored | None = None):
        self.model, self.config, self.device, self.stored = model, model.config, device, stored

    def _cache(self) -> MeltCache:
        return MeltCache(self.config.num_hidden_layers, self.stored)

    def traces(
        self, pieces: Sequence[Sequence[int]], loops: int, threshold: float = 1.0, arithmetic: Arithmetic = FLOAT32
    ) -> tuple[list[list[LoopTrace]], list[int]]:
        """Runs chunks of one sequence one after the other: every chunk's loops, and each token's depth."""
        cache = self._cache()
        traces: list[list[LoopTrace]] = []
        depths: list[int] = []
        with _computing(arithmetic):
            for ids in pieces:
                valid = torch.ones(1, len(ids), dtype=torch.bool, device=self.device)
                hidden = self.model.model.embed_tokens(torch.tensor([list(ids)], device=self.device))
                depth = torch.zeros(len(ids), dtype=torch.long, device=self.device)
                chunk: list[LoopTrace] = []
                for step, active in self.model.model.loops(hidden, valid, cache, loops, threshold):
                    depth += active[0]
                    logits = self.model.lm_head(step.hidden[0, -LOGIT_COLUMNS:])
                    rows = [
                        torch.stack([getattr(layer, part)[0, :, -len(ids) :] for layer in cache.layers])
                        for part in ("keys", "values")
                    ]
                    tensors = (step.hidden[0], step.latent[:, 0], step.exit_probability[0], *rows, logits)
                    chunk.append(LoopTrace(len(chunk) + 1, *(x.float().cpu().numpy().copy() for x in tensors)))
                cache.commit(valid)
                traces.append(chunk)
                depths += depth.tolist()
        return traces, depths

    def logits(self, ids: Sequence[int], loops: int, chunk: int) -> NDArray[Any]:
        """As ``Reference``."""
        with _computing():
            output = self.model(
                torch.tensor([list(ids)], device=self.device),
                past_key_values=self._cache(),
                **every_loop(self.model, loops, chunk),
            )
            return output.logits[0].float().cpu().numpy()

    def greedy(self, prompt: Sequence[int], count: int, loops: int, chunk: int) -> tuple[list[int], list[float]]:
        """``count`` greedy tokens, and how far each one's logit stands above the runner-up's."""
        cache = self._cache()
        ids, tokens, margins = list(prompt), [], []
        with _computing():
            for _ in range(count):
                output = self.model(
                    torch.tensor([ids], device=self.device),
                    past_key_values=cache,
                    **every_loop(self.model, loops, chunk),
                    logits_to_keep=1,
                )
                best = output.logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                ids = tokens[-1:]
        return tokens, margins


class _StoringCache(DynamicCache):
    """Keeps of new rows what ``stored`` makes of them, the same for a layer in every loop."""

    def __init__(self, layers: int, stored: Stored):
        super().__init__()
        self.count, self.stored = layers, stored

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As DynamicCache."""
        rows = self.stored(layer_idx % self.count, key_states, value_states)
        return super().update(*rows, layer_idx, *args, **kwargs)


class LoopLMReference:
    """A LoopLM checkpoint: every loop keeps the rows of its own caches, so chunks change nothing."""

    def __init__(self, model: LoopLMForCausalLM, device: str = "cpu", stored: Stored | None = None):
        self.model, self.config, self.device, self.stored = model, model.config, device, stored

    def _cache(self) -> DynamicCache:
        return DynamicCache() if self.stored is None else _StoringCache(self.config.num_hidden_layers, self.stored)

    def traces(
        self, pieces: Sequence[Sequence[int]], loops: int, threshold: float = 1.0, arithmetic: Arithmetic = FLOAT32
    ) -> tuple[list[list[LoopTrace]], list[int]]:
        """As ``Reference``; every token runs all loops, whatever the threshold."""
        cache, traces = self._cache(), []
        layers = self.config.num_hidden_layers
        with _computing(arithmetic):
            for ids in pieces:
                seen = cache.get_seq_length() + len(ids)
                mask = causal_mask(torch.ones(1, seen, dtype=torch.bool, device=self.device), len(ids))
                positions = torch.arange(seen - len(ids), seen, device=self.device)[None]
                embedded = self.model.model.embed_tokens(torch.tensor([list(ids)], device=self.device))
                hidden, exits = self.model.model(embedded, mask, positions, cache, loops)
                chunk: list[LoopTrace] = []
                for loop in range(loops):
                    own = cache.layers[loop * layers : (loop + 1) * layers]
                    keys, values = (
                        torch.stack([getattr(layer, part)[0, :, -len(ids) :] for layer in own])
                        for part in ("keys", "values")
                    )
                    logits = self.model.lm_head(hidden[loop, 0, -LOGIT_COLUMNS:])
                    found = [
                        x.float().cpu().numpy().copy() for x in (hidden[loop, 0], exits[loop, 0], keys, values, logits)
                    ]
                    chunk.append(LoopTrace(loop + 1, found[0], None, *found[1:]))
                traces.append(chunk)
        return traces, [loops] * sum(map(len, pieces))

    def logits(self, ids: Sequence[int], loops: int, chunk: int) -> NDArray[Any]:
        """As ``Reference``."""
        with _computing():
            output = self.model(
                torch.tensor([list(ids)], device=self.device),
                past_key_values=self._cache(),
                **every_loop(self.model, loops, chunk),
            )
            return output.logits[0].float().cpu().numpy()

    def greedy(self, prompt: Sequence[int], count: int, loops: int, chunk: int) -> tuple[list[int], list[float]]:
        """As ``Reference``."""
        cache = self._cache()
        ids, tokens, margins = list(prompt), [], []
        with _computing():
            for _ in range(count):
                output = self.model(
                    torch.tensor([ids], device=self.device),
                    past_key_values=cache,
                    **every_loop(self.model, loops, chunk),
                    logits_to_keep=1,
                )
                best = output.logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                ids = tokens[-1:]
        return tokens, margins

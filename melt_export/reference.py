"""The PyTorch side of parity: every loop's states, and greedy tokens, from the checkpoint itself in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from melt_models import MeltForCausalLM, UnsupportedConfigError
from melt_models.cache import MeltCache
from melt_models.checkpoint import load_model
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

# Logits are compared on so many columns at the end of each chunk: a vocabulary is wide.
LOGIT_COLUMNS = 8


@dataclass(frozen=True)
class LoopTrace:
    """One loop over one sequence's chunk: hidden (chunk, d), latent (layers, chunk, d), exit_probability (chunk,),
    keys and values (layers, kv_heads, chunk, head_dim), logits (at most LOGIT_COLUMNS, vocab)."""

    loop: int
    hidden: NDArray[Any]
    latent: NDArray[Any]
    exit_probability: NDArray[Any]
    keys: NDArray[Any]
    values: NDArray[Any]
    logits: NDArray[Any]


class _WideProducts(TorchFunctionMode):
    """Float32 arithmetic over weights that stay as they are stored, so that a large bf16 checkpoint is never copied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            args = tuple(x.float() if isinstance(x, torch.Tensor) else x for x in args)
        result = func(*args, **kwargs)
        return result.float() if func is F.embedding else result


class Reference:
    """A MELT checkpoint as PyTorch computes it, one sequence at a time. device: where, as PyTorch names it."""

    def __init__(self, checkpoint: Path, device: str = "cpu"):
        model = load_model(checkpoint)
        if not isinstance(model, MeltForCausalLM):
            raise UnsupportedConfigError(f"{checkpoint} is not a MELT checkpoint")
        self.model, self.config, self.device = model.to(device), model.config, device  # type: ignore[arg-type]

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), _WideProducts():
            yield

    def traces(
        self, pieces: Sequence[Sequence[int]], loops: int, threshold: float = 1.0
    ) -> tuple[list[list[LoopTrace]], list[int]]:
        """Runs chunks of one sequence one after the other: every chunk's loops, and each token's depth."""
        cache = MeltCache(self.config.num_hidden_layers)
        traces: list[list[LoopTrace]] = []
        depths: list[int] = []
        with self._computing():
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

    def greedy(self, prompt: Sequence[int], count: int, loops: int, chunk: int) -> tuple[list[int], list[float]]:
        """``count`` greedy tokens, and how far each one's logit stands above the runner-up's."""
        cache = MeltCache(self.config.num_hidden_layers)
        ids, tokens, margins = list(prompt), [], []
        with self._computing():
            for _ in range(count):
                output = self.model(
                    torch.tensor([ids], device=self.device),
                    past_key_values=cache,
                    num_loops=loops,
                    chunk_size=chunk,
                    exit_threshold=1.0,
                    logits_to_keep=1,
                )
                best = output.logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
                ids = tokens[-1:]
        return tokens, margins

"""Training of the exit gate alone, on a finished model: Ouro's second stage (arXiv 2510.25741)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import widen
from ..looplm import LoopLMForCausalLM
from ..melt import MeltForCausalLM
from .chunked import ChunkedForward, ChunkStates, TeacherForward
from .data import IGNORE
from .errors import ConfigError
from .objectives import Losses, Objective, StepSize, at_least, draw_chunks, draw_start, shares, token_losses

COMPARED = ("next", "best")
MEASURED = ("loss", "divergence")


@dataclass(frozen=True)
class GateOptions:
    """Options of the stage ``gate``.

    - ``compared``: a token should stay if the ``"next"`` loop, or the ``"best"`` of all later ones, is better.
    - ``measured``: better by the ``"loss"`` of the word that follows, as in the paper, or by the ``"divergence"`` from
      what the model says after all loops. That is the gain to be expected where the model is right about how sure it
      is, without the chance that lies in one word: text needs it.
    - ``least_gain``: by how much, in nats; ``sharpness``: how fast the target goes from leave to stay around that
      gain. The defaults are the paper's.
    - ``chunk_sizes``, ``decoding_share``, ``random_depth``: how a MELT's tokens run, as in phase 2.
    """

    compared: str = "next"
    measured: str = "loss"
    least_gain: float = 0.005
    sharpness: float = 50.0
    chunk_sizes: Sequence[int] = ()
    decoding_share: float = 0.0
    random_depth: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("compared", COMPARED), ("measured", MEASURED)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        at_least(self, 0.0, "least_gain", "sharpness")
        shares(self, "random_depth", "decoding_share")
        if any(size < 1 for size in self.chunk_sizes):
            raise ValueError(f"chunk_sizes are {list(self.chunk_sizes)}; each must be 1 or more")


class GateObjective(Objective):
    """The exit gate learns, on a frozen model, whether a further loop makes a token's prediction better.

    With the gain ``I_t = loss_t - loss_{t+1}`` of a token, or with ``KL(p_T || p_t)`` for its losses, ``mean over
    labelled tokens and loops t < T of BCE(lambda_t, 1 - sigmoid(sharpness (I_t - least_gain)))``. On unlabelled tokens,
    whose keys and values others read, the gate learns to stay. Logged: the loss; ``stay``, the share of loops that were
    worth another one; ``right``, the share of the gate's decisions that agree.
    """

    def __init__(self, model: LoopLMForCausalLM | MeltForCausalLM, options: GateOptions, seed: int):
        super().__init__()
        if not model.config.exit_gate:
            raise ConfigError("the model has no exit gate to train")
        if model.config.total_ut_steps < 2:
            raise ConfigError("the model runs one loop per token, which leaves the exit gate nothing to decide")
        self.model, self.options, self.seed = model.requires_grad_(False), options, seed
        gate: Any = model.model.early_exit_gate
        gate.requires_grad_(True)

    def forward(
        self, input_ids: Tensor, targets: Tensor, size: StepSize, step: int, steps: int, span: tuple[int, int]
    ) -> Losses:
        loops, chunks = self.model.config.total_ut_steps, [(0, input_ids.shape[1], self.model.config.total_ut_steps)]
        start = draw_start(self.seed, step, len(input_ids))
        looplm = TeacherForward(self.model, loops, start) if isinstance(self.model, LoopLMForCausalLM) else None
        melt = None if looplm else ChunkedForward(self.model.model, loops, start=start)
        if melt is not None:
            sizes = self.options.chunk_sizes or [self.model.config.chunk_size]
            options = self.options
            chunks = draw_chunks(self.seed, step, *span, sizes, loops, options.random_depth, options.decoding_share)
        parts: dict[str, Tensor] = {}
        for at, until, depth in chunks:
            ids, goals = input_ids[:, at:until], targets[:, at:until]
            with torch.no_grad():
                if looplm is not None:
                    states = looplm.run(ids)
                else:
                    assert melt is not None
                    states = melt.run(self.model.model.embed_tokens(ids), depth)
            for name, value in self._judge(states, goals).items():
                parts[name] = parts.get(name, 0) + value / size.labelled
        return Losses(parts["exit"], {name: value.detach() for name, value in parts.items()})

    def _judge(self, states: ChunkStates, targets: Tensor) -> dict[str, Tensor]:
        """Return the loss and the figures of a chunk, summed over its tokens."""
        labelled = targets != IGNORE
        logits = widen(self.model.lm_head(states.read[:, labelled]))
        if self.options.measured == "loss":
            losses = token_losses(logits, targets[labelled])
        else:
            said = logits.log_softmax(-1)
            losses = (said[-1].exp() * (said[-1] - said)).sum(-1)
        decided, gate = len(losses) - 1, self.model.model.early_exit_gate
        later = losses[1:]
        if self.options.compared == "best":
            later = later.flip(0).cummin(0).values.flip(0)
        gain = losses[:-1] - later
        stay = torch.sigmoid(self.options.sharpness * (gain - self.options.least_gain))
        opinion = widen(gate(states.hidden[:-1].detach()).squeeze(-1))  # logit of lambda: (loops - 1, batch, chunk)
        leave = torch.zeros_like(opinion)
        leave[:, labelled] = (1 - stay).to(leave)
        wrong = F.binary_cross_entropy_with_logits(opinion, leave, reduction="none")
        right = ((opinion[:, labelled] > 0) == (stay < 0.5)).to(opinion)
        parts = {"exit": wrong.sum(), "stay": stay.sum(), "right": right.sum()}
        return {name: value / max(decided, 1) for name, value in parts.items()}

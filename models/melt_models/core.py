"""The looped core, on which every model of this package is built: prelude, loops and coda.

For each token, with e the embedding (d elements):

    e   = prelude(embedding * scale)                          layers that run once
    x_1 = e, seeded noise or zeros                            the start state
    x   = adapter(concat(x_t, e)), or x_t without injection   in each loop t of T
    x   = layers(x), one after the other
    x_{t+1} = norm(x), or x where no norm stands between loops
    head(norm(coda(x_{T+1})))                                 layers that run once, then the head

A layer with normed input a = n_1(x), where each n is an RMS norm or absent:

    z   = sigmoid(a W_z + h_{t-1} U_z + b_z)                  MELT's gate (arXiv 2605.07721); h lives only while
    h_t = z * h_{t-1} + (1 - z) * a                           the token loops. Without MELT, h_t is a.
    x   = x + n_2(attention(q = a W_Q, k = h_t W_K, v = h_t W_V) W_O)
    x   = x + n_4(mlp(n_3(x)))                                or n_2(x + ...), n_4(x + ...) for the norm of the sum

``LoopedCore`` is the only place that defines this: forwards, generate(), training and exported graphs all call its
stages. Caches, and with them the kinds of cache (per loop, or shared by all loops), enter by ``attend``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .aggregation import make_aggregation
from .configuration import LoopedConfig, MeltConfig
from .errors import shown
from .layers import MLP, Attend, Attention, RMSNorm, WritingAttend
from .start_state import start_noise


class Start(NamedTuple):
    """Where the loops start: the seed of the noise, for all sequences or (batch,), and what replaces the noise."""

    seed: int | Tensor = 0
    state: str | None = None

    @classmethod
    def checked(cls, config: LoopedConfig, seed: int | Tensor, state: str | None) -> Start:
        """Check what a request asks for. Raises ValueError."""
        if state is not None and state not in (config.start_state, "zeros"):
            raise ValueError(f"start_state is {shown(state)}; this model starts from {config.start_state!r} or 'zeros'")
        if state == "zeros" and config.injection == "none":
            raise ValueError("start_state is 'zeros', but nothing is injected into the loops: no token would be read")
        return cls(seed, state)


DEFAULT_START = Start()


def check_exit(config: LoopedConfig, threshold: float) -> None:
    """Raise ValueError for an exit threshold of a model without an exit gate, whose loops have no exit probability."""
    if threshold != 1 and not config.exit_gate:
        raise ValueError(f"exit_threshold is {threshold}, but the model has no exit gate and so no exit probability")


class DecoderLayer(GradientCheckpointingLayer):
    """A decoder layer with Ouro's tensor names. ``gated``: whether keys and values are projected from MELT's latent.

    With transformers' gradient checkpointing the backward pass calls it again: see ``WritingAttend``.
    """

    def __init__(self, config: LoopedConfig, layer: int, *, gated: bool = False):
        super().__init__()

        def norm(*layouts: str) -> nn.Module:
            stands = config.norm_layout in layouts
            return RMSNorm(config.hidden_size, config.rms_norm_eps) if stands else nn.Identity()

        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = norm("sandwich", "pre", "norm_of_sum")
        self.post_attention_layernorm = norm("sandwich", "pre", "norm_of_sum")
        self.input_layernorm_2 = norm("sandwich", "norm_of_sum", "post_branch")
        self.post_attention_layernorm_2 = norm("sandwich", "norm_of_sum", "post_branch")
        self.latent_gate = make_aggregation(config) if gated and isinstance(config, MeltConfig) else None
        self.norms_sum = config.norm_layout == "norm_of_sum"

    def forward(
        self,
        x: Tensor,
        attend: Attend,
        latent: Tensor | None = None,
        first_loop: Tensor | None = None,
        active: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the new x (batch, chunk, d) and latent (batch, chunk, latent_size).

        ``latent``, ``first_loop`` and ``active``, both (batch, chunk) bool, are for a gated layer with several loops.
        Without them it runs as in a first loop that no second one follows.
        """
        a = kv = self.input_layernorm(x)
        if latent is not None:
            assert self.latent_gate is not None
            assert first_loop is not None
            assert active is not None
            # torch.where rather than a multiplication: before the first loop the latent may hold NaN.
            latent = torch.where(first_loop.unsqueeze(-1), self.latent_gate.start(a), latent)
            latent = torch.where(active.unsqueeze(-1), self.latent_gate(a, latent), latent)
            kv = self.latent_gate.read(latent)
        elif self.latent_gate is not None:
            kv = self.latent_gate.first(a)
        x = self._add(x, self.self_attn(a, kv, attend), self.input_layernorm_2)
        return self._add(x, self.mlp(self.post_attention_layernorm(x)), self.post_attention_layernorm_2), latent

    def _add(self, x: Tensor, branch: Tensor, norm: nn.Module) -> Tensor:
        return norm(x + branch) if self.norms_sum else x + norm(branch)


class LoopedCore(nn.Module):
    """Embedding, prelude, looped layers, coda, final norm and exit gate: the mathematics of every model, in stages.

    Each stage takes an ``attend`` of its own and counts its layers from 0.
    """

    gradient_checkpointing = False  # set by transformers, here and in every layer

    def __init__(self, config: LoopedConfig):
        super().__init__()
        d, gated = config.hidden_size, isinstance(config, MeltConfig)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        self.prelude_layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_prelude_layers))
        self.adapter = nn.Linear(2 * d, d, bias=False) if config.injection == "linear" else None
        self.layers = nn.ModuleList(DecoderLayer(config, i, gated=gated) for i in range(config.num_hidden_layers))
        self.coda_layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_coda_layers))
        self.norm = RMSNorm(d, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(d, 1) if config.exit_gate else None

    def embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Return what new tokens are to the model, (batch, tokens, d): given, or embedded. Raises ValueError for both
        and for neither."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        found: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return found

    def prelude(self, embeddings: Tensor, attend: Attend) -> Tensor:
        """Run the layers before the loops. (batch, chunk, d), kept."""
        hidden = embeddings if self.config.embedding_scale == 1 else embeddings * self.config.embedding_scale
        for layer in self.prelude_layers:
            hidden, _ = layer(hidden, self._seen(attend))
        return hidden

    @property
    def repeats(self) -> bool:
        """Whether the backward pass runs layers again instead of keeping their intermediates."""
        return self.gradient_checkpointing and self.training

    def caches(self, use_cache: bool | None) -> bool:
        """Whether a forward returns its cache: by default as configured, and never where ``repeats``."""
        return (self.config.use_cache if use_cache is None else bool(use_cache)) and not self.repeats

    def shows(self, output_hidden_states: bool | None) -> bool:
        """Whether a forward returns every loop's hidden state."""
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)

    def _seen(self, attend: Attend) -> Attend:
        """Return ``attend`` for one call of one layer."""
        return attend.repeatable() if self.repeats and isinstance(attend, WritingAttend) else attend

    def start(self, injected: Tensor, positions: Tensor, seed: int | Tensor = 0, state: str | None = None) -> Tensor:
        """Return the hidden state before the first loop, (batch, chunk, d).

        - ``injected`` (batch, chunk, d): the prelude's output; ``positions`` (batch, chunk): the tokens' places.
        - ``seed``: of the noise, for all sequences or (batch,). ``state``: replaces the config's ``start_state``.
        """
        state = self.config.start_state if state is None else state
        if state == "embedding":
            return injected
        if state == "zeros":
            return torch.zeros_like(injected)
        seeds = seed.tolist() if isinstance(seed, Tensor) else [seed] * len(injected)
        places, size = positions.expand(injected.shape[:2]).cpu().numpy(), injected.shape[-1]
        noise = [start_noise(one, row, size, self.config.start_std) for one, row in zip(seeds, places, strict=True)]
        return torch.from_numpy(np.stack(noise)).to(injected)

    def one_loop(
        self,
        hidden: Tensor,
        attend: Attend,
        injected: Tensor | None = None,
        latent: Tensor | Sequence[Tensor] | None = None,
        first_loop: Tensor | None = None,
        active: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Run one loop over a chunk. Returns the new hidden state, each layer's latent, and the exit probability.

        - ``hidden`` (batch, chunk, d): the start state in the first loop, then the previous loop's result.
        - ``injected`` (batch, chunk, d): the prelude's output, for a model with an injection.
        - ``latent``: one (batch, chunk, latent_size) per layer, for MELT with several loops, and with it ``first_loop``
          and ``active``, both (batch, chunk) bool. A token that is not active keeps hidden state and latent.
        - The exit probability is (batch, chunk) float32; None for a model without an exit gate.
        """
        x = hidden if self.adapter is None else self.adapter(torch.cat((hidden, injected), dim=-1))  # type: ignore[arg-type]
        latents = []
        for index, layer in enumerate(self.layers):
            x, h = layer(x, self._seen(attend), None if latent is None else latent[index], first_loop, active)
            latents.append(h)
        x = self.norm(x) if self.config.norm_between_loops else x
        hidden = x if active is None else torch.where(active.unsqueeze(-1), x, hidden)
        return hidden, latents, self.exit_probability(hidden)

    def exit_probability(self, hidden: Tensor) -> Tensor | None:
        """Return a loop's exit probability (batch, chunk) in float32, or None without an exit gate."""
        if self.early_exit_gate is None:
            return None
        return torch.sigmoid(self.early_exit_gate(hidden).squeeze(-1).float())

    def coda(self, hidden: Tensor, attend: Attend) -> Tensor:
        """Turn a loop's hidden state into what the head reads. (batch, chunk, d), kept."""
        if self.config.norm_before_coda:
            hidden = self.norm(hidden)
        for layer in self.coda_layers:
            hidden, _ = layer(hidden, self._seen(attend))
        return self.norm(hidden) if self.config.norm_after_coda else hidden

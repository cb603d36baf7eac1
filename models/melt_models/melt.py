"""MELT (arXiv 2605.07721): a looped language model with one key/value cache per layer, shared by all loops.

In loop t of T, in layer l, for each token (x_1 is the embedding; h lives only while the token loops):

    a_t = input_layernorm(x_t)
    z_t = sigmoid(a_t W_z + h_{t-1} U_z + b_z)           the gate
    h_t = z_t * h_{t-1} + (1 - z_t) * a_t                the latent
    q_t = a_t W_Q;  k_t = h_t W_K;  v_t = h_t W_V        k and v overwrite the token's entry in the layer's cache
    x_t <- x_t + attention(q_t) W_O, then the MLP        and after the last layer the final norm

The mathematics is ``core.py``'s; here is what runs it with a shared cache: chunks, early exit, and the model that
transformers knows. Any looped model becomes a MELT by its core's latent gates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .aggregation import GATE_BIAS_INIT, LatentGate
from .cache import ChunkAttention, MeltCache
from .causal_lm import LoopedForCausalLM, LoopedOutput, every_state
from .configuration import MeltConfig
from .core import DEFAULT_START, LoopedCore, Start, check_exit
from .exits import ExitCriteria, Exits
from .layers import Attend


class LoopStep(NamedTuple):
    """Result of one loop.

    - ``hidden``: (batch, chunk, d).
    - ``latent``: (layers, batch, chunk, latent_size).
    - ``exit_probability``: (batch, chunk) float32, this loop's lambda; None for a model without an exit gate.
    """

    hidden: Tensor
    latent: Tensor
    exit_probability: Tensor | None


class ChunkOutput(NamedTuple):
    """Result of all loops of a chunk.

    - ``hidden``: (batch, chunk, d), what the head reads.
    - ``depth``: (batch, chunk), the number of loops of each token.
    - ``loop_hidden``: (loops, batch, chunk, d) and ``exit_probability``: (loops, batch, chunk), of every loop that ran.
      A model without an exit gate has no ``exit_probability``.
    """

    hidden: Tensor
    depth: Tensor
    loop_hidden: Tensor
    exit_probability: Tensor | None


class MeltModel(LoopedCore):
    """A looped core with latent gates, run in chunks over a shared cache."""

    config: MeltConfig

    def loop_step(
        self,
        hidden: Tensor,
        latent: Tensor,
        first_loop: Tensor,
        active: Tensor,
        attend: Attend,
        injected: Tensor | None = None,
    ) -> LoopStep:
        """Run one loop over a chunk.

        - ``hidden`` (batch, chunk, d): the start state in the first loop, then the previous loop's result.
        - ``latent`` (layers, batch, chunk, latent_size): from the previous loop; ignored where ``first_loop`` is True.
        - ``first_loop`` (batch, chunk) bool: whether this is the token's first loop; (batch,) for all tokens of a
          sequence. Tokens of a chunk may be in different loops (see ``decoding.py``).
        - ``active`` (batch, chunk) bool: a token that is not active keeps its hidden state and latent, so that its keys
          and values are rewritten unchanged.
        - ``attend``: writes the keys and values and attends over the cache.
        - ``injected`` (batch, chunk, d): the prelude's output, for a model with an injection.
        """
        step = self.loop_step_by_layer(hidden, latent, first_loop, active, attend, injected)
        return LoopStep(step[0], torch.stack(step[1]), step[2])

    def loop_step_by_layer(
        self,
        hidden: Tensor,
        latent: Tensor | Sequence[Tensor],
        first_loop: Tensor,
        active: Tensor,
        attend: Attend,
        injected: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Run ``loop_step`` with a latent (batch, chunk, latent_size) per layer, in and out."""
        first_loop = first_loop[:, None] if first_loop.dim() == 1 else first_loop
        return self.one_loop(hidden, attend, injected, latent, first_loop, active)

    def only_loop(self, hidden: Tensor, attend: Attend, injected: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run ``loop_step`` for tokens with a single loop, without a latent and without frozen tokens.

        hidden, injected: (batch, chunk, d). Returns the new hidden and the exit probability (batch, chunk) float32.
        """
        hidden, _, exit_probability = self.one_loop(hidden, attend, injected)
        return hidden, exit_probability

    def loops(
        self,
        hidden: Tensor,
        active: Tensor,
        cache: MeltCache,
        num_loops: int,
        exits: ExitCriteria | float,
        injected: Tensor | None = None,
        logits: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[LoopStep, Tensor]]:
        """Run a chunk's loops in order. Yields each loop's result and the tokens that were active, (batch, chunk) bool.

        hidden: (batch, chunk, d), the start state. ``exits``: what ends a token's loops; a number is the exit gate's
        threshold. ``logits``: the head, where a criterion reads it (see ``Exits``). Stops once no token is active. The
        chunk stays open in the cache until ``cache.commit``.
        """
        criteria = exits if isinstance(exits, ExitCriteria) else ExitCriteria(gate=exits)
        leaving = Exits(criteria, active, logits)
        attend = ChunkAttention(self.config, cache, active, self.config.first_cache("core"))
        latent = hidden.new_zeros(len(self.layers), *hidden.shape[:-1], self.config.latent_size)
        for loop in range(num_loops):
            first_loop = torch.full((hidden.shape[0],), loop == 0, device=hidden.device)
            step = self.loop_step(hidden, latent, first_loop, active, attend, injected)
            yield step, active
            hidden, latent = step.hidden, step.latent
            if not criteria.adaptive or loop == num_loops - 1:
                continue
            active = active & ~leaving.leaves(hidden, step.exit_probability)
            if not active.any():
                return

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MeltCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        chunk_size: int | None = None,
        exit_threshold: float | None = None,
        exits: ExitCriteria | None = None,
        start_seed: int | Tensor = 0,
        start_state: str | None = None,
        output_hidden_states: bool | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> LoopedOutput:
        """Run new tokens up to what the head reads. The arguments are those of ``MeltForCausalLM.forward``; ``head`` is
        needed by criteria that read logits."""
        embeddings = self.embedded(input_ids, inputs_embeds)
        batch, tokens, _ = embeddings.shape
        num_loops = self.config.total_ut_steps if num_loops is None else num_loops
        chunk_size = self.config.chunk_size if chunk_size is None else chunk_size
        threshold = self.config.early_exit_threshold if exit_threshold is None else exit_threshold
        if not tokens:
            raise ValueError("there is no token to run")
        if num_loops < 1 or chunk_size < 1:
            raise ValueError(f"num_loops is {num_loops} and chunk_size {chunk_size}; both must be 1 or more")
        start_with = Start.checked(self.config, start_seed, start_state)
        criteria = ExitCriteria() if exits is None else exits
        criteria = replace(criteria, gate=min(criteria.gate, threshold))
        check_exit(self.config, criteria.gate)
        cache = MeltCache(self.config.first_cache("core", 1)) if past_key_values is None else past_key_values
        if not isinstance(cache, MeltCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; MELT needs a MeltCache")

        start, counts = _token_span(attention_mask, batch, tokens, embeddings.device)
        column = torch.arange(tokens, device=embeddings.device)
        hidden = embeddings
        if start is not None:  # shift every sequence left, so that its chunks begin at its first token
            hidden = _take(hidden, (start[:, None] + column).clamp(max=tokens - 1))
        valid = column < counts[:, None]
        width = int(counts.max())
        chunks = [
            self.run_chunk(hidden[:, at:end], valid[:, at:end], cache, num_loops, criteria, start_with, head)
            for at in range(0, width, chunk_size)
            for end in (min(at + chunk_size, width),)
        ]
        cache.columns += tokens

        # A chunk whose tokens all left early ran fewer loops; they keep the state of their last one.
        loops = [chunk.loop_hidden.shape[0] for chunk in chunks]
        deepest = max(loops)
        states = [
            torch.cat((chunk.loop_hidden, chunk.loop_hidden[-1:].expand(deepest - ran, -1, -1, -1)))
            for chunk, ran in zip(chunks, loops, strict=True)
        ]
        read = torch.cat([chunk.hidden for chunk in chunks], dim=1)
        depth = torch.cat([chunk.depth for chunk in chunks], dim=1)
        every: Tensor = torch.cat(states, dim=2)
        found = [chunk.exit_probability for chunk in chunks if chunk.exit_probability is not None]
        probabilities = torch.cat(found, dim=2) if found and min(loops) == deepest else None
        if start is not None:  # shift back to the caller's columns
            back = (column - start[:, None]).clamp(0, width - 1)
            read, depth = _take(read, back), depth.gather(1, back)
            every = torch.stack([_take(x, back) for x in every])
            if probabilities is not None:
                probabilities = torch.stack([x.gather(1, back) for x in probabilities])
        return LoopedOutput(
            last_hidden_state=read,  # type: ignore[arg-type]
            past_key_values=cache if self.caches(use_cache) else None,
            hidden_states=every_state(embeddings, every, read) if self.shows(output_hidden_states) else None,  # type: ignore[arg-type]
            depth=depth,
            loop_hidden=every if min(loops) == deepest else None,
            exit_probability=probabilities,
        )

    def run_chunk(
        self,
        embeddings: Tensor,
        valid: Tensor,
        cache: MeltCache,
        num_loops: int,
        exits: ExitCriteria | float,
        start: Start = DEFAULT_START,
        head: Callable[[Tensor], Tensor] | None = None,
    ) -> ChunkOutput:
        """Run prelude, all loops and coda of a chunk and commit it to the cache.

        embeddings: (batch, chunk, d); valid: (batch, chunk) bool. ``exits``: see ``loops``. ``head``: gives the logits
        of what the coda returns, where a criterion reads them.
        """
        attend = ChunkAttention(self.config, cache, valid, self.config.first_cache("prelude"))
        injected = self.prelude(embeddings, attend)
        hidden = self.start(injected, attend.positions, *start)
        depth = torch.zeros_like(valid, dtype=torch.long)
        hiddens: list[Tensor] = []
        probabilities: list[Tensor] = []
        attend.first = self.config.first_cache("coda")

        def logits(hidden: Tensor) -> Tensor:
            assert head is not None
            return head(self.coda(hidden, attend))

        for step, active in self.loops(hidden, valid, cache, num_loops, exits, injected, head and logits):
            depth = depth + active
            hiddens.append(step.hidden)
            if step.exit_probability is not None:
                probabilities.append(step.exit_probability)
        read = self.coda(hiddens[-1], attend)
        cache.commit(valid)
        return ChunkOutput(read, depth, torch.stack(hiddens), torch.stack(probabilities) if probabilities else None)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Gather x (batch, n, d) at index (batch, m) -> (batch, m, d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _token_span(
    attention_mask: Tensor | None, batch: int, tokens: int, device: torch.device
) -> tuple[Tensor | None, Tensor]:
    """Return the first column (None: 0 for all) and the number of each sequence's new tokens, both (batch,).

    Raises ValueError for a mask of another shape, with gaps inside a sequence, or without any token.
    """
    full = torch.full((batch,), tokens, device=device)
    if attention_mask is None:
        return None, full
    if attention_mask.dim() != 2 or len(attention_mask) != batch or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}; it must cover at least the new tokens, "
            f"{(batch, tokens)}"
        )
    mask = attention_mask[:, -tokens:].bool()
    if bool(mask.all()):
        return None, full
    counts = mask.sum(1)
    start = mask.int().argmax(1)
    column = torch.arange(tokens, device=device)
    solid = (column >= start[:, None]) & (column < (start + counts)[:, None])
    if not torch.equal(solid, mask):
        raise ValueError("attention_mask has holes inside a sequence; only padding on the left or right is supported")
    if int(counts.max()) == 0:
        raise ValueError("attention_mask leaves no token in the batch")
    return start, counts


@dataclass
class MeltOutput(CausalLMOutputWithPast):
    """Output of the forward.

    - ``logits``: (batch, tokens, vocab).
    - ``depth``: (batch, tokens), the number of loops of each token.
    - ``loop_hidden``: (loops, batch, tokens, d) and ``exit_probability``: (loops, batch, tokens); None unless every
      chunk ran the same number of loops. A model without an exit gate has no ``exit_probability``.
    - ``hidden_states``, if asked for: see ``LoopedOutput``.
    """

    depth: Tensor | None = None
    loop_hidden: Tensor | None = None
    exit_probability: Tensor | None = None


class MeltForCausalLM(LoopedForCausalLM):
    """MELT with a language-modelling head. ``generate()`` uses the shared cache and takes padded batches."""

    config: MeltConfig
    config_class = MeltConfig
    core_class = MeltModel

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LatentGate):
            nn.init.constant_(module.bias, GATE_BIAS_INIT)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MeltCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        chunk_size: int | None = None,
        exit_threshold: float | None = None,
        exits: ExitCriteria | None = None,
        start_seed: int | Tensor = 0,
        start_state: str | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MeltOutput:
        """Run new tokens (batch, tokens), in chunks, after those in the cache.

        ``num_loops`` may differ from the trained number; ``chunk_size`` and ``exit_threshold`` default to the config.
        ``exits`` are further criteria by which tokens leave the loops, beside ``exit_threshold``.
        ``attention_mask`` (batch, tokens, or all columns so far) marks padding on the left or on the right; a padded
        sequence gives the same result as the sequence alone. For a model that starts from noise, ``start_seed`` is its
        seed, for all sequences or (batch,), and ``start_state="zeros"`` replaces it. Raises ValueError for arguments
        that cannot be used.
        """
        read = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            num_loops=num_loops,
            chunk_size=chunk_size,
            exit_threshold=exit_threshold,
            exits=exits,
            start_seed=start_seed,
            start_state=start_state,
            output_hidden_states=output_hidden_states,
            head=self.lm_head,
        )
        return MeltOutput(
            **self.said(read, labels, logits_to_keep, kwargs),
            depth=read.depth,
            loop_hidden=read.loop_hidden,
            exit_probability=read.exit_probability,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> bool:
        """Give generate() a MeltCache."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = MeltCache(self.config.first_cache("core", 1))
        return True


AutoConfig.register("melt", MeltConfig, exist_ok=True)
AutoModelForCausalLM.register(MeltConfig, MeltForCausalLM, exist_ok=True)

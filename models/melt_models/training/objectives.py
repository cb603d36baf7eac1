"""Training objectives: LoopLM's own loss, and both phases of distillation from a LoopLM into a MELT.

The forward of an objective returns the loss of a (micro-)batch as sums over tokens divided by the size of the whole
optimiser step, so that gradients of micro-batches can be added and those of processes averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import Start
from ..layers import widen
from ..looplm import LoopLMForCausalLM
from ..melt import MeltForCausalLM
from .chunked import ChunkedForward, ChunkStates, TeacherForward
from .data import IGNORE
from .errors import ConfigError

INTERPOLATIONS = ("none", "linear", "cosine")
DISTILLED_LOOPS = ("all", "last")
TEACHER_LOOPS = ("same", "last")


def at_least(options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
            raise ValueError(f"{name} is {value!r}; it must be a number from {least:g}")


def shares(options: object, *names: str) -> None:
    at_least(options, 0.0, *names)
    for name in names:
        if getattr(options, name) > 1:
            raise ValueError(f"{name} is {getattr(options, name)!r}; it is a share and must be at most 1")


class StepSize(NamedTuple):
    """Size of a whole optimiser step, divided by the number of processes."""

    labelled: float  # targets other than IGNORE
    sequences: float


class Losses(NamedTuple):
    """``total`` is the loss to differentiate; ``parts`` are detached figures for the record, normalised like it."""

    total: Tensor
    parts: dict[str, Tensor]


class Objective(nn.Module):
    """A loss around ``model``, the trained module. A frozen teacher is not a submodule, so its weights are no
    parameters."""

    model: Any

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Return the spans (start, end) of a sequence, each with its own forward and backward, in order. Gradients add
        up."""
        return [(0, tokens)]

    def forward(
        self, input_ids: Tensor, targets: Tensor, size: StepSize, step: int, steps: int, span: tuple[int, int]
    ) -> Losses:
        """Compute the loss of one span. input_ids, targets: (batch, n), whole sequences; ``step`` counts from 0."""
        raise ValueError("an Objective needs a forward")


@dataclass(frozen=True)
class TeacherOptions:
    """``entropy_weight``: weight beta of the entropy bonus, which keeps the exit distribution from settling on one
    loop."""

    entropy_weight: float = 0.1

    def __post_init__(self) -> None:
        at_least(self, 0.0, "entropy_weight")


class TeacherObjective(Objective):
    """LoopLM pretraining: the expected loss over the exit distribution, with an entropy bonus (arXiv 2510.25741).

    ``mean over labelled tokens of sum_t p_t CE_t - beta H(p)``. Logged: the cross-entropy of each loop, H(p) and the
    expected depth.
    """

    def __init__(self, model: LoopLMForCausalLM, options: TeacherOptions):
        super().__init__()
        if not model.config.exit_gate or model.config.norm_after_coda:
            raise ConfigError("pretraining needs an exit gate, and a head that reads each loop's hidden state itself")
        self.model, self.options = model, options

    def forward(
        self, input_ids: Tensor, targets: Tensor, size: StepSize, step: int, steps: int, span: tuple[int, int]
    ) -> Losses:
        loops = self.model.config.total_ut_steps
        output = self.model(input_ids, num_loops=loops, exit_threshold=1.0, logits_to_keep=1, use_cache=False)
        labelled = targets != IGNORE
        logits = widen(self.model.lm_head(output.loop_hidden[:, labelled]))
        losses = token_losses(logits, targets[labelled])
        p = output.exit_distribution[:, labelled]
        expected = (p * losses).sum()
        entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()
        total = (expected - self.options.entropy_weight * entropy) / size.labelled
        depth = (p * torch.arange(1, loops + 1, device=p.device)[:, None]).sum()
        parts = {f"loss_{loop + 1}": loss for loop, loss in enumerate(losses.sum(-1))}
        parts |= {"exit_entropy": entropy, "depth": depth}
        return Losses(total, {name: value.detach() / size.labelled for name, value in parts.items()})


@dataclass(frozen=True)
class DistillOptions:
    """Options of both distillation phases. The defaults are a plain distillation.

    - ``interpolation``: how alpha rises from 0 to 1 over the first ``interpolation_share`` of the steps: "linear",
      "cosine", or "none" for alpha = 1 throughout.
    - ``attention_weight``: beta, the weight of the attention-alignment term.
    - ``distill``: the logits of ``"all"`` loops, or of the ``"last"`` only.
    - ``teacher_loop``: each loop learns from the teacher's ``"same"`` loop, or from its ``"last"``, so that every depth
      becomes as good as it can.
    - ``chunk_wise``: if False, a whole sequence is one chunk.
    - ``chunk_sizes``: each chunk's size is drawn from these; if empty, it is the model's own. Small sizes resemble
      decoding, which has chunks of one token.
    - ``decoding_share``: share of the tokens that stand in a chunk of their own, as in decoding, whatever the sizes.
    - ``random_depth``: share of the steps in which each chunk leaves after a random number of loops, as tokens do under
      an exit threshold; only at alpha = 1.
    - ``exit_weight``: weight of the exit gate's loss. The gate learns, without changing the states, whether a loop's
      best token equals that of the teacher's last loop; on unlabelled tokens, whose keys and values others read, it
      learns to stay.
    - ``truncate``: number of chunks after which gradients are cut and the backward pass runs, which bounds memory; 0:
      never.
    - ``checkpointing``: compute each loop again in the backward pass instead of keeping its intermediates.
    """

    interpolation: str = "none"
    interpolation_share: float = 1.0
    attention_weight: float = 0.0
    distill: str = "all"
    teacher_loop: str = "same"
    chunk_wise: bool = True
    chunk_sizes: Sequence[int] = ()
    decoding_share: float = 0.0
    random_depth: float = 0.0
    exit_weight: float = 0.0
    truncate: int = 0
    checkpointing: bool = False

    def __post_init__(self) -> None:
        choices = {"interpolation": INTERPOLATIONS, "distill": DISTILLED_LOOPS, "teacher_loop": TEACHER_LOOPS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}")
        at_least(self, 0.0, "attention_weight", "exit_weight", "truncate")
        shares(self, "random_depth", "interpolation_share", "decoding_share")
        if self.random_depth and self.interpolation != "none":
            raise ValueError("random_depth needs interpolation: none; LoopLM's rows are needed for every loop")
        if any(size < 1 for size in self.chunk_sizes):
            raise ValueError(f"chunk_sizes are {list(self.chunk_sizes)}; each must be 1 or more")


PHASE1 = DistillOptions(interpolation="linear")
PHASE2 = DistillOptions(attention_weight=0.1)


class DistillObjective(Objective):
    """Distillation of a frozen LoopLM into a MELT (arXiv 2605.07721), chunk by chunk.

    ``L = mean over labelled tokens and loops of KL(teacher's loop t || student's loop t) + beta mean over tokens,
    layers and loops of ||o_melt - o_looplm||^2``, where o is an attention's output before its projection, and the
    squared norm sums over its heads * head_dim elements. Attention reads keys and values interpolated by alpha. Logged:
    the divergence in all loops and in the last, the alignment term, the exit gate's loss, alpha.
    """

    def __init__(self, student: MeltForCausalLM, teacher: LoopLMForCausalLM, options: DistillOptions, seed: int):
        super().__init__()
        if options.exit_weight and not student.config.exit_gate:
            raise ConfigError(f"exit_weight is {options.exit_weight}, but the model has no exit gate")
        self.model, self.options, self.seed = student, options, seed
        self._teacher = (teacher.eval().requires_grad_(False),)  # a tuple keeps it from becoming a submodule
        self._carry: tuple[ChunkedForward, TeacherForward] | None = None

    @property
    def teacher(self) -> LoopLMForCausalLM:
        return self._teacher[0]

    def alpha(self, step: int, steps: int) -> float:
        """Return MELT's share of keys and values in a step: 0 in the first, 1 from the end of the interpolation on."""
        if self.options.interpolation == "none":
            return 1.0
        last = self.options.interpolation_share * (steps - 1)
        done = min(1.0, step / last) if last > 0 else 1.0
        return done if self.options.interpolation == "linear" else float(0.5 - 0.5 * np.cos(np.pi * done))

    def spans(self, tokens: int) -> list[tuple[int, int]]:
        """Return one span, or with ``truncate`` spans of that many chunks.

        A span has room for chunks of the largest size.
        """
        sizes = self.options.chunk_sizes or (self.model.config.chunk_size,)
        piece = self.options.truncate * max(sizes) if self.options.chunk_wise else 0
        return [(at, min(at + piece, tokens)) for at in range(0, tokens, piece)] if piece else [(0, tokens)]

    def forward(
        self, input_ids: Tensor, targets: Tensor, size: StepSize, step: int, steps: int, span: tuple[int, int]
    ) -> Losses:
        loops = self.model.config.total_ut_steps
        start, end = span
        chunks = self._chunks(step, start, end)
        alpha = self.alpha(step, steps)
        if start == 0 or self._carry is None:
            model, teacher = self.model.model, self._on(input_ids.device)
            begin = draw_start(self.seed, step, len(input_ids))
            student = ChunkedForward(model, loops, alpha=alpha, checkpointing=self.options.checkpointing, start=begin)
            self._carry = student, TeacherForward(teacher, loops, begin)
        student, reference = self._carry
        student.cut()
        whole = reference.run(input_ids[:, start:end])
        # Chunks of one depth are compared together: on a GPU few large operations take less time than many small ones.
        by_depth: dict[int, list[tuple[ChunkStates, ChunkStates, Tensor]]] = {}
        for at, until, depth in chunks:
            states = student.run(self.model.model.embed_tokens(input_ids[:, at:until]), depth)
            mine = by_depth.setdefault(depth, [])
            mine.append((states, whole.part(at - start, until - start), targets[:, at:until]))
        parts: dict[str, Tensor] = {}
        for depth in sorted(by_depth):
            students, teachers, goals = zip(*by_depth[depth], strict=True)
            joined = (ChunkStates.join(students), ChunkStates.join(teachers), torch.cat(goals, dim=1))
            for name, value in self._compare(*joined, input_ids.shape[1]).items():
                parts[name] = parts.get(name, 0) + value
        if end == input_ids.shape[1]:
            self._carry = None
        shares = {"attention": size.sequences, "alpha": size.labelled}
        parts = {name: value / shares.get(name, size.labelled) for name, value in parts.items()}
        parts["alpha"] = (targets[:, start:end] != IGNORE).sum() * alpha / size.labelled
        options = self.options
        total = parts["kl"] + options.attention_weight * parts["attention"] + options.exit_weight * parts["exit"]
        return Losses(total, {name: value.detach() for name, value in parts.items()})

    def _compare(self, student: ChunkStates, teacher: ChunkStates, targets: Tensor, tokens: int) -> dict[str, Tensor]:
        """Return the loss terms of chunks of one depth, summed over their labelled tokens.

        The term ``attention`` is instead summed over all tokens and divided by the sequence's number of ``tokens``.
        """
        depth = len(student.hidden)
        labelled = targets != IGNORE
        truth = widen(self._on(targets.device).lm_head(teacher.read[:, labelled]))
        mine = widen(self.model.lm_head(student.read[:, labelled]))
        first = 0 if self.options.distill == "all" else depth - 1
        # Later tokens read the keys and values of a chunk's last loop, which therefore learns from the teacher's last.
        goal = torch.cat((truth[: depth - 1], truth[-1:]))
        if self.options.teacher_loop == "last":
            goal = truth[-1:].expand(depth, -1, -1)
        divergence = F.kl_div(mine.log_softmax(-1), goal.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        parts = {"kl": divergence[first:].mean(0).sum(), "kl_last": divergence[-1].sum().detach()}
        parts["attention"], parts["exit"] = mine.new_zeros(()), mine.new_zeros(())
        if self.options.attention_weight:
            error = widen(student.attention - teacher.attention[:depth]).pow(2).sum(-1)
            parts["attention"] = error.mean((0, 1)).sum() / tokens
        if self.options.exit_weight:
            right = (mine.argmax(-1) == truth[-1].argmax(-1)).to(mine.dtype)
            leave = student.hidden.new_zeros(student.hidden.shape[:-1], dtype=mine.dtype)
            leave[:, labelled] = right
            gate: Any = self.model.model.early_exit_gate
            opinion = widen(gate(student.hidden.detach()).squeeze(-1))
            loss = F.binary_cross_entropy_with_logits(opinion, leave, reduction="none").mean(0)
            parts["exit"] = loss.sum()
        return parts

    def _chunks(self, step: int, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return (start, end, loops) of every chunk of a span. Random choices are equal in all processes."""
        sizes = (self.options.chunk_sizes or [self.model.config.chunk_size]) if self.options.chunk_wise else ()
        loops = self.model.config.total_ut_steps
        share = self.options.decoding_share if sizes else 0.0
        return draw_chunks(self.seed, step, start, end, sizes, loops, self.options.random_depth, share)

    def _on(self, device: torch.device) -> LoopLMForCausalLM:
        """Return the teacher, moved to the batch's device."""
        teacher = self.teacher
        if teacher.lm_head.weight.device != device:
            teacher.to(device)  # type: ignore[arg-type]
        return teacher


def draw_start(seed: int, step: int, batch: int) -> Start:
    """Return the noise that all models of a step start from, other in every sequence."""
    seeds = np.random.default_rng([seed, step]).integers(2**63, size=batch)
    return Start(torch.from_numpy(seeds))


def draw_chunks(
    seed: int,
    step: int,
    start: int,
    end: int,
    sizes: Sequence[int],
    loops: int,
    random_depth: float,
    decoding_share: float = 0.0,
) -> list[tuple[int, int, int]]:
    """Cut a span into chunks of drawn ``sizes`` (none: one chunk). Returns (start, end, loops) of each.

    In the share ``random_depth`` of the steps each chunk's number of loops is drawn too. With ``decoding_share`` so
    many tokens, in the mean over long spans, have a chunk of their own, besides those that ``sizes`` puts there.
    """
    rng = np.random.default_rng([seed, step, start])
    drawn = np.random.default_rng([seed, step]).random() < random_depth
    mean = sum(min(size, end - start) for size in sizes) / len(sizes) if sizes else end - start
    alone = decoding_share * mean / (1 - decoding_share + decoding_share * mean)  # of the chunks
    chunks, at = [], start
    while at < end:
        decoding = bool(decoding_share) and rng.random() < alone
        size = 1 if decoding else int(rng.choice(list(sizes))) if sizes else end - start
        depth = int(rng.integers(1, loops + 1)) if drawn else loops
        chunks.append((at, min(at + size, end), depth))
        at += size
    return chunks


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each loop and token, (loops, tokens). logits: (loops, tokens, vocab); targets: (tokens,)."""
    loops = len(logits)
    flat = F.cross_entropy(logits.flatten(0, 1), targets.repeat(loops), reduction="none")
    return flat.view(loops, -1)

"""What training minimises: LoopLM's loss, and both phases of distillation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from melt_models import LoopLMForCausalLM, MeltForCausalLM
from melt_models.training.data import IGNORE
from melt_models.training.objectives import (
    PHASE1,
    PHASE2,
    DistillObjective,
    DistillOptions,
    Losses,
    Objective,
    StepSize,
    TeacherObjective,
    TeacherOptions,
)
from test_training_chunked import IDS, gradients, looplm, melt
from torch import Tensor

TARGETS = torch.where(torch.arange(7) < 2, IGNORE, IDS.roll(-1, 1))
LABELLED = TARGETS != IGNORE
SIZE = StepSize(float(LABELLED.sum()), 2.0)
STEPS = 11


def call(objective: Objective, step: int = STEPS - 1, **more: object) -> Losses:
    arguments = {"size": SIZE, "step": step, "steps": STEPS, "span": (0, 7), **more}
    return objective(IDS, TARGETS, **arguments)


def pair(**fields: object) -> tuple[MeltForCausalLM, LoopLMForCausalLM]:
    """A student, and a teacher with other weights."""
    student = melt(**fields)
    teacher = looplm(student)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=weight.dtype) * 0.3)
    return student, teacher


def distil(options: DistillOptions, **fields: object) -> DistillObjective:
    return DistillObjective(*pair(**fields), options, seed=0)


def gate_gradient(objective: DistillObjective, loss: Tensor) -> float:
    found = gradients(objective.model, loss)
    return max((float(g.abs().max()) for name, g in found.items() if "latent_gate" in name), default=0.0)


def test_the_teachers_loss_is_the_expected_loss_minus_the_entropy_bonus() -> None:
    model = looplm(melt())
    losses = call(TeacherObjective(model, TeacherOptions(entropy_weight=0.3)))
    with torch.no_grad():
        output = model(IDS)
    total, entropies = 0.0, [0.0] * 3
    for row, column in LABELLED.nonzero().tolist():
        p = [float(output.exit_distribution[t, row, column]) for t in range(3)]
        for t in range(3):
            logits = model.lm_head(output.loop_hidden[t, row, column])
            entropy = float(F.cross_entropy(logits, TARGETS[row, column]))
            entropies[t] += entropy / 10
            total += (p[t] * entropy + 0.3 * p[t] * float(torch.tensor(p[t]).log())) / 10
    assert float(losses.total) == pytest.approx(total, rel=1e-6)
    assert [float(losses.parts[f"loss_{t + 1}"]) for t in range(3)] == pytest.approx(entropies, rel=1e-6)
    assert float(output.exit_distribution[:, 0, 0].detach().sum()) == pytest.approx(1.0)


def test_the_teachers_loss_trains_its_exit_gate() -> None:
    objective = TeacherObjective(looplm(melt()), TeacherOptions())
    assert gradients(objective.model, call(objective).total)["model.early_exit_gate.weight"].abs().max() > 1e-6


def divergence(student: MeltForCausalLM, teacher: LoopLMForCausalLM, loop: int, goal: int | None = None) -> float:
    """Mean over the labelled tokens of KL(teacher || student), written out."""
    goal = loop if goal is None else goal
    p = teacher.lm_head(teacher(IDS).loop_hidden[goal])[LABELLED].softmax(-1)
    q = student.lm_head(student(IDS).loop_hidden[loop])[LABELLED].softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def test_distillation_compares_every_loop_with_the_teachers_same_loop() -> None:
    objective = distil(DistillOptions())
    parts = call(objective).parts
    expected = [divergence(*pair(), loop) for loop in range(3)]
    assert float(parts["kl"]) == pytest.approx(sum(expected) / 3, rel=1e-6)
    assert float(parts["kl_last"]) == pytest.approx(expected[-1], rel=1e-6)


def test_distillation_can_leave_all_but_the_last_loop_out() -> None:
    assert float(call(distil(DistillOptions(distill="last"))).total) == pytest.approx(divergence(*pair(), 2), rel=1e-6)


def test_every_loop_can_learn_from_the_teachers_last() -> None:
    expected = [divergence(*pair(), loop, goal=2) for loop in range(3)]
    losses = call(distil(DistillOptions(teacher_loop="last")))
    assert float(losses.total) == pytest.approx(sum(expected) / 3, rel=1e-6)


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    student = melt()
    objective = DistillObjective(student, looplm(student), PHASE1, seed=0)
    assert float(call(objective, step=0).total) == pytest.approx(0.0, abs=1e-9)
    assert float(call(objective, step=5).total) > 1e-4


def test_alpha_goes_from_zero_to_one() -> None:
    def schedule(**options: object) -> list[float]:
        objective = distil(replace(PHASE1, **options))  # type: ignore[arg-type]
        return [round(objective.alpha(step, STEPS), 3) for step in range(STEPS)]

    assert schedule() == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    assert schedule(interpolation_share=0.5)[:7] == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    assert schedule(interpolation="cosine")[::5] == [0.0, 0.5, 1.0]
    assert set(schedule(interpolation="none")) == {1.0}
    assert float(call(distil(PHASE1), step=3).parts["alpha"]) == pytest.approx(0.3)


def test_the_gate_learns_once_alpha_leaves_zero() -> None:
    objective = distil(PHASE1)
    assert gate_gradient(objective, call(objective, step=0).total) == 0
    assert gate_gradient(objective, call(objective, step=5).total) > 1e-6


def test_attention_alignment_alone_reaches_the_gate() -> None:
    objective = distil(PHASE2)
    with_alignment, without = call(objective).total, call(distil(DistillOptions())).total
    assert float(with_alignment) > float(without)
    assert gate_gradient(objective, call(objective).total - call(objective).parts["kl"]) > 1e-6
    difference = gradients(objective.model, with_alignment)["model.layers.0.latent_gate.bias"]
    plain = distil(DistillOptions())
    assert not torch.allclose(difference, gradients(plain.model, call(plain).total)["model.layers.0.latent_gate.bias"])


def test_the_alignment_term_is_the_mean_squared_distance_of_attention_outputs() -> None:
    student = melt()
    teacher = looplm(student)
    with torch.no_grad():  # only the attention's values differ, and only in the last layer
        teacher.model.layers[1].self_attn.v_proj.weight.add_(0.05)
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0]))
    student(IDS)
    teacher(IDS)
    # The student ran chunk by chunk (3, 3, 1 tokens), each chunk three loops of two layers.
    chunks = [torch.stack(seen["student"][at : at + 6]) for at in (0, 6, 12)]
    mine, theirs = torch.cat(chunks, dim=2), torch.stack(seen["teacher"])
    expected = float((mine - theirs).pow(2).sum(-1).mean())
    assert float(call(DistillObjective(student, teacher, PHASE2, seed=0)).parts["attention"]) == pytest.approx(expected)


def test_the_exit_gates_loss_changes_nothing_but_the_exit_gate() -> None:
    plain, with_exit = distil(DistillOptions()), distil(DistillOptions(exit_weight=1.0))
    before, after = (gradients(o.model, call(o).total) for o in (plain, with_exit))
    assert after.keys() - before.keys() == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)


def test_the_exit_gate_learns_to_stay_where_nothing_is_predicted() -> None:
    objective = distil(DistillOptions(exit_weight=1.0))
    targets = torch.full_like(TARGETS, IGNORE)
    optimizer = torch.optim.SGD(objective.model.model.early_exit_gate.parameters(), lr=0.5)
    for _ in range(30):
        losses = objective(IDS, targets, size=StepSize(14.0, 2.0), step=0, steps=1, span=(0, 7))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert float(objective.model(IDS).exit_probability.max()) < 0.3


def test_a_sequence_without_chunks_is_one_chunk() -> None:
    assert distil(DistillOptions(chunk_wise=False))._chunks(0, 0, 7) == [(0, 7, 3)]


def test_drawn_chunks_cover_every_token_once_and_differ_from_step_to_step() -> None:
    objective = distil(DistillOptions(chunk_sizes=(1, 2, 4)))
    plans = [objective._chunks(step, 0, 50) for step in range(20)]
    for plan in plans:
        assert [at for start, end, _ in plan for at in range(start, end)] == list(range(50))
        assert {end - start for start, end, _ in plan[:-1]} <= {1, 2, 4}
    assert len({tuple(plan) for plan in plans}) > 10
    assert plans == [distil(DistillOptions(chunk_sizes=(1, 2, 4)))._chunks(step, 0, 50) for step in range(20)]


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_share_of_tokens_that_run_as_in_decoding_is_kept(share: float) -> None:
    objective = distil(DistillOptions(chunk_sizes=(16, 64), decoding_share=share))
    plans = [objective._chunks(step, 0, 20_000) for step in range(10)]
    for plan in plans:
        assert [at for start, end, _ in plan for at in range(start, end)] == list(range(20_000))
    alone = sum(end - start == 1 for plan in plans for start, end, _ in plan) / 200_000
    assert alone == pytest.approx(share, rel=0.1)


def test_random_depth_draws_the_loops_of_every_chunk() -> None:
    objective = distil(DistillOptions(random_depth=1.0))
    assert {loops for step in range(20) for *_, loops in objective._chunks(step, 0, 7)} == {1, 2, 3}
    assert {loops for *_, loops in distil(DistillOptions())._chunks(0, 0, 7)} == {3}
    assert torch.isfinite(call(objective).total)


def test_truncated_pieces_add_up_to_the_whole_loss_with_fewer_gradients() -> None:
    whole, cut = distil(PHASE2), distil(replace(PHASE2, truncate=1))
    assert cut.spans(7) == [(0, 3), (3, 6), (6, 7)]
    pieces = [call(cut, span=span).total for span in cut.spans(7)]
    expected = call(whole).total
    assert float(sum(pieces)) == pytest.approx(float(expected))
    got, want = gradients(cut.model, sum(pieces)), gradients(whole.model, expected)  # type: ignore[arg-type]
    assert not torch.allclose(got["model.layers.0.latent_gate.bias"], want["model.layers.0.latent_gate.bias"])


def test_micro_batches_add_up_to_the_whole_loss() -> None:
    objective = distil(PHASE2)
    parts = [objective(IDS[i : i + 1], TARGETS[i : i + 1], SIZE, 10, STEPS, (0, 7)) for i in range(2)]
    whole = call(objective)
    assert float(parts[0].total + parts[1].total) == pytest.approx(float(whole.total))
    for name, value in whole.parts.items():
        assert float(parts[0].parts[name] + parts[1].parts[name]) == pytest.approx(float(value), abs=1e-12)


def test_the_teacher_is_frozen_and_not_part_of_what_is_trained() -> None:
    objective = distil(PHASE2)
    call(objective).total.backward()
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"model"}
    assert all(weight.grad is None for weight in objective._teacher[0].parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "quadratic"}, "interpolation is 'quadratic'"),
        ({"distill": "first"}, "distill is 'first'"),
        ({"teacher_loop": "next"}, "teacher_loop is 'next'"),
        ({"attention_weight": -1.0}, "attention_weight is -1"),
        ({"attention_weight": float("nan")}, "attention_weight is nan"),
        ({"random_depth": 1.5}, "at most 1"),
        ({"decoding_share": 1.5}, "decoding_share is 1.5; it is a share and must be at most 1"),
        ({"random_depth": 0.5, "interpolation": "linear"}, "random_depth needs"),
        ({"chunk_sizes": [4, 0]}, "each must be 1 or more"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillOptions(**options)  # type: ignore[arg-type]

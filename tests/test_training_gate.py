"""The stage ``gate``: the exit gate alone learns, on a finished model, whether a further loop lowers the loss."""

from __future__ import annotations

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from melt_models import LoopLMForCausalLM
from melt_models.checkpoint import load_model
from melt_models.training.config import read_run
from melt_models.training.errors import ConfigError
from melt_models.training.gate import GateObjective, GateOptions
from melt_models.training.stages import run
from test_training_chunked import IDS, looplm, melt
from test_training_objectives import LABELLED, SIZE, TARGETS, call
from test_training_run import PHASE, interrupted, lines, losses, prepare, write
from torch import Tensor
from torch.nn.functional import kl_div

GATE = {**PHASE, "learning_rate": 0.02}
NAMES = {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}


def expected(logits: Tensor, lambdas: Tensor, *, best: bool = False, divergence: bool = False) -> float:
    """The gate's loss, written out token by token. logits: (loops, 2, 7, vocab); lambdas: (loops, 2, 7)."""
    total, loops = 0.0, len(logits)
    for row in range(2):
        for column in range(7):
            if LABELLED[row, column]:
                goal = int(TARGETS[row, column])
                said = logits[:, row, column].log_softmax(-1)
                loss = [float(-said[t, goal]) for t in range(loops)]
                if divergence:
                    loss = [float(kl_div(said[t], said[-1], log_target=True, reduction="sum")) for t in range(loops)]
                gains = [loss[t] - (min(loss[t + 1 :]) if best else loss[t + 1]) for t in range(loops - 1)]
                stays = [float(torch.sigmoid(torch.tensor(50.0 * (gain - 0.005)))) for gain in gains]
            else:
                stays = [1.0] * (loops - 1)
            leaves = [float(lambdas[t, row, column]) for t in range(loops - 1)]
            total -= sum(s * log(1 - x) + (1 - s) * log(x) for s, x in zip(stays, leaves, strict=True)) / (loops - 1)
    return total / SIZE.labelled


@pytest.mark.parametrize("divergence", [False, True])
@pytest.mark.parametrize("best", [False, True])
def test_the_target_is_whether_a_later_loop_is_better(best: bool, divergence: bool) -> None:
    model = melt(chunk_size=1)
    with torch.no_grad():
        output = model(IDS, exit_threshold=1.0)
        logits = model.lm_head(output.loop_hidden)
    options = GateOptions(compared="best" if best else "next", measured="divergence" if divergence else "loss")
    found = call(GateObjective(model, options, seed=0)).total.item()
    wanted = expected(logits, output.exit_probability, best=best, divergence=divergence)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_a_looplms_gate_learns_the_same_way() -> None:
    model = looplm(melt())
    with torch.no_grad():
        output = model(IDS, exit_at_step=0)
        lambdas = model.model.exit_probability(output.loop_hidden)
        logits = model.lm_head(output.loop_hidden)
    found = call(GateObjective(model, GateOptions(), seed=0)).total.item()
    assert found == pytest.approx(expected(logits, lambdas), rel=1e-4)


def test_only_the_gate_has_a_gradient() -> None:
    objective = GateObjective(melt(), GateOptions(), seed=0)
    call(objective).total.backward()
    with_gradient = {name for name, weight in objective.model.named_parameters() if weight.grad is not None}
    assert with_gradient == NAMES


def test_chunks_that_all_leave_after_one_loop_leave_nothing_to_learn() -> None:
    objective = GateObjective(melt(), GateOptions(random_depth=1.0), seed=0)
    for step in range(20):
        losses = call(objective, step)
        losses.total.backward()
        assert torch.isfinite(losses.total)


def test_a_trained_gate_stays_where_the_next_loop_helps_and_leaves_elsewhere() -> None:
    torch.manual_seed(0)
    objective = GateObjective(melt(), GateOptions(), seed=0)
    optimizer = torch.optim.Adam([w for w in objective.model.parameters() if w.requires_grad], lr=0.05)
    first = call(objective)
    for _ in range(60):
        optimizer.zero_grad()
        call(objective).total.backward()
        optimizer.step()
    last = call(objective)
    assert float(last.total) < float(first.total)


def test_all_trains_the_gate_after_phase_2_and_changes_nothing_else(tmp_path: Path) -> None:
    run(prepare(tmp_path, gate=GATE), ["teacher", "phase1", "phase2", "gate"])
    before, after = (load_model(tmp_path / "out" / stage).state_dict() for stage in ("phase2", "gate"))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == NAMES
    assert lines(tmp_path / "out", "gate")[-1]["step"] == PHASE["steps"]


def test_a_looplm_of_the_run_gets_its_gate_trained(tmp_path: Path) -> None:
    run(prepare(tmp_path, phase1=None, phase2=None, gate=GATE), ["teacher", "gate"])
    assert isinstance(load_model(tmp_path / "out" / "gate"), LoopLMForCausalLM)


def test_a_finished_checkpoint_needs_no_other_section(tmp_path: Path, tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint)
    data = {"task": "addition", "digits": 2}
    assert model.config.vocab_size >= 14
    gone: dict[str, Any] = dict.fromkeys(("model", "melt", "teacher", "phase1", "phase2"))
    file = write(tmp_path, **gone, data=data, gate={**GATE, "checkpoint": str(tiny_checkpoint)})
    run(read_run(file), ["gate"])
    after = load_model(tmp_path / "out" / "gate")
    assert "early_exit_gate" not in after.config.untrained


def test_an_interrupted_gate_resumes_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (prepare(tmp_path / name, gate=GATE) for name in ("whole", "broken"))
    run(whole, ["teacher", "phase1", "phase2", "gate"])
    run(broken, ["teacher", "phase1", "phase2"])
    interrupted(broken, monkeypatch, at=3, stage="gate")
    run(broken, ["gate"], resume=True)
    assert losses(tmp_path / "broken" / "out", "gate") == losses(tmp_path / "whole" / "out", "gate")
    one, other = (load_model(tmp_path / name / "out" / "gate").state_dict() for name in ("whole", "broken"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_gate_without_a_stage_before_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate starts from .*phase2, which is not there; run the stage phase2 first"):
        run(prepare(tmp_path, gate=GATE), ["gate"])


def test_the_data_of_the_other_stages_is_what_it_was(tmp_path: Path) -> None:
    from melt_models.training.stages import _batches

    config = prepare(tmp_path, seed=2, gate=GATE)
    for index, stage in enumerate(("teacher", "phase1", "phase2")):
        assert _batches(config, stage, 2).seed == 2 * 3 + index  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"compared": "first"}, "compared is 'first'"),
        ({"least_gain": -1.0}, "least_gain is -1.0"),
        ({"random_depth": 1.5}, "random_depth is 1.5"),
        ({"measured": "accuracy"}, "measured is 'accuracy'; it must be one of loss, divergence"),
        ({"chunk_sizes": (0,)}, "chunk_sizes are"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        GateOptions(**options)


def test_a_model_without_a_gate_or_with_one_loop_is_refused() -> None:
    with pytest.raises(ConfigError, match="no exit gate"):
        GateObjective(melt(exit_gate=False), GateOptions(), seed=0)
    with pytest.raises(ConfigError, match="one loop"):
        GateObjective(melt(total_ut_steps=1), GateOptions(), seed=0)

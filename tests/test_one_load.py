"""One export, verification included, opens its checkpoint once and spoils no model that its steps share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCheckpoint
from melt_models import checkpoint as checkpoints
from melt_models.checkpoint import Weights
from typer.testing import CliRunner

from melt_export.checkpoint import Checkpoint
from melt_export.cli import export_app
from melt_export.quantization.calibration import hessians
from melt_export.quantization.kv_cache import calibrated
from melt_export.quantization.options import Grid
from melt_export.quantization.sensitivity import sensitivities
from melt_export.reference.pytorch import reference_of

TOKENS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a checkpoint is opened, a model gets its weights, and each tensor is scanned."""
    found: Counter[str] = Counter()

    def counting(owner: Any, name: str, key: Any) -> None:
        original = getattr(owner, name)

        def count(*arguments: Any, **options: Any) -> Any:
            found[key(*arguments)] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, count)

    counting(Weights, "__init__", lambda *_: "opened")
    counting(checkpoints, "read_config", lambda *_: "config")
    counting(Weights, "_check_finite", lambda weights, stored, value: stored.name)
    counting(torch.nn.Module, "load_state_dict", lambda *_: "models")
    return found


def export(checkpoint: Path, output: Path, *options: str) -> None:
    arguments = ["--checkpoint", str(checkpoint), "--output", str(output), "--verify-tokens", "2", "--max-batch", "1"]
    result = CliRunner().invoke(export_app, [*arguments, *options])
    assert result.exit_code == 0, (result.output, result.exception)


@pytest.mark.parametrize(
    ("options", "models"),
    [
        ((), 1),  # the reference
        # For calibration, as the package stores the weights, and as they are, on held-out text.
        (("--weights", "int4", "--block", "16", "--cache", "int8"), 3),
        (("--weights", "int4", "--block", "16", "--cache", "int8", "--no-verify"), 1),
    ],
    ids=["plain", "quantized", "unverified"],
)
def test_an_export_opens_its_checkpoint_once_and_scans_each_tensor_once(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, counted: Counter[str], options: tuple[str, ...], models: int
) -> None:
    export(make_checkpoint(), tmp_path / "package", *options)
    assert counted.pop("opened") == counted.pop("config") == 1
    assert counted.pop("models") == models
    assert len(counted) == len(Weights(make_checkpoint())), "every tensor is scanned"
    assert set(counted.values()) == {1}


def test_answers_are_counted_on_the_model_of_the_held_out_text(
    tiny_checkpoint: Path, tmp_path: Path, counted: Counter[str]
) -> None:
    answers = tmp_path / "answers"
    answers.write_text('{"prompt": "abc", "answer": "d"}\n')
    export(
        tiny_checkpoint, tmp_path / "package", "--weights", "int8", "--method", "rtn", "--eval-answers", str(answers)
    )
    assert (counted["opened"], counted["models"]) == (1, 2)


def test_no_step_of_the_calibration_changes_the_model_that_the_next_one_runs(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = Checkpoint(make_checkpoint())

    def steps(models: list[Any]) -> list[Any]:
        first, second, third = models
        cost = sensitivities(first, TOKENS, 2, 8, Grid(4, 32))
        seen = hessians(second, TOKENS, 2, 8)
        scales = calibrated(reference_of(third), TOKENS, 2, 8, 32, 8)
        return [torch.tensor(list(cost.values())), *seen.values(), scales.keys, scales.values]

    shared = checkpoint.load()
    before = reference_of(shared).logits(TOKENS[0], 2, 8)
    together, alone = steps([shared] * 3), steps([checkpoint.load() for _ in range(3)])
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one, other)
    assert (reference_of(shared).logits(TOKENS[0], 2, 8) == before).all()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in shared.modules())

"""The measurement of early exit: the line of fixed depths, what lies above it, and the page that says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCheckpoint
from melt_models.checkpoint import load_model
from melt_models.exits import ExitCriteria

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks" / "experiments"))
pytest.importorskip("matplotlib")

import exit_docs  # noqa: E402
from exit_lines import clear, cost_of, gains, quality_at, upper_line  # noqa: E402
from exits import curves, head_share, of_addition, of_text  # noqa: E402

FIXED = [(1.0, 0.0), (2.0, 0.8), (3.0, 0.9), (4.0, 0.9)]


def seed(entropy: list[tuple[float, float]], fixed: list[tuple[float, float]] = FIXED) -> dict[str, Any]:
    """The curves of a seed, made up: of fixed depths and of one criterion."""
    points = [{"cost": cost, "loops": cost, "quality": quality, "setting": round(cost)} for cost, quality in fixed]
    early = [{"cost": cost, "loops": cost, "quality": quality, "setting": 0.1} for cost, quality in entropy]
    found = {"fixed": points, "fixed, prompt too": points, "criteria": {"entropy": early, "gate": early}}
    return {"loops": 4, "head_share": 0.1, **found}


def test_the_line_goes_through_mixtures_and_leaves_out_what_costs_more_for_less() -> None:
    assert upper_line([*FIXED, (2.5, 0.3)]) == [(1.0, 0.0), (2.0, 0.8), (3.0, 0.9)]
    assert upper_line([(1.0, 0.0), (2.0, 0.1), (3.0, 0.9)]) == [(1.0, 0.0), (3.0, 0.9)]


def test_a_mixture_lies_between_its_depths() -> None:
    line = upper_line(FIXED)
    assert quality_at(line, 1.5) == pytest.approx(0.4)
    assert cost_of(line, 0.85) == pytest.approx(2.5)
    assert quality_at(line, 0.5) is None
    assert cost_of(line, 0.95) is None
    assert quality_at(line, 9.0) == 0.9


def test_what_saves_loops_on_every_seed_by_more_than_the_spread_is_above() -> None:
    good = [seed([(1.2, 0.8), (1.5 + shift, 0.9)]) for shift in (0.0, 0.1, 0.2)]
    assert [gain.above for gain in gains(good, "entropy")] == [True, True, True]
    assert gains(good, "entropy")[1].loops == pytest.approx([1.5, 1.4, 1.3])
    worse = [seed([(2.2, 0.8), (3.5, 0.9)]) for _ in range(3)]
    assert not any(gain.above for gain in gains(worse, "entropy"))
    one_seed_is_worse = [*good[:2], worse[0]]
    assert not any(gain.above for gain in gains(one_seed_is_worse, "entropy"))


def test_where_two_loops_are_the_best_depth_mixtures_of_one_and_two_are_compared() -> None:
    flat = [(1.0, 0.0), (2.0, 0.8), (3.0, 0.8), (4.0, 0.7)]
    good = [seed([(1.0, 0.0), (1.5, 0.6 + shift), (2.0, 0.8)], flat) for shift in (0.0, 0.01)]
    found = gains(good, "entropy")
    assert [gain.depth for gain in found] == [1.25, 1.5, 1.75, 2, 3, 4]
    assert [gain.above for gain in found] == [True, True, True, False, False, True]  # 4 loops are worse than 1.9
    assert found[1].quality == pytest.approx([0.2, 0.21])
    assert found[1].loops[0] == pytest.approx(0.5 - 0.4 / 1.2)


def test_a_quality_that_is_not_reached_saves_nothing() -> None:
    found = gains([seed([(1.2, 0.7)]) for _ in range(3)], "entropy")
    assert found[1].loops == [None] * 3
    assert not found[1].above


def test_one_seed_is_never_clear() -> None:
    assert not clear([1.0], 0.0)
    assert not clear([0.1, 2.0], 0.0)
    assert clear([1.0, 1.1], 0.0)
    assert not clear([0.0005, 0.0006], 0.001)


def test_an_untrained_model_is_measured_with_every_criterion(make_checkpoint: MakeCheckpoint) -> None:
    model: Any = load_model(make_checkpoint(vocab_size=14, total_ut_steps=2), dtype=torch.float32)
    found = curves(model, of_addition(model, 4))
    assert [point["loops"] for point in found["fixed"]] == [1.0, 2.0]
    for name, points in found["criteria"].items():
        assert all(1.0 <= point["loops"] <= 2.0 for point in points)
        heads = name not in ("gate", "change")
        assert all((point["cost"] > point["loops"]) == heads for point in points)
    assert found["head_share"] == pytest.approx(head_share(model), abs=1e-4)


def test_text_is_measured_by_the_loss_of_tokens_that_run_one_by_one(make_checkpoint: MakeCheckpoint) -> None:
    model: Any = load_model(make_checkpoint(max_position_embeddings=256), dtype=torch.float32)
    ids = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    found = of_text(model, ids, 16)(model.config.total_ut_steps, ExitCriteria(), False)
    with torch.no_grad():
        cache = model(ids[:, :16], exit_threshold=1.0).past_key_values
        logits = model(ids[:, 16:-1], past_key_values=cache, chunk_size=1, exit_threshold=1.0).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 17:].flatten())
    assert found["quality"] == pytest.approx(-float(loss), rel=1e-4)


def test_the_page_says_what_the_recorded_figures_say() -> None:
    content = json.loads((ROOT / "docs" / "exits.json").read_text(encoding="utf-8"))
    assert exit_docs.markdown(content) == (ROOT / "docs" / "adaptive-depth.md").read_text(encoding="utf-8")


def test_on_addition_the_entropy_of_the_head_is_above_fixed_depths_at_three_depths() -> None:
    content = json.loads((ROOT / "docs" / "exits.json").read_text(encoding="utf-8"))
    seeds = content["tasks"]["addition"]["even"]["seeds"]
    assert len(seeds) >= 3
    assert [gain.above for gain in gains(seeds, "entropy")] == [True, True, True]


def test_on_text_the_trained_exit_gate_is_above_the_line_at_three_depths() -> None:
    content = json.loads((ROOT / "docs" / "exits.json").read_text(encoding="utf-8"))
    seeds = content["tasks"]["text"]["text-gate"]["seeds"]
    assert len(seeds) >= 2
    assert sum(gain.above for gain in gains(seeds, "gate")) >= 3


def test_what_lies_nowhere_above_the_line_is_said_plainly() -> None:
    worse = {"seeds": [seed([(2.2, 0.8), (3.5, 0.9)]) for _ in range(3)], "sample": "made up"}
    text = exit_docs.markdown(
        {"tasks": {"addition": {"even-gate": worse}}, "date": "", "versions": {}, "machine": MACHINE}
    )
    assert "**Not above it anywhere**: exit gate" in text


MACHINE = {"cpu": "a processor", "cores": 2, "memory_bytes": 10**9, "system": "Linux"}

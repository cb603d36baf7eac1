"""GPTQ's arithmetic and what it is calibrated with, beside the plainest way to compute them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from torch import Tensor, nn

from melt_export.checkpoint import Checkpoint
from melt_export.quantization import gptq as module
from melt_export.quantization.blocks import Blocks, best_scales, in_blocks
from melt_export.quantization.calibration import hessians
from melt_export.quantization.gptq import InverseHessian, gptq, inverse_factor, solve
from melt_export.quantization.options import Grid
from melt_export.reference.pytorch import reference_of


def hessian_of(inputs: int, seed: int = 0) -> Tensor:
    """The sum of x x^T over random inputs x, some of which are always large: (inputs, inputs) float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.linspace(0.05, 2, inputs)
    x = (torch.randn(3 * inputs, inputs, generator=generator) @ mix).double()
    return x.t() @ x


def plain_numbers(columns: Tensor, factor: Tensor, steps: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """One column after the other, each error spread at once over all that follow. All (inputs, outputs)."""
    columns, found = columns.clone(), torch.empty_like(columns)
    for at in range(len(columns)):
        found[at] = (columns[at] / steps[at] + zeros[at]).round().clamp(0, grid.top)
        error = (columns[at] - (found[at] - zeros[at]) * steps[at]) / factor[at, at]
        columns[at:] -= factor[at, at:, None] * error
    return found


@given(
    st.integers(1, 9),
    st.integers(1, 150),
    st.sampled_from([Grid(4, 32), Grid(4, 16, asymmetric=True), Grid(4, 32, positive=True), Grid(8, 32)]),
    st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_errors_spread_by_halves_give_the_numbers_of_one_column_after_the_other(
    outputs: int, inputs: int, grid: Grid, seed: int
) -> None:
    """In float64, where sums in another order do not change what a number is rounded to."""
    rows = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).double()
    blocks = in_blocks(rows, grid.block)
    scales, zeros = (part.squeeze(-1).t() for part in best_scales(blocks, grid, torch.ones(blocks.shape[1:])))
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))
    factor = inverse_factor(hessian_of(inputs, seed) + torch.eye(inputs))
    columns, block_of = rows.t()[order], order // grid.block
    expected = plain_numbers(columns, factor, scales[block_of], zeros[block_of], grid)
    solve(columns, factor, scales, zeros, block_of.tolist(), grid)
    assert torch.equal(columns, expected)


def test_the_factor_is_of_the_inverse_and_triangular() -> None:
    hessian = hessian_of(70) + torch.eye(70)
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ hessian, torch.eye(70).double(), rtol=0, atol=1e-8)


def test_an_input_that_was_always_zero_says_nothing() -> None:
    assert InverseHessian.of(torch.zeros(40, 40)) is None


def test_each_output_is_quantized_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that weights with one input may be stacked, and large ones taken in parts."""
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(1))
    inverse, grid = InverseHessian.of(hessian_of(70).float()), Grid(4, 32, asymmetric=True)
    assert inverse is not None
    whole = gptq(weight, inverse, grid)
    apart = Blocks.stacked([gptq(part, inverse, grid) for part in weight.split([25, 15])])
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 7)
    in_parts = gptq(weight, inverse, grid)
    for other in (apart, in_parts):
        assert torch.equal(whole.values(), other.values())
        assert torch.equal(whole.packed(), other.packed())


@pytest.mark.parametrize("kind", ["melt", "looplm"])
def test_hessians_are_the_sums_over_every_sequence_and_loop(tmp_path: Path, kind: str) -> None:
    """Beside sequences that run one by one, summed in float64; they have several lengths and are no whole batch."""
    torch.manual_seed(3)
    if kind == "melt":
        MeltForCausalLM(MeltConfig(**TINY)).save_pretrained(tmp_path)
    else:
        fields = {name: value for name, value in TINY.items() if name in LoopLMConfig().to_dict()}
        LoopLMForCausalLM(LoopLMConfig(**fields)).save_pretrained(tmp_path)
    lengths = [12, 12, 12, 12, 12, 12, 5, 12]
    sequences = [[(7 * at + token) % 50 for token in range(length)] for at, length in enumerate(lengths)]

    expected: dict[str, Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].flatten(0, -2).double()
            expected[name] = expected.get(name, 0) + rows.t() @ rows

        return hook

    checkpoint = Checkpoint(tmp_path)
    model = checkpoint.load()
    reference = reference_of(model)
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear):
            linear.register_forward_pre_hook(add(f"{name}.weight"))
    for ids in sequences:
        reference.logits(ids, 2, 8)

    told: list[tuple[str, int, int]] = []
    found = hessians(checkpoint.load(), sequences, 2, 8, lambda *step: told.append(step))
    assert set(found) == set(expected)
    for name, hessian in found.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(hessian.double(), expected[name], rtol=0, atol=1e-5 * scale)
    assert {(name, total) for name, total, _ in told} == {("calibrating", len(sequences))}
    assert sum(done for _, _, done in told) == len(sequences)
    assert len(told) > 1

"""Matmuls over weights that stay in their stored type: widened block by block, with the result of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import MakeFamily
from melt_runtime import Runtime

from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.reference import float32_matmul
from melt_export.reference.float32_matmul import FLOAT64, ORDERS, Arithmetic, Float32Matmul, widened_blocks


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows."""
    monkeypatch.setattr(float32_matmul, "_BLOCK_BYTES", 1000)


@pytest.mark.parametrize("arithmetic", [FLOAT64, *ORDERS])
@pytest.mark.usefixtures("small_blocks")
def test_blocks_give_the_product_of_the_whole_weight(arithmetic: Arithmetic) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 48), torch.randn(37, 48).bfloat16(), torch.randn(37).bfloat16()
    with Float32Matmul(arithmetic):
        found = F.linear(x, weight, bias)
    assert found.dtype == arithmetic.dtype
    torch.testing.assert_close(
        found.double(), F.linear(x.double(), weight.double(), bias.double()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.usefixtures("small_blocks")
def test_blocks_give_the_gradient_of_the_whole_weight() -> None:
    torch.manual_seed(0)
    x, weight, given = torch.randn(5, 48, requires_grad=True), torch.randn(37, 48).bfloat16(), torch.randn(5, 37)
    with Float32Matmul():
        F.linear(x, weight).backward(given)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, given @ weight.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (1000, 8), (3, 5000)])
@pytest.mark.usefixtures("small_blocks")
def test_no_block_is_larger_than_it_may_be(shape: tuple[int, int]) -> None:
    weight = torch.arange(shape[0] * shape[1]).reshape(shape).bfloat16()
    seen, places = [], set[int]()
    for rows, block in widened_blocks(weight, torch.float32):
        assert len(block) == 1 or block.nbytes <= 1000
        assert torch.equal(block, weight[rows].float())
        seen += range(rows.start, rows.stop)
        places.add(block.data_ptr())
    assert seen == list(range(shape[0]))
    assert len(places) == 1  # one block's memory, again and again


@pytest.mark.parametrize(("loops", "chunk", "positions"), [(3, 8, 96), (32, 4, 48)])
def test_the_loss_of_a_large_model_is_measured_on_fewer_tokens_the_more_loops_it_has(
    loops: int,
    chunk: int,
    positions: int,
    make_family: MakeFamily,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("melt_export.parity.shared_caches.LARGE_BYTES", 0)
    options = ExportOptions(chunk=8, max_seq_len=128, share_caches="last")
    with building(make_family("huginn", mean_recurrence=loops), tmp_path / "package", options):
        pass
    loss = Runtime.load(tmp_path / "package").manifest.shared_caches
    assert (loss["chunk"], loss["positions"]) == (chunk, positions)

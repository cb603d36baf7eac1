"""`auto` decodes the way that is faster here, and its trials of the other cost little."""

from __future__ import annotations

import pytest
from melt_runtime.decoding.pipeline_choice import PipelineChoice


def decoded(choice: PipelineChoice, tokens: int, plain: float, pipelined: float) -> tuple[float, int]:
    """Decode tokens that take these seconds each way. Returns all seconds, and the tokens decoded pipelined."""
    seconds, count = 0.0, 0
    for _ in range(tokens):
        way = choice.pipelined(1)
        taken = pipelined if way else plain
        choice.ran(1, way, taken, 1)
        seconds, count = seconds + taken, count + way
    return seconds, count


@pytest.mark.parametrize("slower", [1.02, 1.2, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("better", [False, True])
def test_trials_of_the_slower_way_cost_about_one_percent(slower: float, better: bool) -> None:
    choice = PipelineChoice()
    plain, pipelined = (slower, 1.0) if better else (1.0, slower)
    decoded(choice, 32, plain, pipelined)  # a trial of both
    tokens = 20_000
    seconds, count = decoded(choice, tokens, plain, pipelined)
    assert seconds <= 1.012 * tokens
    assert (count > tokens / 2) is better


def test_the_choice_changes_with_what_is_faster() -> None:
    choice = PipelineChoice()
    decoded(choice, 1000, 1.0, 1.1)
    assert not choice.pipelined(1)
    decoded(choice, 1000, 1.0, 0.5)
    assert choice.pipelined(1)
    decoded(choice, 20_000, 1.0, 3.0)
    assert not choice.pipelined(1)


def test_each_number_of_sequences_has_its_own_choice() -> None:
    choice = PipelineChoice()
    decoded(choice, 100, 1.0, 0.5)
    assert choice.pipelined(1)
    assert not choice.pipelined(2)

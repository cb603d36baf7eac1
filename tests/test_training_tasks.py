"""The synthetic tasks: right answers, one shape, training and testing disjoint, the same examples for the same seed."""

from __future__ import annotations

import re

import numpy as np
import pytest
from melt_models.training.tasks import END, PAD, TASKS, Addition, Modular, PHop, Task, make_task

SMALL: list[Task] = [Addition(digits=4), Modular(modulus=5, operations=4), PHop(hops=3, length=16, alphabet=4)]
each_task = pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)


def solve(task: Task, prompt: str) -> str:
    """The answer by another road than the task's own: from the prompt's text, one example at a time."""
    if isinstance(task, Addition):
        a, b = prompt.removesuffix("=").split("+")
        return str(int(a) + int(b)).rjust(task.digits, "0")
    if isinstance(task, Modular):
        value = prompt[0]
        for operator, number in re.findall(r"([-+*])(\d)", prompt):
            value = str(eval(f"({value}){operator}{number}"))
        return str(int(value) % task.modulus)
    assert isinstance(task, PHop)
    symbols, hops = re.fullmatch(r"([a-z]+)(\d+)", prompt).groups()  # type: ignore[union-attr]
    at = len(symbols) - 1
    for _ in range(int(hops)):
        at = symbols.rindex(symbols[at], 0, at) + 1
    return symbols[at]


def draw(task: Task, count: int = 300, held_out: bool = False, progress: float = 1.0, seed: int = 0) -> list:
    return task.sample(np.random.default_rng(seed), count, held_out, progress)


@each_task
@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
def test_answers_agree_with_an_independent_solution(task: Task, progress: float) -> None:
    for example in draw(task, progress=progress):
        assert example.answer == solve(task, example.prompt)


@each_task
@pytest.mark.parametrize("hard", [False, True])
def test_test_answers_agree_with_an_independent_solution(task: Task, hard: bool) -> None:
    for example in task.test_set(100, hard=hard):
        assert example.answer == solve(task, example.prompt)


@each_task
def test_every_example_has_the_promised_shape_and_characters(task: Task) -> None:
    assert task.vocabulary[:2] == (PAD, END)
    for example in draw(task, progress=0.1) + task.test_set(50):
        assert len(example.prompt) == task.prompt_tokens
        assert len(example.answer) + 1 == task.answer_tokens
        assert set(example.prompt + example.answer) <= set(task.vocabulary)


@each_task
def test_training_never_sees_a_test_prompt(task: Task) -> None:
    trained = {x.prompt for seed in range(5) for p in (0.0, 1.0) for x in draw(task, 2000, progress=p, seed=seed)}
    tested = {x.prompt for hard in (False, True) for x in task.test_set(100, seed=1, hard=hard)}
    assert not trained & tested


@each_task
def test_about_a_tenth_of_all_prompts_is_held_out(task: Task) -> None:
    drawn = task._training(np.random.default_rng(0), 8000, 1.0)  # type: ignore[attr-defined]
    assert np.mean([x.held_out for x in drawn]) == pytest.approx(0.1, abs=0.02)


def test_the_split_does_not_change_between_versions() -> None:
    examples = [Addition(digits=2).example(a, b) for a in range(10) for b in range(10)]
    assert [x.prompt for x in examples if x.held_out] == ["00+00=", "00+02=", "05+09=", "06+02=", "07+00=", "08+00="]


@each_task
def test_a_test_set_has_different_examples_and_is_the_same_for_the_same_seed(task: Task) -> None:
    first, again, other = task.test_set(100, seed=3), task.test_set(100, seed=3), task.test_set(100, seed=4)
    assert len(set(first)) == 100
    assert first == again
    assert first != other


@each_task
def test_samples_are_a_function_of_the_generator(task: Task) -> None:
    assert draw(task, seed=5) == draw(task, seed=5)
    assert draw(task, seed=5) != draw(task, seed=6)


def test_addition_starts_without_carries_and_ends_with_more_than_chance() -> None:
    def carries(progress: float) -> float:
        pairs = [x.prompt.removesuffix("=").split("+") for x in draw(Addition(), 1000, progress=progress)]
        return float(np.mean([int(x) + int(y) >= 10 for a, b in pairs for x, y in zip(a, b, strict=True)]))

    assert carries(0.0) == 0.0
    assert 0.05 < carries(0.2) < carries(0.4)
    assert carries(0.4) == pytest.approx(carries(1.0), abs=0.02)


def test_the_hard_additions_carry_far() -> None:
    def nines(hard: bool) -> float:
        pairs = [x.prompt.removesuffix("=").split("+") for x in Addition().test_set(1000, hard=hard)]
        return float(np.mean([int(x) + int(y) == 9 for a, b in pairs for x, y in zip(a, b, strict=True)]))

    assert nines(False) < 0.15
    assert nines(True) > 0.35


def test_modular_starts_with_operations_that_do_nothing_and_ends_without_them() -> None:
    def identities(progress: float) -> float:
        found = [re.findall(r"[-+]0|\*1", x.prompt) for x in draw(Modular(), progress=progress)]
        return float(np.mean([len(x) / 8 for x in found]))

    assert identities(0.0) == 1.0
    assert identities(0.2) == pytest.approx(0.5, abs=0.05)
    assert identities(0.4) == 0.0
    assert not any(re.search(r"[-+*]0|\*1", x.prompt) for x in draw(Modular()))


def test_modular_answers_are_all_equally_likely() -> None:
    answers = [x.answer for x in draw(Modular(modulus=5, operations=6), 5000)]
    assert [answers.count(str(n)) / 5000 for n in range(5)] == pytest.approx([0.2] * 5, abs=0.03)


def test_the_hard_chains_alternate_multiplication_with_the_rest() -> None:
    for example in Modular().test_set(50, hard=True):
        assert re.fullmatch(r"\d([-+]\d\*\d)+=|\d(\*\d[-+]\d)+=", example.prompt)


def test_p_hop_begins_with_fewer_hops_and_ends_with_all() -> None:
    def hops(progress: float) -> set[str]:
        return {x.prompt[-1] for x in draw(PHop(), progress=progress)}

    assert hops(0.0) == {"1", "2", "3", "4"}
    assert hops(0.4) == {"4"}


def test_a_hop_never_stays_where_it_is() -> None:
    assert not any(re.search(r"(.)\1", x.prompt) for x in draw(PHop()))


def test_the_hard_p_hops_cannot_be_answered_halfway() -> None:
    task = PHop()
    for example in task.test_set(50, hard=True):
        assert example.answer not in (example.prompt[-2], solve(task, example.prompt[:-1] + "2"))


def test_the_longest_numbers_still_add_exactly() -> None:
    task = Addition(digits=18)
    assert all(x.answer == solve(task, x.prompt) for x in draw(task, 50))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("division", {}, "there is no task 'division'; there are addition, modular, p-hop"),
        ("addition", {"digit": 7}, "task addition has no option digit; it has digits"),
        ("addition", {"digits": 0}, "digits is 0"),
        ("addition", {"digits": 19}, "digits is 19"),
        ("addition", {"digits": True}, "digits is True"),
        ("addition", {"digits": 7.0}, "digits is 7.0"),
        ("modular", {"modulus": 10}, "modulus is 10"),
        ("modular", {"modulus": 2}, "modulus is 2"),
        ("modular", {"operations": 0}, "operations is 0"),
        ("p-hop", {"hops": 0}, "hops is 0"),
        ("p-hop", {"alphabet": 2}, "alphabet is 2"),
        ("p-hop", {"hops": 9, "length": 32}, "need a length of 36 or more, not 32"),
        ("p-hop", {"length": "32"}, "length is '32'"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_sentence(name: str, options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        make_task(name, **options)
    assert "\n" not in str(caught.value)


def test_a_task_too_small_for_its_test_set_says_so() -> None:
    with pytest.raises(ValueError, match=r"Addition\(digits=1\) has 7 such examples and not 50"):
        Addition(digits=1).test_set(50)


def test_a_task_without_any_held_out_example_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Addition(digits=1)
    monkeypatch.setattr(Addition, "_training", lambda *_: [task.example(0, 0)])
    held_out = task.example(0, 0).held_out
    assert draw(task, 2, held_out=held_out) == [task.example(0, 0)] * 2
    with pytest.raises(ValueError, match="has 0 such examples and not 2"):
        draw(task, 2, held_out=not held_out)


@pytest.mark.parametrize("name", list(TASKS))
def test_defaults_make_tasks_of_a_large_space(name: str) -> None:
    task = make_task(name)
    assert len({x.prompt for x in draw(task, 3000)}) == 3000
    assert len(set(task.test_set(500))) == 500

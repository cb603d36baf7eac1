"""Evaluation during and after training: on held-out data alone, at every depth, and without any effect on the run."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from melt_models.checkpoint import load_model
from melt_models.configuration import LoopLMConfig, MeltConfig
from melt_models.training import trainer
from melt_models.training.chunk_advice import chunk_warnings
from melt_models.training.cli import app
from melt_models.training.config import RunConfig, read_run
from melt_models.training.data import IGNORE, TaskBatches, character_tokenizer
from melt_models.training.errors import ConfigError, TrainingDivergedError
from melt_models.training.evaluate import exact_match, perplexity
from melt_models.training.files import is_held_out
from melt_models.training.gate import GateOptions
from melt_models.training.held_out import DepthScore, Evaluation, HeldOut
from melt_models.training.objectives import DistillOptions, TeacherOptions
from melt_models.training.stages import run
from melt_models.training.tasks import END, PAD, Addition
from run_files import write_run
from typer.testing import CliRunner

TEACHER = {"steps": 6, "batch_size": 8, "learning_rate": 0.003, "warmup_steps": 2, "save_every": 3}
PHASE = {"steps": 4, "batch_size": 8, "learning_rate": 0.001, "warmup_steps": 2, "save_every": 2, "eval_every": 2}
SMALL: dict[str, Any] = {"eval_sequences": 10, "eval_problems": 20}
RUN: dict[str, Any] = {
    "seed": 1,
    "threads": 1,
    "data": {"task": "addition", "digits": 2},
    "model": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "total_ut_steps": 3,
        "embedding_std": 1.0,
    },
    "melt": {"chunk_size": 4},
    "teacher": {**TEACHER, **SMALL},
    "phase1": {**PHASE, **SMALL},
}
CHARACTERS = (PAD, END, *"abcdefghijklmnopqrstuvwxyz0123456789 \n")


def write(directory: Path, **sections: Any) -> Path:
    """The YAML file of a small run whose output is beside it; a section of None is left out."""
    return write_run(directory, RUN, **sections)


def prepare(directory: Path, **sections: Any) -> RunConfig:
    return read_run(write(directory, **sections))


def only_teacher(directory: Path, **fields: Any) -> RunConfig:
    return prepare(directory, phase1=None, teacher={**TEACHER, **SMALL, **fields})


def lines(output: Path, stage: str = "teacher") -> list[dict[str, Any]]:
    """The metrics of a stage without their times."""
    text = (output / "metrics" / f"{stage}.jsonl").read_text()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in text.splitlines()]


def without_quality(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith("eval_")} for line in found]


def melt_train(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of a teacher and phase 1. Do not change it."""
    directory = tmp_path_factory.mktemp("whole")
    config = prepare(directory)
    run(config, config.stages())
    return directory


@pytest.fixture
def text_data(tmp_path: Path) -> dict[str, Any]:
    """A data section: 60 lines of text, about a third of them held out."""
    character_tokenizer(CHARACTERS, 64).save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("".join(f"document {n} {'abc' * (n % 5)}\n" for n in range(60)))
    files = {"text": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "tokenizer")}
    return {**files, "sequence_length": 12, "held_out_percent": 30}


# What is drawn


def test_only_problems_that_training_never_draws_are_held_out() -> None:
    held_out = HeldOut.draw({"task": "addition", "digits": 3}, 30, 50)
    task = Addition(digits=3)
    assert held_out.task == task
    assert len(held_out.problems) == 50
    assert all(problem.held_out for problem in held_out.problems)
    for row in held_out.input_ids.tolist():
        a, b = "".join(task.vocabulary[token] for token in row[: task.prompt_tokens - 1]).split("+")
        assert task.example(int(a), int(b)).held_out


def test_held_out_sequences_are_of_held_out_documents_and_none_comes_twice(text_data: dict[str, Any]) -> None:
    held_out = HeldOut.draw(text_data, 1000, 1)
    tokens = sum(len(line) + 1 for line in held_out_lines(text_data))
    assert len(held_out.input_ids) in (tokens // 12 - 1, tokens // 12)
    text = "".join(CHARACTERS[token] for token in held_out.input_ids.flatten().tolist())
    seen = text.split(END)[:-1]
    assert set(seen) <= set(held_out_lines(text_data))
    assert len(set(seen)) == len(seen) > 5
    assert held_out.problems == ()


def held_out_lines(data: dict[str, Any]) -> list[str]:
    lines = Path(data["text"]).read_text().splitlines()
    return [line for line in lines if is_held_out(line, data["held_out_percent"])]


def test_a_task_with_few_held_out_problems_gives_those() -> None:
    held_out = HeldOut.draw({"task": "addition", "digits": 1}, 5, 200)
    assert 1 <= len(held_out.problems) < 200
    assert len(set(held_out.problems)) == len(held_out.problems)


def test_all_runs_on_the_same_data_are_evaluated_on_the_same_sequences(text_data: dict[str, Any]) -> None:
    for data in (text_data, {"task": "modular"}):
        one, other = HeldOut.draw(data, 5, 5), HeldOut.draw(data, 5, 5)
        assert torch.equal(one.input_ids, other.input_ids)
        assert one.problems == other.problems


# What is measured


@pytest.mark.parametrize("stage", ["teacher", "phase1"])
def test_figures_are_perplexity_and_exact_match_of_the_checkpoint_at_every_depth(whole: Path, stage: str) -> None:
    model, task = load_model(whole / "out" / stage), Addition(digits=2)
    found = HeldOut.draw(RUN["data"], 10, 20).evaluate(model, range(1, 5), batch=4)
    assert (found.sequences, found.targets, found.problems) == (10, 30, 20)
    assert [depth.loops for depth in found.depths] == [1, 2, 3, 4]
    for depth in found.depths:
        expected = exact_match(model, task.test_set(20), task.vocabulary, num_loops=depth.loops)
        assert depth.exact == expected.accuracy
        held_out = _InOrder(TaskBatches(task, 0, held_out=True))
        assert depth.perplexity == pytest.approx(perplexity(model, held_out, 10, num_loops=depth.loops, batch=1))
    assert len({depth.loss for depth in found.depths}) == 4


class _InOrder(TaskBatches):
    """A stream that gives one example at a time, as HeldOut draws them."""

    def __init__(self, batches: TaskBatches):
        super().__init__(batches.task, batches.seed, batches.held_out)


def test_a_model_that_writes_the_right_answers_is_exact_and_others_are_not() -> None:
    held_out = HeldOut.draw({"task": "addition", "digits": 2}, 5, 20)
    model, right = load_oracle(held_out), len(held_out.problems) // 2
    assert held_out.evaluate(model, [1, 2]).depths[0].exact == right / 20


def load_oracle(held_out: HeldOut) -> Any:
    """A LoopLM whose forward answers the first half of the problems right and the others with PAD."""
    from melt_models import LoopLMForCausalLM
    from melt_models.looplm import LoopLMOutput

    config = LoopLMConfig(vocab_size=14, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    task, problems = held_out.task, held_out.problems
    assert task is not None
    ids = {token: index for index, token in enumerate(task.vocabulary)}
    answers = {
        tuple(ids[c] for c in x.prompt): [*(ids[c] for c in x.answer), ids[END]] for x in problems[: len(problems) // 2]
    }

    class Oracle(LoopLMForCausalLM):
        def forward(self, input_ids: Any, past_key_values: Any = None, **settings: Any) -> Any:
            rows = input_ids.tolist()
            if past_key_values is None:
                past_key_values = [list(answers.get(tuple(row), [0] * 3)) for row in rows]
            logits = torch.zeros(len(rows), len(rows[0]), 14)
            for at, left in enumerate(past_key_values):
                logits[at, -1, left.pop(0) if left else 0] = 1.0
            depth = torch.full(input_ids.shape, settings["num_loops"])
            return LoopLMOutput(logits=logits, past_key_values=past_key_values, depth=depth)

    return Oracle(config)


def test_the_depth_a_record_speaks_of_is_the_last() -> None:
    found = Evaluation(1, 2, 4, (DepthScore(1, 2.0, 0.25), DepthScore(2, 1.0, 0.5)))
    assert found.figures() == {
        "eval_loss": 1.0,
        "eval_perplexity": math.e,
        "eval_exact": 0.5,
        "eval_loss_1": 2.0,
        "eval_perplexity_1": math.exp(2.0),
        "eval_exact_1": 0.25,
        "eval_loss_2": 1.0,
        "eval_perplexity_2": math.e,
        "eval_exact_2": 0.5,
    }
    assert Evaluation(1, 1, 0, (DepthScore(1, 1000.0),)).figures() == {"eval_loss": 1000.0, "eval_loss_1": 1000.0}


# During training


def test_evaluating_changes_nothing_in_the_training(tmp_path: Path, whole: Path) -> None:
    often = prepare(tmp_path, phase1={**PHASE, **SMALL, "eval_every": 1}, teacher={**TEACHER, "eval_every": 1})
    run(often, often.stages())
    for stage in ("teacher", "phase1"):
        assert without_quality(lines(often.output, stage)) == without_quality(lines(whole / "out", stage))
        expected = load_model(whole / "out" / stage).state_dict()
        found = load_model(often.output / stage).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_the_model_is_evaluated_every_so_many_steps_and_after_the_last(tmp_path: Path, whole: Path) -> None:
    evaluated = [line["step"] for line in lines(whole / "out", "phase1") if "eval_loss" in line]
    assert evaluated == [2, 4]
    config = only_teacher(tmp_path, eval_every=4, log_every=5)
    run(config, ["teacher"])
    found = lines(config.output)
    assert [line["step"] for line in found] == [4, 5, 6]
    assert [line["step"] for line in found if "eval_exact_3" in line] == [4, 6]


@pytest.mark.parametrize("at", [2, 3, 4])
def test_an_interrupted_run_records_the_same_evaluations(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    expected = only_teacher(tmp_path / "straight", eval_every=2)
    run(expected, ["teacher"])
    config, original = only_teacher(tmp_path / "broken", eval_every=2), trainer._Loop.step

    def step(self: Any, number: int, *rest: Any) -> Any:
        if number == at:
            raise KeyboardInterrupt
        return original(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Loop, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(config, ["teacher"])
    run(config, ["teacher"], resume=True)
    assert lines(config.output) == lines(expected.output)


def test_how_often_and_on_how_much_it_is_evaluated_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = only_teacher(tmp_path)
    run(config, ["teacher"])
    run(only_teacher(tmp_path, eval_every=1, eval_sequences=3, eval_problems=7), ["teacher"], resume=True)


def test_a_stage_broken_off_after_its_last_step_still_tells_its_quality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from melt_models.training import stages

    config = only_teacher(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(stages._Start, "write", broken)
        with pytest.raises(KeyboardInterrupt):
            run(config, ["teacher"])
    capsys.readouterr()
    run(config, ["teacher"], resume=True)
    assert "held out: 10 sequences, 30 targets, 20 problems" in capsys.readouterr().err


def broken(*_: Any) -> None:
    raise KeyboardInterrupt


def test_weights_that_overflow_in_the_last_step_are_not_written(tmp_path: Path) -> None:
    config = only_teacher(tmp_path, steps=1, learning_rate=1e30, weight_decay=1e10, warmup_steps=0)
    with pytest.raises(TrainingDivergedError, match=r"diverged in step 1: after it model\.model\.[a-z_.0-9]* holds "):
        run(config, ["teacher"])
    assert not (config.output / "teacher").exists()
    assert list((config.output / "state").rglob("step-*")) == []


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeldOut, "_sums", lambda self, model, loops, *_: (math.nan if loops == 2 else 30.0, 0.0))
    config = only_teacher(tmp_path, eval_every=4)
    with pytest.raises(
        TrainingDivergedError, match="step 4: the held-out losses after it are 1, nan, 1; the last good"
    ):
        run(config, ["teacher"])
    assert [path.name for path in (config.output / "state" / "teacher").glob("step-*")] == ["step-000000003"]


def test_the_progress_line_tells_the_held_out_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = only_teacher(tmp_path)
    run(config, ["teacher"])
    last = lines(config.output)[-1]
    says = (
        f"held-out {last['eval_loss']:.4f} (perplexity {last['eval_perplexity']:.4g}), {last['eval_exact']:.1%} exact"
    )
    assert says in capsys.readouterr().err


def test_the_end_of_a_phase_shows_it_beside_its_teacher(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = read_run(whole / "run.yaml", output=whole / "again")
    run(config, config.stages())
    said = capsys.readouterr().err
    table = said[said.rindex("held out:") :].splitlines()
    assert table[1].split() == ["phase1"] * 3 + ["teacher"] * 3
    assert table[2].split() == ["loops", *["loss", "perplexity", "exact"] * 2]
    for loops in (1, 2, 3):
        mine, teachers = (lines(whole / "out", stage)[-1] for stage in ("phase1", "teacher"))
        assert table[2 + loops].split() == [str(loops), *cells(mine, loops), *cells(teachers, loops)]


def cells(line: dict[str, Any], loops: int) -> list[str]:
    figures = (line[f"eval_{name}_{loops}"] for name in ("loss", "perplexity", "exact"))
    return [shown.format(figure) for shown, figure in zip(("{:.4f}", "{:,.3f}", "{:.1%}"), figures, strict=True)]


def test_data_without_a_held_out_part_are_trained_on_and_that_is_said(
    tmp_path: Path, text_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    text_data["held_out_percent"] = 0
    config = prepare(tmp_path, data=text_data, phase1=None)
    run(config, config.stages())
    assert "teacher: the model is not evaluated during training: no document of " in capsys.readouterr().err
    assert not any("eval_loss" in line for line in lines(config.output))


def test_evaluations_without_held_out_data_are_refused(tmp_path: Path, text_data: dict[str, Any]) -> None:
    text_data["held_out_percent"] = 0
    config = prepare(tmp_path, data=text_data, phase1=None, teacher={**TEACHER, "eval_every": 2})
    with pytest.raises(ConfigError, match=r"section data: eval_every is set, but no document of .* is held out"):
        run(config, config.stages())


# melt-train eval


def test_eval_of_a_run_gives_the_figures_that_training_recorded(whole: Path) -> None:
    asked = ("--sequences", "10", "--problems", "20", "--json")
    outputs = [melt_train("eval", str(what), *asked) for what in (whole / "out", whole / "run.yaml")]
    assert [done.exit_code for done in outputs] == [0, 0], outputs[0].stderr
    assert outputs[0].stdout == outputs[1].stdout
    found = json.loads(outputs[0].stdout)
    assert list(found) == ["teacher", "phase1"]
    for stage in found:
        last = lines(whole / "out", stage)[-1]
        for depth in found[stage]["depths"]:
            for name in ("loss", "perplexity", "exact"):
                assert depth[name] == pytest.approx(last[f"eval_{name}_{depth['loops']}"], rel=1e-6)


def test_eval_shows_other_depths_and_chunk_sizes(whole: Path) -> None:
    asked = ("--sequences", "10", "--problems", "20", "--loops", "5", "--chunk-size", "1", "--chunk-size", "6")
    done = melt_train("eval", str(whole / "out"), *asked)
    assert done.exit_code == 0, done.stderr
    assert "chunks of 1" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.split()[0].isdigit()]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all(len(row) == 10 for row in rows)


@pytest.mark.parametrize("what", ["empty", "file", "nowhere"])
def test_eval_of_what_is_no_finished_run_is_refused_in_one_sentence(tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path)
    named = {"empty": tmp_path / "empty", "file": tmp_path / "run.yaml", "nowhere": tmp_path / "nowhere"}[what]
    done = melt_train("eval", str(named))
    says = {"empty": "holds no run.yaml", "file": "holds no finished stage", "nowhere": "cannot be read"}[what]
    assert done.exit_code == 2, done.exception
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


# Chunks


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"chunk_sizes": (1, 4)}, None),
        ({"chunk_sizes": (1, 64)}, None),
        ({"decoding_share": 0.5}, None),
        ({"chunk_sizes": (12, 16), "decoding_share": 0.5}, None),
        ({}, "melt.chunk_size 4 never draws chunks of one token, in which the model decodes; `decoding_share: 0.5`"),
        ({"chunk_sizes": (2, 8)}, "chunk_sizes [2, 8] never draws chunks of one token"),
        ({"chunk_sizes": (12, 16)}, "a sequence has 12 tokens and chunk_sizes [12, 16] puts them all into one chunk"),
        ({"chunk_wise": False}, "chunk_wise is false"),
    ],
)
def test_chunk_sizes_that_do_not_teach_decoding_are_named(options: dict[str, Any], says: str | None) -> None:
    found = chunk_warnings(DistillOptions(**options), MeltConfig(chunk_size=4), tokens=12)
    assert len(found) == (says is not None)
    assert says is None or says in found[0]
    if "chunk_wise" not in options:
        assert chunk_warnings(GateOptions(**options), MeltConfig(chunk_size=4), tokens=12) == found
    assert chunk_warnings(TeacherOptions(), LoopLMConfig(), tokens=12) == []


def test_chunk_sizes_that_rarely_decode_are_named() -> None:
    config = MeltConfig(chunk_size=128)
    (says,) = chunk_warnings(DistillOptions(chunk_sizes=(1, 32, 128, 256)), config, tokens=512)
    assert "puts 1 token in 417 into a chunk of its own" in says
    assert chunk_warnings(DistillOptions(chunk_sizes=(1,) * 8 + (32, 128, 256)), config, tokens=512) == []
    (says,) = chunk_warnings(DistillOptions(chunk_sizes=(128, 256), decoding_share=0.004), config, tokens=512)
    assert "puts 1 token in 250 into a chunk of its own" in says
    assert chunk_warnings(DistillOptions(chunk_sizes=(128, 256), decoding_share=0.1), config, tokens=512) == []


def test_a_run_that_puts_its_sequences_into_one_chunk_is_warned(
    tmp_path: Path, text_data: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = prepare(tmp_path, data=text_data, melt={"chunk_size": 12})
    run(config, config.stages())
    said = capsys.readouterr().err
    assert said.count("melt-train: phase1: a sequence has 12 tokens and melt.chunk_size 12 puts them all into one") == 1


# Trackers


WANDB = """
import json
log = open({record!r}, "a")
class Run:
    def log(self, figures, step):
        print(json.dumps([self.id, step, sorted(figures)]), file=log, flush=True)
    def finish(self):
        pass
def init(**given):
    if given["project"] == "refused":
        raise RuntimeError("no such project")
    run = Run()
    run.id = given["id"] + " " + given["name"] + " " + given["project"]
    return run
"""


def wandb(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts a stand-in for W&B where it is found; returns the file of what it is told."""
    record = directory / "told.jsonl"
    record.touch()
    (directory / "library").mkdir()
    (directory / "library" / "wandb.py").write_text(WANDB.format(record=str(record)))
    monkeypatch.syspath_prepend(directory / "library")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    for name in ("WANDB_PROJECT", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return record


def test_wandb_gets_every_step_and_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = wandb(tmp_path, monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "loops")
    config, original = only_teacher(tmp_path / "run"), trainer._Loop.step

    def step(self: Any, number: int, *rest: Any) -> Any:
        if number == 4:
            raise KeyboardInterrupt
        return original(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Loop, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(config, ["teacher"])
    run(config, ["teacher"], resume=True)
    told = [json.loads(line) for line in record.read_text().splitlines()]
    assert len({name for name, _, _ in told}) == 1
    assert told[0][0].endswith("out/teacher loops")
    assert [step for _, step, _ in told] == [1, 2, 3, 4, 4, 5, 6]
    assert {"loss", "eval_loss", "eval_exact_2"} <= set(told[-1][2])


def test_wandb_that_nobody_set_up_gets_nothing_and_one_that_fails_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = wandb(tmp_path, monkeypatch)
    run(only_teacher(tmp_path / "one"), ["teacher"])
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    run(only_teacher(tmp_path / "other"), ["teacher"])
    assert record.read_text() == ""
    assert "Weights & Biases gets no figures: no such project" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "other" / "out")] == [1, 2, 3, 4, 5, 6]


def test_targets_are_those_of_training(text_data: dict[str, Any]) -> None:
    held_out = HeldOut.draw(text_data, 3, 1)
    assert torch.equal(held_out.input_ids[:, 1:], held_out.targets[:, :-1])
    task = HeldOut.draw({"task": "addition", "digits": 2}, 3, 1)
    assert (task.targets != IGNORE).sum(1).tolist() == [3, 3, 3]

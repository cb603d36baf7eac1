"""One set of exit criteria, by one grammar: in PyTorch, in the runtime, on the command line and in the server."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from shutil import copytree
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint, MakePackage
from melt_models import MeltForCausalLM
from melt_models.checkpoint import load_model
from melt_models.exits import ExitCriteria
from melt_runtime import ArgumentError, LoopSettings, Package, Runtime
from melt_runtime.cli.main import app
from melt_runtime.decoding.exit_criteria import CRITERIA, parse_exit, spelled_exit
from melt_runtime.server.schema import CompletionBody
from melt_runtime.server.service import Service
from typer.testing import CliRunner

TOKENS = list(range(9, 25))
LOOPS = 6
WANTED = ("gate:0.7", "change:0.5", "kl:0.05", "entropy:3.65", "margin:0.02", "same:1", "entropy:3.0,same:2")


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint()


@pytest.fixture(scope="module")
def package(checkpoint: Path, make_package: MakePackage) -> Path:
    return make_package(checkpoint)


@pytest.fixture(scope="module")
def runtime(package: Path) -> Runtime:
    return Runtime.load(package)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MeltForCausalLM:
    return load_model(checkpoint, dtype=torch.float32)  # type: ignore[return-value]


def depths(runtime: Runtime, exits: str) -> list[int]:
    """The loops of tokens that run one after the other, each by itself."""
    driver = runtime.driver()
    settings = runtime.options(exit=exits, loops=LOOPS).loops
    for token in TOKENS:
        driver.append([[token]], settings)
    return driver.depth[0]


def words(runtime: Runtime) -> np.ndarray:
    """The head's probabilities after each loop of the first token, (loops, vocab)."""
    driver = runtime.driver()
    (chunk,) = driver.chunks([[TOKENS[0]]])
    logits = [
        driver.state.logits(np.zeros((1, 1), np.int64))[0, 0].copy() for _ in driver.loops(chunk, LoopSettings(LOOPS))
    ]
    wide = np.exp(np.array(logits, np.float64))
    return wide / wide.sum(-1, keepdims=True)


@pytest.mark.parametrize("exits", WANTED)
def test_pytorch_and_a_package_leave_the_loops_at_the_same_depth(
    runtime: Runtime, model: MeltForCausalLM, exits: str
) -> None:
    cache, expected = None, []
    with torch.no_grad():
        for token in TOKENS:
            output = model(
                torch.tensor([[token]]),
                past_key_values=cache,
                num_loops=LOOPS,
                exit_threshold=1.0,
                exits=ExitCriteria.parse(exits),
            )
            cache = output.past_key_values
            expected += output.depth[0].tolist()
    assert depths(runtime, exits) == expected
    assert min(expected) < LOOPS, [float(-(w * np.log(w)).sum()) for w in words(runtime)]


def test_a_token_leaves_once_the_entropy_of_its_words_is_low(runtime: Runtime) -> None:
    chances = words(runtime)
    entropy = -(chances * np.log(chances)).sum(-1)
    for least in np.sort(entropy)[:3]:
        first = int((entropy < least + 1e-4).argmax()) + 1
        assert depths(runtime, f"entropy:{least + 1e-4}")[0] == first


def test_a_token_leaves_once_its_best_word_leads_by_enough(runtime: Runtime) -> None:
    best = np.sort(words(runtime), -1)
    margin = best[:, -1] - best[:, -2]
    for most in np.sort(margin)[-3:]:
        first = int((margin >= most - 1e-5).argmax()) + 1
        assert depths(runtime, f"margin:{most - 1e-5}")[0] == first


def test_tokens_of_a_prompt_run_all_loops_where_the_head_decides(runtime: Runtime) -> None:
    driver = runtime.driver()
    driver.append([TOKENS], runtime.options(exit="entropy:100", loops=LOOPS).loops)
    driver.append([[3]], runtime.options(exit="entropy:100", loops=LOOPS).loops)
    assert driver.depth[0] == [LOOPS] * len(TOKENS) + [1]


def test_both_sides_know_the_same_names_and_grammar() -> None:
    assert {field.name for field in fields(ExitCriteria)} == set(CRITERIA)
    for text in (*WANTED, "never", " gate : 0.9 , same : 2 "):
        mine, theirs = ExitCriteria.parse(text), parse_exit(text)
        assert {one.option: getattr(mine, name) for name, one in CRITERIA.items()} == theirs
        assert parse_exit(spelled_exit(theirs)) == theirs
    assert spelled_exit(parse_exit("never")) == "never"


@pytest.mark.parametrize("text", ["", "entropy", "entropy:", "entropy:x", "depth:1", "gate:1.5", "margin:2", "kl:-1"])
def test_text_that_names_no_criterion_is_refused_by_both(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse_exit(text)
    with pytest.raises(ValueError, match=r"exit"):
        ExitCriteria.parse(text)


@pytest.mark.parametrize("text", ["entropy:nan", "kl:inf", "same:1.5", "same:-1", "kl:1,kl:2", "a" * 1000])
def test_values_that_cannot_be_are_refused_by_both(text: str) -> None:
    with pytest.raises(ArgumentError):
        parse_exit(text)
    with pytest.raises(ValueError, match=r"exit"):
        ExitCriteria.parse(text)


@pytest.mark.parametrize(
    ("text", "said"), [("same:0.5", "'0.5' is not a whole number"), ("kl:0.1,kl:0.2", "names kl twice")]
)
def test_a_refusal_says_what_is_wrong_with_the_text(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        parse_exit(text)


def test_an_exit_replaces_the_packages_threshold_and_contradictions_are_refused(runtime: Runtime) -> None:
    options = runtime.options(exit="never").loops
    assert (options.exit_threshold, options.adaptive) == (1.0, False)
    both = runtime.options(exit="entropy:0.3", exit_kl=0.1).loops
    assert (both.exit_entropy, both.exit_kl) == (0.3, 0.1)
    with pytest.raises(ArgumentError, match=r"exit is 'entropy:0.3' and exit_entropy is 0.5; give one of them"):
        runtime.options(exit="entropy:0.3", exit_entropy=0.5)


@pytest.mark.parametrize(
    ("exit", "option"),
    [
        ("gate:0.5", {"exit_threshold": 1.0}),
        ("gate:1", {"exit_threshold": 0.5}),
        ("entropy:0.3", {"exit_entropy": 0}),
        ("kl:0.1, same:2", {"exit_same": 0}),
        ("never", {"exit_threshold": 0.5}),
        ("never", {"exit_margin": 0.9}),
    ],
)
def test_an_exit_and_an_option_that_contradicts_it_are_refused_everywhere(
    runtime: Runtime, package: Path, exit: str, option: dict[str, float]
) -> None:
    ((name, value),) = option.items()
    sentence = f"exit is {exit!r} and {name} is {value!r}; give one of them"
    with pytest.raises(ArgumentError) as error:
        runtime.options(**cast(Any, {"exit": exit, **option}))
    assert str(error.value) == sentence
    flags = ["--exit", exit, f"--{name.replace('_', '-')}", str(value)]
    refused = CliRunner().invoke(app, ["generate", str(package), "5", "--ids", *flags])
    assert refused.exit_code == 2
    assert "give one of them" in refused.output
    service = Service(runtime, cast(Any, None), "model")
    call = CompletionBody.model_validate({"model": "model", "prompt": [5], "exit": exit, **option})
    with pytest.raises(ArgumentError, match="give one of them"):
        runtime.options(**service.depth(call))


def test_an_exit_and_an_option_that_agrees_or_adds_to_it_are_taken(runtime: Runtime) -> None:
    assert runtime.options(exit="never", exit_threshold=1.0) == runtime.options(exit="never")
    assert runtime.options(exit="gate:0.5", exit_threshold=0.5, exit_kl=0).loops.exit_threshold == 0.5
    assert runtime.options(exit="gate:0.5", exit_kl=0.1) == runtime.options(exit_threshold=0.5, exit_kl=0.1)


CALIBRATED = {
    "criteria": "entropy:3.65",
    "quality": "1pt",
    "text": "a text",
    "tokens": 100,
    "loss": 0.5,
    "loops": 2.5,
    "full_loops": 4,
}


def calibrated(package: Path, directory: Path, **changed: Any) -> Path:
    """A copy of a package with a calibrated exit."""
    copy = Path(copytree(package, directory / "package"))
    content = json.loads((copy / "manifest.json").read_text())
    content |= {"exit": {**CALIBRATED, **changed}} | ({"format_version": 5} if "most_loops" in changed else {})
    (copy / "manifest.json").write_text(json.dumps(content))
    return copy


def test_auto_is_what_the_package_was_calibrated_to(package: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(calibrated(package, tmp_path))
    assert runtime.options(exit="auto").loops == runtime.options(exit="entropy:3.65").loops
    assert depths(runtime, "auto") == depths(runtime, "entropy:3.65")
    assert runtime.options().loops.exit_entropy == 0.0


def test_auto_allows_as_many_loops_as_the_package_was_calibrated_with(package: Path, tmp_path: Path) -> None:
    runtime = Runtime.load(calibrated(package, tmp_path, criteria="entropy:3.0", most_loops=2))
    assert runtime.options(exit="auto").loops == runtime.options(exit="entropy:3.0", loops=2).loops
    answer = runtime.generate(TOKENS, max_tokens=8, exit="auto", ignore_eos=True)
    assert answer == runtime.generate(TOKENS, max_tokens=8, exit="entropy:3.0", loops=2, ignore_eos=True)
    assert max(answer.depth) == 2
    assert runtime.options().loops.loops == runtime.options(exit="entropy:3.0").loops.loops == 4


def test_a_request_that_says_how_deep_its_tokens_go_is_not_bounded_by_the_calibration(
    package: Path, tmp_path: Path
) -> None:
    runtime = Runtime.load(calibrated(package, tmp_path, most_loops=2))
    asked: list[dict[str, Any]] = [{"loops": 3}, {"loops": 1}, {"exit_at_step": 2}, {"min_loops": 3}, {"min_loops": 2}]
    found = [runtime.options(exit="auto", **one).loops for one in asked]
    assert [(one.min_loops, one.loops) for one in found] == [(1, 3), (1, 1), (1, 3), (3, 4), (2, 2)]
    assert all(one.exit_entropy == 3.65 for one in found)


def test_a_looplm_calibrated_to_fewer_loops_keeps_its_caches_consistent(
    make_looplm: MakeCheckpoint, make_package: MakePackage, tmp_path: Path
) -> None:
    runtime = Runtime.load(calibrated(make_package(make_looplm()), tmp_path, criteria="never", most_loops=2))
    session = runtime.session(exit="auto")
    session.append(TOKENS)
    answer = session.generate(max_tokens=8, ignore_eos=True)
    assert answer.token_ids == runtime.generate(TOKENS, max_tokens=8, loops=2, ignore_eos=True).token_ids
    assert set(session.depth) == {2}
    with pytest.raises(ArgumentError, match="cannot deepen its caches"):
        session.append([5], exit="never")
    deep = runtime.session()
    deep.append(TOKENS)
    assert deep.generate(max_tokens=8, exit="auto", ignore_eos=True).token_ids
    assert set(deep.depth) == {2, 4}


def test_a_calibrated_exit_is_told_with_the_loops_that_it_allows(package: Path, tmp_path: Path) -> None:
    copy = calibrated(package, tmp_path, most_loops=1, criteria="never")
    shown = " ".join(CliRunner().invoke(app, ["inspect", str(copy)]).output.replace("│", " ").split())
    assert "never, with 1 loop at most, keeps 1pt: 2.50 of 4 loops" in shown


@pytest.mark.parametrize(
    ("most", "says"),
    [(5, "exit.most_loops is 5, above the 4 of loops"), (0, "exit.most_loops is 0"), ("2", "exit.most_loops is '2'")],
)
def test_loops_that_a_calibrated_exit_cannot_allow_are_refused(
    package: Path, tmp_path: Path, most: Any, says: str
) -> None:
    from melt_runtime import PackageError

    with pytest.raises(PackageError, match=says):
        Runtime.load(calibrated(package, tmp_path, most_loops=most))


def test_runtimes_that_would_run_too_many_loops_refuse_the_format_version(package: Path) -> None:
    manifest = Package.open(package).manifest
    assert manifest.with_exit(CALIBRATED).format_version == manifest.format_version < 5
    assert manifest.with_exit({**CALIBRATED, "most_loops": 2}).format_version == 5


def test_auto_of_a_package_without_calibration_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ArgumentError, match="exported without a calibrated exit"):
        runtime.options(exit="auto")


def test_a_manifest_with_a_broken_exit_is_refused(package: Path, tmp_path: Path) -> None:
    from melt_runtime import PackageError

    with pytest.raises(PackageError, match=r"exit.criteria"):
        Runtime.load(calibrated(package, tmp_path, criteria="entropy:0.3;rm"))
    unknown = Runtime.load(calibrated(package, tmp_path / "other", criteria="mood:0.3"))
    with pytest.raises(ArgumentError, match=r"manifest.json: exit is 'mood:0.3'"):
        unknown.options(exit="auto")


def test_the_command_line_takes_the_same_words(package: Path, tmp_path: Path) -> None:
    copy = calibrated(package, tmp_path)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(
            app, ["generate", str(copy), "5 6 7", "--ids", "--max-tokens", "6", "--json", *arguments]
        )

    auto, named, single = run("--exit", "auto"), run("--exit", "entropy:3.65"), run("--exit-entropy", "3.65")
    assert auto.exit_code == 0, auto.output
    assert json.loads(auto.stdout)["depth"] == json.loads(named.stdout)["depth"] == json.loads(single.stdout)["depth"]
    refused = run("--exit", "entropy=3")
    assert refused.exit_code == 2
    assert "NAME:VALUE" in refused.output
    shown = CliRunner().invoke(app, ["inspect", str(copy)])
    assert "entropy:3.65 keeps 1pt: 2.50 of 4 loops, 0.50 points of agreement lost" in " ".join(
        shown.output.replace("│", " ").split()
    )


def test_the_head_is_not_asked_after_the_last_loop(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, asked = runtime.driver(), list[int]()
    real = driver._first_logits
    monkeypatch.setattr(driver, "_first_logits", lambda control: asked.append(1) or real(control))  # type: ignore[func-returns-value]
    driver.append([[5]], runtime.options(exit="entropy:0.000001", loops=4).loops)
    assert driver.depth[0] == [4]
    assert len(asked) == 3


def test_fewer_loops_need_the_format_version_that_older_runtimes_refuse(package: Path, tmp_path: Path) -> None:
    from melt_runtime import PackageError

    copy = calibrated(package, tmp_path, most_loops=2)
    content = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**content, "format_version": 4}))
    with pytest.raises(PackageError, match=r"exit\.most_loops needs format version 5, and this is 4"):
        Runtime.load(copy)

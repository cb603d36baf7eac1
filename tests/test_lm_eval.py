"""Packages in lm-evaluation-harness: what its ``hf`` model says of the checkpoint, ``melt_run`` says of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, MakeFamily, MakePackage, write_tokenizer
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_models.checkpoint import load_model
from melt_runtime import ArgumentError
from processes import LIMIT

from melt_export.export import building
from melt_export.options import ExportOptions

pytest.importorskip("lm_eval.api")  # a folder of examples has its name
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from melt_runtime.lm_eval import MeltRun

ROOT = Path(__file__).parent.parent
ROOM = 32  # tokens per sequence
LONG = "the quick brown fox jumps over the lazy dog again and again"
PAIRS = [
    ("hello ", "world"),
    ("", "a text"),
    ("1+1=", "2"),
    ("1+1=", "3"),
    (LONG, " and rests"),
    (LONG, "!"),
    ("a", "b" * 20),
]
TEXTS = ["hello world", LONG + ", " + LONG, "x"]


def write_checkpoint(kind: str, directory: Path, make_family: MakeFamily) -> None:
    torch.manual_seed(0)
    model: Any
    if kind == "huginn":
        model = load_model(make_family("huginn"), dtype=torch.float32)
    elif kind == "looplm":
        model = LoopLMForCausalLM(LoopLMConfig(**TINY))
    else:
        model = MeltForCausalLM(MeltConfig(**TINY))
    model.save_pretrained(directory)
    write_tokenizer(directory)
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    )


@pytest.fixture(scope="module", params=["melt", "looplm", "huginn"])
def both(
    request: pytest.FixtureRequest, make_family: MakeFamily, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HFLM, MeltRun]:
    """The harness's own model over a checkpoint, and ours over its package."""
    place = tmp_path_factory.mktemp(request.param)
    write_checkpoint(request.param, place / "checkpoint", make_family)
    with building(place / "checkpoint", place / "package", ExportOptions(max_seq_len=ROOM, max_batch=3)):
        pass
    plain = HFLM(str(place / "checkpoint"), device="cpu", dtype="float32", max_length=ROOM, batch_size=3)
    return plain, MeltRun(str(place / "package"), batch_size=3)


def asked(kind: str, arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, one, number, ("task", number, 1)) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


def test_continuations_score_as_in_pytorch(both: tuple[HFLM, MeltRun]) -> None:
    plain, package = both
    requests = asked("loglikelihood", PAIRS)
    expected, found = plain.loglikelihood(requests, True), package.loglikelihood(requests, True)
    np.testing.assert_allclose([one for one, _ in found], [one for one, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_whole_texts_score_as_in_pytorch_however_long(both: tuple[HFLM, MeltRun]) -> None:
    plain, package = both
    requests = asked("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = plain.loglikelihood_rolling(requests, True)
    np.testing.assert_allclose(package.loglikelihood_rolling(requests, True), expected, atol=2e-3)


def test_continuations_are_generated_as_in_pytorch(both: tuple[HFLM, MeltRun]) -> None:
    plain, package = both
    limited = [(text, {"until": ["q"], "max_gen_toks": 8}) for text in TEXTS]
    stopped = [(text, {"until": "e", "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}) for text in TEXTS]
    requests = asked("generate_until", limited + stopped)
    assert package.generate_until(requests, True) == plain.generate_until(requests, True)


def test_a_greedy_continuation_is_known_as_greedy(both: tuple[HFLM, MeltRun]) -> None:
    # A MELT's decoded tokens see the last loop of those before them, as in chunks of one token.
    package = MeltRun(both[1].tokenizer_name, chunk=1)
    (text,) = package.generate_until(asked("generate_until", [("hello ", {"until": [], "max_gen_toks": 4})]), True)
    ids = package.tok_encode("hello ")
    said = package.runtime.generate(ids, max_tokens=4, chunk=1).token_ids
    request = (("hello ", text), ids, list(said))
    [(_, greedy)] = package._loglikelihood_tokens([request], True)
    assert greedy
    other = (("hello ", text), ids, [*said[:-1], (said[-1] + 1) % 50])
    assert [flag for _, flag in package._loglikelihood_tokens([request, other], True)] == [True, False]


def test_depth_is_an_argument_of_the_model(make_family: MakeFamily, tmp_path: Path) -> None:
    write_checkpoint("melt", tmp_path / "checkpoint", make_family)
    with building(tmp_path / "checkpoint", tmp_path / "package", ExportOptions(max_seq_len=ROOM)):
        pass
    requests = asked("loglikelihood", PAIRS)
    arguments = f"package={tmp_path / 'package'},loops=2"
    shallow = MeltRun.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    plain = HFLM(str(tmp_path / "checkpoint"), device="cpu", dtype="float32", max_length=ROOM)
    plain.model.config.total_ut_steps = 2
    expected = [one for one, _ in plain.loglikelihood(requests, True)]
    np.testing.assert_allclose([one for one, _ in shallow.loglikelihood(requests, True)], expected, atol=1e-3)

    early = MeltRun(str(tmp_path / "package"), exit_threshold=0.5)
    plain.model.config.total_ut_steps = 4
    plain.model.config.early_exit_threshold = 0.5
    expected = [one for one, _ in plain.loglikelihood(requests, True)]
    np.testing.assert_allclose([one for one, _ in early.loglikelihood(requests, True)], expected, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"loops": 0}, "loops is 0"),
        ({"loopz": 2}, "loopz"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"max_gen_toks": 64}, "max_gen_toks is 64"),
        ({"pretrained": "other"}, "give one of them"),
    ],
)
def test_arguments_are_refused_in_one_sentence(arguments: dict[str, Any], said: str, tiny_package: Path) -> None:
    with pytest.raises(ArgumentError, match=said) as raised:
        MeltRun(str(tiny_package), max_length=ROOM, **arguments).generate_until(asked("generate_until", [("a", {})]))
    assert "\n" not in str(raised.value)


def test_the_model_needs_no_torch() -> None:
    code = "import sys, melt_runtime.lm_eval; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT)


def test_the_harness_says_the_same_of_a_package_and_of_its_checkpoint(
    make_package: MakePackage, tmp_path: Path
) -> None:
    def results(module: str, model: str, arguments: str) -> dict[str, Any]:
        options = ["--model", model, "--model_args", arguments, "--include_path", "examples/lm_eval", "--device", "cpu"]
        asked = ["--tasks", "addition,addition_scored", "--limit", "16", "--output_path", str(tmp_path / model)]
        done = subprocess.run(
            [sys.executable, "-m", module, "run", *options, *asked],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
            timeout=LIMIT,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = (tmp_path / model).rglob("results*.json")
        found: dict[str, Any] = json.loads(file.read_text())["results"]
        return found

    demo = "examples/addition-melt"
    ours = results("melt_runtime.lm_eval", "melt_run", f"package={make_package(ROOT / demo)},loops=3")
    plain = results("melt_export.lm_eval", "hf", f"pretrained={demo},dtype=float32,total_ut_steps=3")
    assert ours["addition"]["exact_match,none"] == plain["addition"]["exact_match,none"] > 0.5
    assert ours["addition_scored"]["acc,none"] == plain["addition_scored"]["acc,none"] > 0.5
    scores = [one["addition_scored"]["perplexity,none"] for one in (ours, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_a_temperature_of_the_model_holds_unless_the_task_has_another(tiny_package: Path) -> None:
    model = MeltRun(str(tiny_package), max_length=ROOM, max_gen_toks=4, temperature=0.5, seed=1)
    request, _ = model._generation("a", {})
    assert request.options.sampling.temperature == 0.5
    with pytest.raises(ArgumentError, match=r"temperature is 0.0 in the task's .* and 0.5 in"):
        model._generation("a", {"temperature": 0.0})

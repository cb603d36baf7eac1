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
from conftest import TINY, MakeFamily, write_tokenizer
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_models.checkpoint import load_model
from melt_runtime import ArgumentError

from melt_export.export import building
from melt_export.options import ExportOptions

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from melt_runtime.lm_eval import MeltRun

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
    ],
)
def test_arguments_are_refused_in_one_sentence(arguments: dict[str, Any], said: str, tiny_package: Path) -> None:
    with pytest.raises(ArgumentError, match=said) as raised:
        MeltRun(str(tiny_package), max_length=ROOM, **arguments).generate_until(asked("generate_until", [("a", {})]))
    assert "\n" not in str(raised.value)


def test_the_model_needs_no_torch() -> None:
    code = "import sys, melt_runtime.lm_eval; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_harness_runs_a_task_on_a_package_and_on_its_checkpoint(make_family: MakeFamily, tmp_path: Path) -> None:
    write_checkpoint("melt", tmp_path / "checkpoint", make_family)
    with building(tmp_path / "checkpoint", tmp_path / "package", ExportOptions()):
        pass
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sums.yaml").write_text(
        "task: sums\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'sums.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: ['0', '1', '2', '3', '4']\ndoc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
    )

    def accuracy(module: str, model: str, arguments: str) -> float:
        options = ["--model", model, "--model_args", arguments, "--tasks", "sums", "--include_path", str(tmp_path)]
        place = tmp_path / model
        done = subprocess.run(
            [sys.executable, "-m", module, "run", *options, "--output_path", str(place), "--device", "cpu"],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = place.rglob("results*.json")
        return float(json.loads(file.read_text())["results"]["sums"]["acc,none"])

    ours = accuracy("melt_runtime.lm_eval", "melt_run", f"package={tmp_path / 'package'}")
    assert ours == accuracy("melt_export.lm_eval", "hf", f"pretrained={tmp_path / 'checkpoint'}")

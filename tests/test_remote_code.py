"""Checkpoints with their modelling file: opened by transformers where this package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, MakeFamily
from melt_models import HuginnForCausalLM, LoopLMConfig, LoopLMForCausalLM
from melt_models.checkpoint import load_model
from melt_models.convert_cli import app
from processes import LIMIT
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

IDS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 1, 2]]
# Run in a process of its own, from which this package has been removed.
STRANGER = """
import importlib.util, json, sys
from pathlib import Path
sys.path = [place for place in sys.path if not (Path(place) / "melt_models").is_dir()]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert importlib.util.find_spec("melt_models") is None
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
directory, ids, again = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
ids = torch.tensor(ids)
with torch.no_grad():
    logits = model(ids).logits
    said = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
model.train()
model.gradient_checkpointing_enable()
model(ids, labels=ids).loss.backward()
model.save_pretrained(again)
copy = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(copy(ids).logits, logits)
assert AutoConfig.from_pretrained(again, trust_remote_code=True).auto_map
assert "melt_models" not in sys.modules
print(json.dumps({"logits": logits.float().tolist(), "tokens": said.tolist(), "class": type(model).__module__}))
"""


def opened_by_a_stranger(directory: Path, scratch: Path) -> dict[str, Any]:
    """What a process that has only transformers computes with a checkpoint."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(directory), json.dumps(IDS), str(scratch / "again")]
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments],
        capture_output=True,
        text=True,
        cwd=scratch,
        env=environment,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_here(directory: Path, found: dict[str, Any]) -> None:
    """Compare with what this package computes."""
    model = load_model(directory)
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
        said = model.generate(torch.tensor(IDS), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.tensor(found["logits"]), logits.float())
    assert found["tokens"] == said.tolist()


def test_a_converted_checkpoint_with_its_code_opens_where_only_transformers_is(
    make_family: MakeFamily, tmp_path: Path
) -> None:
    output = tmp_path / "melt"
    done = CliRunner().invoke(app, [str(make_family("huginn")), str(output), "--chunk-size", "8", "--remote-code"])
    assert done.exit_code == 0, done.output
    found = opened_by_a_stranger(output, tmp_path)
    assert found["class"].endswith("modeling_melt")
    same_here(output, found)


@pytest.mark.parametrize("kind", ["ouro", "nanbeige", "huginn", "llama", "olmo"])
def test_every_family_writes_a_file_that_defines_it(kind: str, make_family: MakeFamily, tmp_path: Path) -> None:
    source: Any = LoopLMForCausalLM(LoopLMConfig(**TINY)) if kind == "ouro" else load_model(make_family(kind))
    output = tmp_path / "saved"
    source.save_pretrained(output, remote_code=True)
    same_here(output, opened_by_a_stranger(output, tmp_path))


def test_a_checkpoint_has_code_only_if_asked(tmp_path: Path) -> None:
    model = LoopLMForCausalLM(LoopLMConfig(**TINY))
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py"))


def test_a_class_registered_for_the_auto_classes_writes_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Registered(LoopLMForCausalLM):
        pass

    Registered.__module__ = LoopLMForCausalLM.__module__
    Registered.register_for_auto_class()
    Registered(LoopLMConfig(**TINY)).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.glob("*.py")] == ["modeling_looplm.py"]
    assert not LoopLMForCausalLM._with_code


def test_an_upload_holds_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LoopLMForCausalLM(LoopLMConfig(**TINY))
    uploaded: list[set[str]] = []

    def keep(self: Any, directory: str, *args: Any, **kwargs: Any) -> str:
        uploaded.append({file.name for file in Path(directory).iterdir()})
        return "done"

    class Hub:
        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})()

    from huggingface_hub import ModelCard

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *a, **k: ModelCard("a model"))
    monkeypatch.setattr(LoopLMForCausalLM, "_upload_modified_files", keep)
    model.push_to_hub("org/name", remote_code=True)
    model.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="org/name")
    assert all({"modeling_looplm.py", "config.json", "model.safetensors"} <= files for files in uploaded)
    assert len(uploaded) == 2


def test_two_modules_that_share_a_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import melt_models.cache
    from melt_models import MeltForCausalLM
    from melt_models.remote_code import modelling_source

    spoilt = Path(str(melt_models.cache.__file__)).read_text()
    read = Path.read_text

    def doubled(self: Path, *args: Any, **kwargs: Any) -> str:
        return spoilt + "\n\ndef _take() -> None: ...\n" if self.name == "cache.py" else read(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", doubled)
    with pytest.raises(RuntimeError, match="cache and melt both define _take"):
        modelling_source(MeltForCausalLM)


def test_a_saved_huginn_opens_by_its_name_on_the_hub(make_family: MakeFamily, tmp_path: Path) -> None:
    own = tmp_path / "models--org--name"
    model: Any = load_model(make_family("huginn"))
    model.save_pretrained(own / "snapshots" / "1234")
    (own / "refs").mkdir()
    (own / "refs" / "main").write_text("1234")
    found = AutoModelForCausalLM.from_pretrained("org/name", cache_dir=tmp_path, local_files_only=True)
    with torch.no_grad():
        assert torch.equal(found(torch.tensor(IDS)).logits, model(torch.tensor(IDS)).logits)


def test_a_huginn_that_is_nowhere_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="org/other is neither a directory nor a checkpoint"):
        HuginnForCausalLM.from_pretrained("org/other", cache_dir=tmp_path, local_files_only=True)

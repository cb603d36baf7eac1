"""An export gives a whole package or leaves everything as it was, and refuses what it cannot export in one sentence."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import TINY, MakeCheckpoint, MakePackage
from melt_models import CheckpointError, MeltConfig
from melt_models.atomic import TargetExistsError
from melt_models.checkpoint import Weights, meta_model
from melt_runtime.package.reader import Package
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from melt_export import export
from melt_export.errors import ExportError, ParityError
from melt_export.export import building
from melt_export.graph.merge_matmuls import merged_name
from melt_export.graph.placeholder_weights import with_placeholder_weights
from melt_export.options import ExportOptions
from melt_export.sizes import Sizes, package_sizes

KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from melt_export.export import building
from melt_export.options import ExportOptions

def progress(step, total, done):
    if step == "writing weights":
        os.kill(os.getpid(), signal.SIGKILL)

with building(Path(sys.argv[1]), Path(sys.argv[2]), ExportOptions(), force=True, progress=progress):
    pass
"""


class Interrupted(Exception):
    """Raised by a test in the middle of an export."""


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    """One layer: the quickest to trace."""
    return make_checkpoint(num_hidden_layers=1, tokenizer=True)


@pytest.fixture(scope="module")
def traces() -> dict[str, Any]:
    return {}


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch, traces: dict[str, Any]) -> None:
    """Traces equal models only once: for tests of what happens before and after. Tracing is most of an export."""

    def remembering(trace: Callable[..., Any]) -> Callable[..., Any]:
        def remembered(model: Any, dialect: Any, dtype: str, *rest: Any) -> Any:
            key = repr((trace.__name__, model.config.to_dict(), dialect.name, dtype, rest))
            if key not in traces:
                traces[key] = trace(model, dialect, dtype, *rest)
            return replace(traces[key], model=traces[key].model.clone())

        return remembered

    monkeypatch.setattr(export, "trace_loop_step", remembering(export.trace_loop_step))


@pytest.fixture
def old(make_package: MakePackage, checkpoint: Path, tmp_path: Path) -> Path:
    """A package that stands under the name already, with something of its own in it."""
    directory = Path(shutil.copytree(make_package(checkpoint), tmp_path / "package"))
    (directory / "notes.txt").write_text("of the old package")
    return directory


def write_package(checkpoint: Path, output: Path, *, force: bool = False, **options: Any) -> Package:
    with building(checkpoint, output, ExportOptions(**options), force=force):
        pass
    return Package.open(output)


def content(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def stops_at(step: str) -> Callable[[str, int, int], None]:
    """A progress callback that raises when a step begins."""

    def progress(name: str, total: int, done: int) -> None:
        if name == step:
            raise Interrupted(step)

    return progress


def with_weight(checkpoint: Path, output: Path, name: str, value: float) -> Path:
    """A copy of a checkpoint with one number of one tensor changed."""
    shutil.copytree(checkpoint, output)
    state = load_file(output / "model.safetensors")
    state[name].view(-1)[0] = value
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    return output


def refusal(error: type[Exception], checkpoint: Path, output: Path, **options: Any) -> str:
    """The sentence with which an export is refused; nothing may be left behind."""
    with pytest.raises(error) as caught:
        write_package(checkpoint, output, **options)
    assert not output.exists()
    assert not any(".partial-" in name for name in names(output.parent))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Whole or not at all


@pytest.mark.usefixtures("traced_once")
def test_the_name_appears_when_the_block_ends(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "package"
    with building(checkpoint, output, ExportOptions()) as directory:
        assert not output.exists()
        assert Package.open(directory).manifest.dialect == "onnxruntime"
    assert names(tmp_path) == ["package"]
    Package.open(output)


@pytest.mark.usefixtures("traced_once")
def test_a_failed_verification_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError), building(checkpoint, tmp_path / "package", ExportOptions()):
        raise ParityError("the package does not match its checkpoint")
    assert names(tmp_path) == []


@pytest.mark.usefixtures("traced_once")
def test_a_failed_verification_keeps_the_old_package(checkpoint: Path, old: Path, tmp_path: Path) -> None:
    before = content(old)
    with pytest.raises(ParityError), building(checkpoint, old, ExportOptions(), force=True):
        raise ParityError("the package does not match its checkpoint")
    assert content(old) == before
    assert names(tmp_path) == ["package"]


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("step", ["tracing loop_step", "writing weights", "hashing files"])
def test_an_export_that_fails_keeps_the_old_package(checkpoint: Path, old: Path, tmp_path: Path, step: str) -> None:
    before = content(old)
    with (
        pytest.raises(Interrupted, match=step),
        building(checkpoint, old, ExportOptions(), force=True, progress=stops_at(step)),
    ):
        pass
    assert content(old) == before
    assert names(tmp_path) == ["package"]


@pytest.mark.usefixtures("traced_once")
def test_force_replaces_an_old_package_entirely(checkpoint: Path, old: Path, tmp_path: Path) -> None:
    write_package(checkpoint, old, force=True, precision="fp32", max_batch=7)
    assert Package.open(old).manifest.max_batch == 7
    assert "notes.txt" not in names(old)
    assert names(tmp_path) == ["package"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_as_target_is_refused(checkpoint: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "package").write_text("mine")
    with pytest.raises(TargetExistsError, match="not a directory; choose another output name"):
        write_package(checkpoint, tmp_path / "package", force=force)
    assert content(tmp_path) == {"package": b"mine"}


def test_a_directory_with_content_is_refused_without_force(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "thesis.txt").write_text("mine")
    with pytest.raises(TargetExistsError, match="pass --force to replace it"):
        write_package(checkpoint, tmp_path / "package")
    assert content(tmp_path) == {"package/thesis.txt": b"mine"}


@pytest.mark.usefixtures("traced_once")
def test_an_empty_directory_as_target_is_used(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    write_package(checkpoint, tmp_path / "package")
    assert names(tmp_path) == ["package"]


@pytest.mark.usefixtures("traced_once")
def test_directories_above_the_target_are_created(checkpoint: Path, tmp_path: Path) -> None:
    write_package(checkpoint, tmp_path / "exports" / "today" / "package")
    assert names(tmp_path / "exports" / "today") == ["package"]


@pytest.mark.usefixtures("traced_once")
def test_a_killed_export_harms_neither_the_old_package_nor_the_next_export(checkpoint: Path, old: Path) -> None:
    before = content(old)
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(checkpoint), str(old)]
    killed = subprocess.run(command, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert content(old) == before
    Package.open(old)
    write_package(checkpoint, old, force=True)
    assert "notes.txt" not in names(old)


# Refusals


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    message = refusal(CheckpointError, tmp_path / "nowhere", tmp_path / "package")
    assert "nowhere does not exist" in message


def test_a_checkpoint_that_is_not_looped_yet_is_sent_to_melt_convert(tmp_path: Path) -> None:
    own = ("total_ut_steps", "chunk_size", "pad_token_id", "eos_token_id")
    shape: dict[str, Any] = {name: value for name, value in TINY.items() if name not in own}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(tmp_path / "source")
    assert "melt-convert" in refusal(CheckpointError, tmp_path / "source", tmp_path / "package")


LARGE = "model.layers.0.mlp.down_proj.weight"
SMALL = "model.layers.0.input_layernorm.weight"  # stays inside the graph file


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_is_found_and_named(
    checkpoint: Path, tmp_path: Path, name: str, value: float
) -> None:
    spoiled = with_weight(checkpoint, tmp_path / "spoiled", name, value)
    message = refusal(CheckpointError, spoiled, tmp_path / "package")
    assert f"tensor {name} holds NaN or Inf" in message


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("name", [LARGE, SMALL], ids=["large", "small"])
def test_a_weight_beyond_fp16_is_named_with_a_way_out(checkpoint: Path, tmp_path: Path, name: str) -> None:
    wide = with_weight(checkpoint, tmp_path / "wide", name, 1e6)
    message = refusal(ExportError, wide, tmp_path / "package", precision="fp16")
    assert name in message
    assert "--precision bf16 or fp32" in message


def test_a_tokenizer_of_another_model_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tokenizer=True, vocab_size=40)
    message = refusal(CheckpointError, checkpoint, tmp_path / "package")
    assert "token ids up to 44, the model rows for 40: they do not belong together" in message


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": {"id": 1}}', '{"eos_token_id": -1}', '{"eos_token_id": [1, 50]}']
)
def test_a_broken_generation_config_is_refused_before_anything_is_traced(
    checkpoint: Path, tmp_path: Path, content: str
) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / "generation_config.json").write_text(content)
    assert str(broken / "generation_config.json") in refusal(CheckpointError, broken, tmp_path / "package")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", '{"a": %s}' % ("[" * 40 + "]" * 40), "lists and objects lie more than 32 deep"),
        ("generation_config.json", json.dumps({"a": "x" * (9 << 20)}), "more than the 8,388,608 bytes"),
        ("example_prompt.txt", "x" * 5000, "more than the 4,096 bytes that are read"),
        ("special_tokens_map.json", '{"a": %s}' % ("[" * 40 + "]" * 40), "lists and objects lie more than 32 deep"),
    ],
    ids=lambda value: value[:20],
)
def test_what_no_runtime_would_read_is_refused_before_anything_is_traced(
    checkpoint: Path, tmp_path: Path, name: str, content: str, words: str
) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    (broken / name).write_text(content)
    message = refusal(ExportError, broken, tmp_path / "package")
    assert str(broken / name) in message
    assert words in message


def test_an_absurd_number_of_loops_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    absurd = Path(shutil.copytree(checkpoint, tmp_path / "absurd"))
    config = json.loads((absurd / "config.json").read_text())
    (absurd / "config.json").write_text(json.dumps({**config, "total_ut_steps": 10**9}))
    assert "total_ut_steps is 1000000000" in refusal(CheckpointError, absurd, tmp_path / "package")


def test_a_tokenizer_over_which_the_library_panics_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(checkpoint, tmp_path / "broken"))
    content = json.loads((broken / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    (broken / "tokenizer.json").write_text(json.dumps(content))
    message = refusal(ExportError, broken, tmp_path / "package")
    assert f"{broken / 'tokenizer.json'} is not a valid tokenizer (Precompiled" in message


def test_more_tokens_than_the_checkpoint_has_positions_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    message = refusal(ExportError, checkpoint, tmp_path / "package", max_seq_len=257)
    assert "--max-seq-len 257 is more than the checkpoint's 256 positions" in message


@pytest.mark.parametrize("name", ["max_seq_len", "max_batch", "chunk"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(ExportError, match=f"{name} is {value}; it must be 1 to "):
        ExportOptions(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "choices"), [("precision", "fp32, fp16, bf16"), ("dialect", "onnxruntime")])
def test_an_unknown_choice_is_refused_with_the_known_ones(option: str, choices: str) -> None:
    with pytest.raises(ExportError, match=f"{option} 'klingon' is not one of {choices}"):
        ExportOptions(**{option: "klingon"})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def narrow_heads(make_checkpoint: MakeCheckpoint) -> Path:
    """Heads of width 8, which ONNX Runtime's fused attention does not take."""
    return make_checkpoint(num_hidden_layers=1, num_attention_heads=8)


def test_heads_that_the_fused_attention_cannot_take_are_sent_elsewhere(narrow_heads: Path, tmp_path: Path) -> None:
    message = refusal(ExportError, narrow_heads, tmp_path / "package", dialect="onnxruntime")
    assert "head_dim is 8" in message
    assert "--dialect standard or portable" in message


def test_heads_of_any_even_width_export_as_portable(narrow_heads: Path, tmp_path: Path) -> None:
    package = write_package(narrow_heads, tmp_path / "package", dialect="portable")
    assert package.manifest.states[2].shape[-1] == 8


# Defaults


def sizes(options: ExportOptions, chunk: int, positions: int) -> Sizes:
    """Of a MELT with this chunk and so many positions."""
    return package_sizes(MeltConfig(chunk_size=chunk, max_position_embeddings=positions), options)


@pytest.mark.parametrize(("positions", "expected"), [(256, 256), (4096, 4096), (65536, 4096)])
def test_max_seq_len_defaults_to_the_positions_up_to_4096(positions: int, expected: int) -> None:
    assert sizes(ExportOptions(), 8, positions).max_seq_len == expected


def test_more_than_4096_tokens_can_be_asked_for() -> None:
    assert sizes(ExportOptions(max_seq_len=65536), 8, 65536).max_seq_len == 65536


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 128), ({"chunk": 16}, 16), ({"max_seq_len": 100}, 100), ({"chunk": 1000, "max_seq_len": 100}, 100)],
    ids=str,
)
def test_chunk_defaults_to_the_checkpoints_and_fits_the_cache(options: dict[str, int], expected: int) -> None:
    assert sizes(ExportOptions(**options), 128, 512).chunk == expected


@pytest.mark.parametrize(("max_batch", "rows"), [(1, 64), (2, 64 + 8), (8, 64 + 8)])
def test_only_a_batch_needs_rows_for_padding(max_batch: int, rows: int) -> None:
    assert sizes(ExportOptions(max_seq_len=64, max_batch=max_batch), 8, 256).cache_rows == rows


# Weights


def test_every_weight_is_stored_once(checkpoint: Path, make_package: MakePackage) -> None:
    package = make_package(checkpoint)
    places, stored = set(), set()
    for file in package.glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            if place:
                places.add((int(place["offset"]), int(place["length"])))
                stored.add(tensor.name)
    large = {name for name, tensor in Weights(checkpoint).items() if 4 * math.prod(tensor.shape) >= 4096}
    alone = sorted(large - stored)
    groups = [list(group) for size in (2, 3) for group in itertools.combinations(alone, size)]
    together = {merged_name(group): group for group in groups if merged_name(group) in stored}
    assert sorted(itertools.chain(*together.values())) == alone  # each in one packed weight, and in no other
    assert stored == (large - set(alone)) | set(together) | {"rotary.cos", "rotary.sin"}
    assert len(places) == len(stored)
    end = 0
    for offset, length in sorted(places):
        assert 0 <= offset - end < 4096  # nothing overlaps, and there is nothing but alignment between
        end = offset + length
    assert (package / "weights.data").stat().st_size == end


@pytest.mark.usefixtures("traced_once")
def test_a_sharded_checkpoint_gives_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copyfile(checkpoint / "config.json", sharded / "config.json")
    parts: dict[str, dict[str, Tensor]] = {"one.safetensors": {}, "two.safetensors": {}}
    weight_map = {}
    for index, (name, tensor) in enumerate(load_file(checkpoint / "model.safetensors").items()):
        weight_map[name] = list(parts)[index % 2]
        parts[weight_map[name]][name] = tensor
    for file, tensors in parts.items():
        save_file(tensors, sharded / file)
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    whole, parted = (write_package(source, tmp_path / f"of-{source.name}") for source in (checkpoint, sharded))
    for file in ("weights.data", "embed.onnx", "loop_step.onnx", "lm_head.onnx"):
        assert whole.manifest.files[file] == parted.manifest.files[file]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_traced_model_holds_no_weights_in_memory(tied: bool) -> None:
    config = MeltConfig(**{**TINY, "hidden_size": 4096, "vocab_size": 100_000, "tie_word_embeddings": tied})
    model = with_placeholder_weights(meta_model(config), torch.float32)
    tensors = [*model.parameters(), *model.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    assert sum(tensor.nbytes for tensor in model.parameters()) > 1e8
    assert sum(storages.values()) < 65536
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied

"""Conversion to MELT, and its command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import contents
from melt_models import (
    CheckpointError,
    LoopLMConfig,
    LoopLMForCausalLM,
    MeltConfig,
    MeltForCausalLM,
    UnsupportedConfigError,
)
from melt_models.atomic import TargetExistsError
from melt_models.checkpoint import load_model, read_config
from melt_models.convert import COMPANIONS, convert
from melt_models.convert_cli import main
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
IDS = torch.arange(3, 15)[None]


def write(model: Any, directory: Path, **options: Any) -> Any:
    """Gives a model random weights, norms included, and saves it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + ("norm" in name))
    model.eval().save_pretrained(directory, **options)
    return model


def ouro(directory: Path, **fields: Any) -> LoopLMForCausalLM:
    return write(LoopLMForCausalLM(LoopLMConfig(**{**SIZES, "total_ut_steps": 3, **fields})), directory)


def llama(directory: Path, **fields: Any) -> LlamaForCausalLM:
    return write(LlamaForCausalLM(LlamaConfig(**{**SIZES, **fields})), directory)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


def test_an_ouros_config_fields_are_carried_over(tmp_path: Path) -> None:
    fields = {
        "rope_theta": 30000.0,
        "rms_norm_eps": 1e-5,
        "early_exit_threshold": 0.8,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "pad_token_id": 4,
        "tie_word_embeddings": True,
        "initializer_range": 0.01,
    }
    source = ouro(tmp_path / "ouro", **fields).config
    convert(tmp_path / "ouro", tmp_path / "melt", chunk_size=5)
    config = read_config(tmp_path / "melt")
    assert isinstance(config, MeltConfig)
    for name in (*SIZES, *fields, "total_ut_steps", "norm_layout", "rope_parameters", "hidden_act", "use_cache"):
        if name != "rope_theta":
            assert getattr(config, name) == getattr(source, name), name
    assert (config.chunk_size, config.latent_init, list(config.untrained)) == (5, "first_input", ["latent_gate"])


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_the_first_loop_of_a_converted_ouro_is_looplms(tied: bool, tmp_path: Path) -> None:
    source = ouro(tmp_path / "ouro", tie_word_embeddings=tied)
    convert(tmp_path / "ouro", tmp_path / "melt")
    model = load_model(tmp_path / "melt")
    assert isinstance(model, MeltForCausalLM)
    expected = source(IDS)
    actual = model(IDS)
    assert torch.equal(actual.loop_hidden[0], expected.loop_hidden[0])
    assert torch.equal(actual.exit_probability[0], expected.exit_distribution[0])
    assert torch.equal(model(IDS, num_loops=1).logits, source(IDS, exit_at_step=0).logits)


def test_an_untrained_latent_gate_stays_near_the_last_loop(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    convert(tmp_path / "ouro", tmp_path / "melt")
    gate = load_model(tmp_path / "melt").model.layers[1].latent_gate
    h, a = torch.randn(2, 1, 4, 64).unbind()
    z = 0.1192  # sigmoid(-2)
    torch.testing.assert_close(gate(a, h), z * h + (1 - z) * a, rtol=1e-3, atol=1e-3)


def test_loops_can_be_chosen(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    convert(tmp_path / "ouro", tmp_path / "melt", loops=6)
    assert read_config(tmp_path / "melt").total_ut_steps == 6


def test_the_dtype_of_the_source_is_kept(tmp_path: Path) -> None:
    write(LoopLMForCausalLM(LoopLMConfig(**SIZES)).to(torch.bfloat16), tmp_path / "ouro", max_shard_size="30KB")
    assert len(list((tmp_path / "ouro").glob("*.safetensors"))) > 1
    convert(tmp_path / "ouro", tmp_path / "melt")
    assert {weight.dtype for weight in load_model(tmp_path / "melt").parameters()} == {torch.bfloat16}


def test_every_tensor_keeps_its_type_and_nothing_finite_becomes_infinite(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    path, norm = tmp_path / "llama" / "model.safetensors", "model.layers.0.input_layernorm.weight"
    tensors = {name: value if name == norm else value.half() for name, value in load_file(path).items()}
    tensors[norm][:2] = torch.tensor([70000.0, 1 + 2**-20])
    save_file(tensors, path, metadata={"format": "pt"})
    convert(tmp_path / "llama", tmp_path / "melt")
    written = load_file(tmp_path / "melt" / "model.safetensors")
    for name, value in tensors.items():
        assert written[name].dtype == value.dtype, name
        assert torch.equal(written[name], value), name
    # and whoever casts to the type that the config names loses nothing, transformers among them
    assert json.loads((tmp_path / "melt" / "config.json").read_text())["dtype"] == "float32"
    model = MeltForCausalLM.from_pretrained(tmp_path / "melt", dtype="auto")
    assert model.state_dict()[norm][:2].tolist() == [70000.0, 1 + 2**-20]


def test_derived_buffers_of_the_source_are_left_behind(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({**load_file(path), name: torch.ones(8)}, path, metadata={"format": "pt"})
    convert(tmp_path / "llama", tmp_path / "melt")
    assert name not in load_file(tmp_path / "melt" / "model.safetensors")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"vocab_size": 2**31 - 1}, "vocab_size 2147483647"),
        ({"hidden_size": 2**62}, "hidden_size is 4611686018427387904"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ],
    ids=str,
)
def test_a_source_that_asks_for_more_than_it_holds_is_refused_at_once(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    llama(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "llama", tmp_path / "melt")


@pytest.mark.parametrize("rope", [None, LLAMA3], ids=["rope", "llama3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_a_converted_llama_has_the_llamas_logits(
    kv_heads: int, tied: bool, rope: dict[str, Any] | None, tmp_path: Path
) -> None:
    fields = {"num_key_value_heads": kv_heads, "tie_word_embeddings": tied, "rope_parameters": rope}
    source = llama(tmp_path / "llama", **fields)
    config = convert(tmp_path / "llama", tmp_path / "melt", chunk_size=5)
    assert (config.total_ut_steps, config.norm_layout) == (1, "pre")
    assert list(config.untrained) == ["latent_gate", "early_exit_gate"]
    expected = source(IDS).logits
    model = load_model(tmp_path / "melt")
    assert relative_error(model(IDS).logits, expected) < 1e-5
    assert relative_error(model(IDS, chunk_size=12).logits, expected) < 1e-5


@torch.no_grad()
def test_a_llama_config_that_leaves_things_out_gets_llamas_defaults(tmp_path: Path) -> None:
    source = llama(tmp_path / "llama", num_key_value_heads=4)
    path = tmp_path / "llama" / "config.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: content[k] for k in content if k in SIZES or k == "model_type"} | {"head_dim": None})
    )
    convert(tmp_path / "llama", tmp_path / "melt")
    assert relative_error(load_model(tmp_path / "melt")(IDS).logits, source(IDS).logits) < 1e-5


@torch.no_grad()
def test_a_converted_llamas_exit_gate_never_opens(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    convert(tmp_path / "llama", tmp_path / "melt", loops=4)
    assert load_model(tmp_path / "melt")(IDS, exit_threshold=0.001).depth.unique().tolist() == [4]


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    for name in (*COMPANIONS, "notes.txt", "modeling_ouro.py"):
        (tmp_path / "ouro" / name).write_text(json.dumps({"content": name}))
    convert(tmp_path / "ouro", tmp_path / "melt")
    written = contents(tmp_path / "melt")
    assert set(written) == {"config.json", "model.safetensors", *COMPANIONS}
    for name in COMPANIONS:
        assert json.loads(written[name]) == {"content": name}


WORDS: dict[str, Any] = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 49}, "unk_token": "a"}}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", "{", "cannot be read as JSON"),
        ("generation_config.json", "[2]", "holds a JSON list"),
        ("generation_config.json", '{"eos_token_id": "<end>"}', "eos_token_id is '<end>'; it must be a token id or a"),
        ("generation_config.json", '{"eos_token_id": [1, null]}', r"eos_token_id is \[1, None\]"),
        ("generation_config.json", '{"pad_token_id": {}}', "pad_token_id is {}"),
        (
            "generation_config.json",
            '{"eos_token_id": 50}',
            "eos_token_id is 50, which the model cannot say: .* 50 t",
        ),
        ("generation_config.json", '{"eos_token_id": [1, 99999]}', "eos_token_id is 99999"),
        (
            "generation_config.json",
            json.dumps({"eos_token_id": [1] * 10**6}),
            "a list of 1,000,000 tokens; 256 can",
        ),
        ("tokenizer.json", "[" * 10**7, "more than the 6,000,000 values that are read"),
        ("tokenizer_config.json", "no JSON", "cannot be read as JSON"),
        ("tokenizer.json", json.dumps({**WORDS, "added_tokens": [{"id": 50, "content": "<c>"}]}), "ids up to 50, the"),
        ("tokenizer.json", json.dumps({"model": {"type": "Unigram", "vocab": [["a", 0.0]] * 60}}), "ids up to 59, the"),
    ],
)
def test_a_companion_that_no_package_could_use_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    (tmp_path / "ouro" / name).write_text(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        convert(tmp_path / "ouro", tmp_path / "melt")
    assert str(tmp_path / "ouro" / name) in str(caught.value)
    assert not (tmp_path / "melt").exists()


def test_a_tokenizer_as_large_as_those_of_today_is_taken(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    content = json.dumps(WORDS) + " " * (40 << 20)
    (tmp_path / "ouro" / "tokenizer.json").write_text(content)
    convert(tmp_path / "ouro", tmp_path / "melt")
    assert (tmp_path / "melt" / "tokenizer.json").read_text() == content


def test_an_end_token_of_the_config_that_the_model_cannot_say_is_refused(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro", eos_token_id=[1, 50])
    (tmp_path / "ouro" / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"config\.json: eos_token_id is 50, which the model cannot say"):
        convert(tmp_path / "ouro", tmp_path / "melt")
    (tmp_path / "ouro" / "generation_config.json").write_text('{"eos_token_id": 1}')
    convert(tmp_path / "ouro", tmp_path / "melt")


def test_a_tokenizer_with_too_many_tokens_is_refused_with_a_way_on(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    content = {**WORDS, "added_tokens": [{"id": 50, "content": "<c>"}, {"id": 51, "content": "<d>"}]}
    (tmp_path / "ouro" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"rows for 50.* resize_token_embeddings\(52\)"):
        convert(tmp_path / "ouro", tmp_path / "melt")


def test_written_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    (tmp_path / "other").touch()
    convert(tmp_path / "ouro", tmp_path / "melt")
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "melt").iterdir()}
    assert set(modes.values()) == {oct((tmp_path / "other").stat().st_mode & 0o777)}, modes


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_a_llama_with_biases_is_refused(bias: str, tmp_path: Path) -> None:
    llama(tmp_path / "llama", **{bias: True})
    with pytest.raises(UnsupportedConfigError, match="biases"):
        convert(tmp_path / "llama", tmp_path / "melt")


def test_a_melt_is_no_source(tmp_path: Path) -> None:
    write(MeltForCausalLM(MeltConfig(**SIZES)), tmp_path / "melt")
    with pytest.raises(UnsupportedConfigError, match="'melt' cannot become a MELT"):
        convert(tmp_path / "melt", tmp_path / "again")


@pytest.mark.parametrize(("field", "value"), [("hidden_act", "gelu"), ("num_key_value_heads", 3), ("head_dim", 15)])
def test_a_llama_that_melt_cannot_hold_is_refused(field: str, value: Any, tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UnsupportedConfigError, match=field):
        convert(tmp_path / "llama", tmp_path / "melt")


def test_a_source_with_nan_leaves_nothing_behind(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    tensors = load_file(tmp_path / "ouro" / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, tmp_path / "ouro" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        convert(tmp_path / "ouro", tmp_path / "melt")
    assert [path.name for path in tmp_path.iterdir()] == ["ouro"]


def test_an_existing_target_needs_force(tmp_path: Path) -> None:
    ouro(tmp_path / "ouro")
    (tmp_path / "melt").mkdir()
    (tmp_path / "melt" / "mine.txt").write_text("mine")
    with pytest.raises(TargetExistsError, match="--force"):
        convert(tmp_path / "ouro", tmp_path / "melt")
    assert contents(tmp_path / "melt") == {"mine.txt": b"mine"}
    convert(tmp_path / "ouro", tmp_path / "melt", force=True)
    assert not (tmp_path / "melt" / "mine.txt").exists()
    assert isinstance(load_model(tmp_path / "melt"), MeltForCausalLM)


def test_a_checkpoint_can_be_converted_in_place_with_force(tmp_path: Path) -> None:
    ouro(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model", force=True)
    assert isinstance(load_model(tmp_path / "model"), MeltForCausalLM)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int | str | None:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["melt-convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_the_command_says_what_is_untrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "llama")
    assert run(monkeypatch, tmp_path / "llama", tmp_path / "melt", "--loops", 2, "--chunk-size", 7) == 0
    assert "2 layers, 2 loops; untrained: latent_gate, early_exit_gate" in capsys.readouterr().out
    config = read_config(tmp_path / "melt")
    assert (config.total_ut_steps, config.chunk_size) == (2, 7)


def test_the_command_says_that_one_loop_reads_no_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "llama")
    assert run(monkeypatch, tmp_path / "llama", tmp_path / "melt") == 0
    said = capsys.readouterr()
    assert "1 loop; untrained, never read in one loop: latent_gate, early_exit_gate" in said.out
    assert f"{tmp_path / 'llama'} has no tokenizer.json, so that prompts and answers will be token ids" in said.err
    assert said.err.count("has no tokenizer.json") == 1


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "has no tokenizer.json, so that prompts and answers will be token ids\n"),
        (["tokenizer.model"], ".save_pretrained('{source}') of transformers makes it from tokenizer.model\n"),
        (["vocab.json", "merges.txt"], "makes it from vocab.json\n"),
        (["tokenizer.json"], ""),
    ],
    ids=str,
)
def test_a_checkpoint_without_a_tokenizer_is_converted_and_said_to_have_none(
    files: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / "llama"
    llama(source)
    for name in files:
        (source / name).write_text("{}")
    assert run(monkeypatch, source, tmp_path / "melt") == 0
    error = capsys.readouterr().err
    assert error.endswith(said.format(source=source))
    assert ("melt-convert:" in error) == bool(said)


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("nowhere", "melt", "does not exist"),
        ("bad", "melt", "hidden_act"),
        ("ouro", "full", "--force"),
        ("ouro", "file", "not a directory"),
        ("ouro", "file/melt", "file"),
    ],
)
def test_the_command_exits_2_with_one_line(
    source: str,
    target: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ouro(tmp_path / "ouro")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text('{"model_type": "ouro", "hidden_act": "gelu"}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    capsys.readouterr()
    assert run(monkeypatch, tmp_path / source, tmp_path / target) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("melt-convert: ")
    assert words in error
    assert contents(tmp_path) == before

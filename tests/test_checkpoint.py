"""Reading checkpoint directories: what loads, and the one clear sentence for configurations that do not."""

from pathlib import Path
from typing import Any

import checkpoint_files
import pytest
import torch
from checkpoint_files import MODELS, SIZES, V_PROJ, change_config, change_tensors, refused, same, small_model
from melt_models import (
    CheckpointError,
    LoopLMConfig,
    MeltConfig,
)
from melt_models.checkpoint import (
    Weights,
    load_model,
    load_weights,
    open_checkpoint,
    read_config,
)
from melt_models.layers import rotary_tables
from melt_models.tensors import _DERIVED, _MASK
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

checkpoint = checkpoint_files.checkpoint

# As published: the old names of the RoPE and dtype fields, remote code, and fields of a library's own.
OURO_JSON = """{
  "architectures": ["OuroForCausalLM"],
  "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_ouro.OuroConfig", "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM"},
  "bos_token_id": 1,
  "eos_token_id": 2,
  "head_dim": 16,
  "hidden_act": "silu",
  "hidden_size": 64,
  "initializer_range": 0.02,
  "intermediate_size": 96,
  "layer_types": ["full_attention", "full_attention"],
  "max_position_embeddings": 512,
  "max_window_layers": 2,
  "model_type": "ouro",
  "num_attention_heads": 4,
  "num_hidden_layers": 2,
  "num_key_value_heads": 4,
  "rms_norm_eps": 1e-06,
  "rope_scaling": null,
  "rope_theta": 40000.0,
  "sliding_window": null,
  "tie_word_embeddings": false,
  "torch_dtype": "bfloat16",
  "total_ut_steps": 4,
  "transformers_version": "4.55.0",
  "use_cache": true,
  "use_sliding_window": false,
  "vocab_size": 50
}"""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("kind", ["ouro", "melt"])
def test_a_saved_model_loads_whether_tied_or_sharded(kind: str, shard: str, tied: bool, tmp_path: Path) -> None:
    model = small_model(kind, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    same(tmp_path, model)
    loaded = load_model(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_a_tied_checkpoint_may_repeat_the_embedding_as_its_head(tmp_path: Path) -> None:
    model = small_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    same(tmp_path, model)


def test_absent_head_dim_and_key_value_heads_follow_from_the_heads(tmp_path: Path) -> None:
    model = small_model(num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    change_config(tmp_path, drop=("head_dim", "num_key_value_heads"))
    config = read_config(tmp_path)
    assert (config.head_dim, config.num_key_value_heads) == (16, 4)
    same(tmp_path, model)


def test_a_published_ouro_config_loads(tmp_path: Path) -> None:
    model = small_model(num_key_value_heads=4, total_ut_steps=4, rope_theta=40000.0, max_position_embeddings=512)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(OURO_JSON)
    config = read_config(tmp_path)
    assert isinstance(config, LoopLMConfig)
    assert (config.total_ut_steps, config.norm_layout, config.eos_token_id) == (4, "sandwich", 2)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 40000.0}
    assert load_model(tmp_path).dtype == torch.bfloat16
    same(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_keep_their_dtype_unless_another_is_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    small_model().to(dtype).save_pretrained(tmp_path)
    assert load_model(tmp_path).dtype == dtype
    assert load_model(tmp_path, torch.float32).dtype == torch.float32


def test_weights_tell_name_shape_and_dtype_without_reading(checkpoint: Path) -> None:
    weights = Weights(checkpoint)
    stored = weights[V_PROJ]
    assert (stored.shape, stored.dtype, stored.file.name) == ((32, 64), torch.float32, "model.safetensors")
    assert set(weights) == set(small_model().state_dict())
    assert torch.equal(weights.tensor(V_PROJ), small_model().state_dict()[V_PROJ])


def test_a_large_finite_tensor_whose_sum_overflows_is_accepted(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t[V_PROJ].fill_(3e38))
    assert load_model(checkpoint).state_dict()[V_PROJ][0, 0] == 3e38


ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", ROPE)
def test_a_static_rope_scaling_gives_transformers_own_tables(kind: str, checkpoint: Path) -> None:
    change_config(checkpoint, drop=("rope_parameters",), rope_theta=10000.0, rope_scaling=ROPE[kind])
    change_config(checkpoint, max_position_embeddings=512)
    config = read_config(checkpoint)
    load_model(checkpoint)
    positions = torch.arange(0, 300, 7)[None]
    cos, sin = rotary_tables(config, positions)
    fields = {name: size for name, size in SIZES.items() if name != "total_ut_steps"}
    llama = LlamaConfig(**fields, max_position_embeddings=512, rope_parameters={**ROPE[kind], "rope_theta": 10000.0})
    expected_cos, expected_sin = LlamaRotaryEmbedding(llama)(torch.zeros(1), positions)
    torch.testing.assert_close(cos, expected_cos[..., :8])
    torch.testing.assert_close(sin, expected_sin[..., :8])


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "does not exist")


def test_a_file_instead_of_a_directory_is_refused(checkpoint: Path) -> None:
    refused(checkpoint / "model.safetensors", "model.safetensors", "is a file")


def test_a_directory_without_config_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refused(checkpoint, str(checkpoint), "no config.json")


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b'{"model_type": "ouro"'])
def test_broken_json_is_refused(content: bytes, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_bytes(content)
    refused(checkpoint, "config.json", "JSON")


def test_a_config_that_is_no_object_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[1]")
    refused(checkpoint, "config.json", "list")


@pytest.mark.parametrize("name", ["qwen2", None, 7, ["ouro"], {"ouro": 1}])
def test_an_unknown_model_type_is_refused(name: Any, checkpoint: Path) -> None:
    change_config(checkpoint, model_type=name)
    refused(checkpoint, "model_type", repr(name), "'ouro'", "'melt'", config=True)


def test_a_llama_has_to_be_converted_first(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="llama")
    refused(checkpoint, "'llama'", "melt-convert", config=True)


BAD_CONFIGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"total_ut_steps": 0}, ("total_ut_steps is 0",)),
    ({"total_ut_steps": "four"}, ("total_ut_steps",)),
    ({"hidden_size": None}, ("hidden_size",)),
    ({"num_hidden_layers": -1}, ("num_hidden_layers is -1",)),
    ({"num_attention_heads": 0}, ("num_attention_heads is 0",)),
    ({"num_key_value_heads": 3}, ("num_attention_heads (4)", "num_key_value_heads (3)")),
    ({"num_key_value_heads": 0}, ("num_key_value_heads is 0",)),
    ({"num_key_value_heads": "two"}, ("num_key_value_heads",)),
    ({"head_dim": 15}, ("head_dim is 15", "even")),
    ({"head_dim": 16.5}, ("head_dim",)),
    ({"hidden_act": "gelu"}, ("hidden_act 'gelu'", "silu")),
    ({"norm_layout": "post"}, ("norm_layout 'post'",)),
    ({"rms_norm_eps": 0.0}, ("rms_norm_eps is 0.0",)),
    ({"initializer_range": float("nan")}, ("initializer_range is nan",)),
    ({"early_exit_threshold": "high"}, ("early_exit_threshold",)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": "large"}}, ("rope_theta",)),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, ("rope_theta",)),
    ({"rope_parameters": "yarn"}, ("rope_parameters",)),
    ({"sliding_window": 4, "use_sliding_window": True}, ("sliding_window",)),
    ({"early_exit_step": 3}, ("early_exit_step is 3", "total_ut_steps is 3")),
    ({"model_type": "melt", "chunk_size": 0}, ("chunk_size is 0",)),
    ({"model_type": "melt", "latent_init": "ones"}, ("latent_init 'ones'",)),
    ({"model_type": "melt", "ema_weight": 1e400}, ("ema_weight is inf",)),
    ({"hidden_size": True}, ("hidden_size is True",)),
    ({"total_ut_steps": 10**9}, ("total_ut_steps is 1000000000", "1024")),
    ({"max_position_embeddings": 2**31}, ("max_position_embeddings is 2147483648",)),
    ({"pad_token_id": "<pad>"}, ("pad_token_id is '<pad>'",)),
    ({"pad_token_id": [0]}, ("pad_token_id is [0]",)),
    ({"eos_token_id": ["x"]}, ("eos_token_id is ['x']",)),
    ({"eos_token_id": {"id": 1}}, ("eos_token_id is {'id': 1}",)),
    ({"eos_token_id": 2**62}, ("eos_token_id is 4611686018427387904",)),
    ({"hidden_act": "x" * 5000}, ("hidden_act 'xxx", "...")),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, ("low_freq_factor",)),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 1e-320}}, ("rotary embedding",)),
]


@pytest.mark.parametrize(("fields", "words"), BAD_CONFIGS, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_config_that_cannot_be_built_is_refused(
    fields: dict[str, Any], words: tuple[str, ...], checkpoint: Path
) -> None:
    change_config(checkpoint, **fields)
    refused(checkpoint, "config.json", *words, config=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, ("1000000000 layers", "only 27 tensors")),
        ({"num_hidden_layers": 2**31 - 1}, ("2147483647 layers",)),
        ({"vocab_size": 2**31 - 1}, ("vocab_size 2147483647, hidden_size 64", "137,438,953,408 values")),
        ({"hidden_size": 2**30}, ("hidden_size 1073741824",)),
        ({"intermediate_size": 10**6}, ("intermediate_size 1000000",)),
        ({"head_dim": 2**20}, ("head_dim 1048576",)),
        ({"num_attention_heads": 2**20}, ("num_attention_heads 1048576",)),
    ],
    ids=str,
)
def test_sizes_are_weighed_against_the_tensors_before_a_model_is_built(
    fields: dict[str, Any], words: tuple[str, ...], checkpoint: Path
) -> None:
    change_config(checkpoint, **fields)
    refused(checkpoint, "config.json asks for", *words)


def test_layers_of_tensors_without_values_are_bounded_too(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({f"model.layers.{at}.x": torch.zeros(0) for at in range(2, 20_000)}))
    change_config(checkpoint, num_hidden_layers=20_000)
    refused(checkpoint, "config.json asks for 20000 layers", "1024 are read at most")


@pytest.mark.parametrize("field", ["num_labels", "_attn_implementation", "dtype", "text_config", "auto_map", "seed"])
@pytest.mark.parametrize("value", [10**9, "flash_attention_2", [], {"a": 1}], ids=str)
def test_what_a_config_says_to_other_libraries_changes_nothing(field: str, value: object, checkpoint: Path) -> None:
    model = load_model(checkpoint)
    change_config(checkpoint, **{field: value})
    same(checkpoint, model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": "melt", "ema_weight": 1%s}' % ("0" * 400), "whole number of 401 digits"),
        ('{"model_type": "melt", "vocab_size": 1%s}' % ("0" * 5000), "whole number of 5001 digits"),
        (f'{{"model_type": "melt", "a": {"[" * 100_000}1{"]" * 100_000}}}', "recursion"),
        (f'{{"model_type": "melt", "a": "{"x" * (1 << 24)}"}}', "no JSON file of its kind is that large"),
    ],
    ids=["400 digits", "5000 digits", "deep", "large"],
)
def test_json_beyond_any_bound_is_refused(text: str, words: str, checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(text)
    refused(checkpoint, "config.json", words)


@torch.no_grad()
def test_a_whole_number_of_more_than_64_bits_is_as_good_as_a_float(checkpoint: Path) -> None:
    change_config(checkpoint, rms_norm_eps=10**30)
    model = load_model(checkpoint)
    change_config(checkpoint, rms_norm_eps=1e30)
    same(checkpoint, model)


def test_a_whole_number_of_hundreds_of_digits_is_refused_in_python_too() -> None:
    with pytest.raises(Exception, match="ema_weight is a whole number of more than 40 digits"):
        MeltConfig(ema_weight=10**400)


def test_names_from_a_checkpoint_cannot_command_a_terminal(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({"\x1b[2Jgone\n": torch.zeros(2)}))
    refused(checkpoint, "unexpected", r"\x1b[2Jgone\n")


DERIVED = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    "model.rotary_emb.original_inv_freq": torch.ones(8),
    "model.rotary_emb.cos_cached": torch.ones(4, 8),
    "freqs_cis": torch.ones(4, 8, dtype=torch.float64),
    "model.causal_mask": torch.ones(4, 4, dtype=torch.bool),
    "model.layers.1.self_attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
    "model.layers.1.self_attn.masked_bias": torch.tensor(-1e9),
    "model.embeddings.position_ids": torch.arange(4)[None],
}


def test_tables_and_masks_that_follow_from_the_config_are_dropped(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    change_tensors(checkpoint, lambda t: t.update(DERIVED))
    same(checkpoint, model)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.bias"])
def test_a_bias_is_no_derived_buffer(name: str, checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda t: t.update({name: torch.zeros(64)}))
    refused(checkpoint, "unexpected", name)


def test_no_tensor_of_a_model_is_taken_for_a_derived_one() -> None:
    names = {name for kind in MODELS for name in small_model(kind).state_dict()}
    assert not [name for name in names if _DERIVED.search(name) or _MASK.search(name)]


NORM = "model.norm.weight"


def change_types(directory: Path) -> None:
    """Half-precision weights beside a norm in float32 that holds what half precision cannot."""

    def change(tensors: dict[str, Tensor]) -> None:
        norm = tensors[NORM].clone()
        norm[:2] = torch.tensor([70000.0, 1 + 2**-20])
        tensors.update({name: value.half() for name, value in tensors.items()})
        tensors[NORM] = norm

    change_tensors(directory, change)


def test_tensors_of_different_types_load_as_one_that_holds_them_all(checkpoint: Path) -> None:
    change_types(checkpoint)
    model = load_model(checkpoint)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.model.norm.weight[:2].tolist() == [70000.0, 1 + 2**-20]
    kept = load_weights(*open_checkpoint(checkpoint))
    assert {weight.dtype for weight in kept.parameters()} == {torch.float16, torch.float32}


def test_values_beyond_the_range_of_a_type_that_is_asked_for_are_refused(checkpoint: Path) -> None:
    change_types(checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values beyond the range of float16"):
        load_model(checkpoint, torch.float16)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        {"rope_type": "spiral", "factor": 2.0},
    ],
    ids=str,
)
def test_a_rope_scaling_that_moves_with_the_length_is_refused(scaling: dict[str, Any], checkpoint: Path) -> None:
    change_config(checkpoint, drop=("rope_parameters",), rope_theta=10000.0, rope_scaling=scaling)
    refused(checkpoint, "rope_scaling", repr(scaling.get("rope_type") or scaling["type"]), "yarn", config=True)

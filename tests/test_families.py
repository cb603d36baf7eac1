"""Looped models that people can download: read from their published layouts, and held to their equations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import family_checkpoints
import numpy as np
import pytest
import torch
from family_checkpoints import CONFIGS, Equations, Family, family
from huggingface_hub.errors import StrictDataclassError
from melt_models import CheckpointError, UnsupportedConfigError
from melt_models.checkpoint import load_model, open_checkpoint, open_weights, read_config
from melt_models.convert import convert, melt_config, melt_state, save_state
from melt_models.start_state import start_noise
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

KINDS = list(CONFIGS)
RAVENS = ["huginn", "llama", "olmo"]
IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
MOST_ERROR = 1e-5


def error(found: torch.Tensor, expected: Any) -> float:
    """Largest difference, relative to the largest expected value."""
    assert tuple(found.shape) == expected.shape
    return float(np.abs(found.double().numpy() - expected).max() / np.abs(expected).max())


def loops_of(made: Family) -> int:
    return made.config.get("num_loops") or made.config["mean_recurrence"]


def zeros(made: Family) -> dict[str, Any]:
    return {"start_state": "zeros"} if made.kind in RAVENS else {}


def load(made: Family, directory: Path, **options: int) -> Any:
    return load_model(made.write(directory / "checkpoint", **options), dtype=torch.float32)


def shared(made: Family, directory: Path, aggregation: str = "last", **fields: Any) -> Any:
    """Convert a checkpoint to a MELT, whose loops share one cache per layer, and load it in float32."""
    source = made.write(directory / "checkpoint")
    config = melt_config(read_config(source), aggregation=aggregation, **fields)
    save_state(config, melt_state(config, open_weights(source, read_config(source))), directory / "melt")
    return load_model(directory / "melt", dtype=torch.float32)


@torch.no_grad()
def run(model: Any, ids: list[int], **arguments: Any) -> Any:
    return model(torch.tensor([ids]), **arguments)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_after_every_loop_are_those_of_the_equations(kind: str, shards: int, tmp_path: Path) -> None:
    made = family(kind)
    model = load(made, tmp_path, shards=shards)
    expected = Equations(made).loops(IDS, loops_of(made))
    for loops, logits in enumerate(expected, 1):
        found = run(model, IDS, num_loops=loops, **zeros(made)).logits[0]
        assert error(found, logits) <= MOST_ERROR, f"loop {loops}"
    every = run(model, IDS, **zeros(made))
    assert error(every.logits[0], expected[-1]) <= MOST_ERROR
    assert every.exit_distribution is None
    first = run(model, IDS, exit_at_step=0, **zeros(made))
    assert error(first.logits[0], expected[0]) <= MOST_ERROR


@pytest.mark.parametrize("kind", RAVENS)
def test_the_loops_start_from_the_seeded_noise_of_their_place(kind: str, tmp_path: Path) -> None:
    made = family(kind)
    model = load(made, tmp_path)
    std = made.config["init_values"]["std"] * made.config["init_values"]["embed_scale"]
    for seed in (0, 12345):
        noise = start_noise(seed, np.arange(len(IDS)), made.config["n_embd"], std).astype(np.float64)
        expected = Equations(made).loops(IDS, loops_of(made), noise)[-1]
        assert error(run(model, IDS, start_seed=seed).logits[0], expected) <= MOST_ERROR
    batch = torch.tensor([IDS, IDS])
    with torch.no_grad():
        both = model(batch, start_seed=torch.tensor([0, 12345])).logits
    assert torch.allclose(both[1], run(model, IDS, start_seed=12345).logits[0], atol=1e-5)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


@pytest.mark.parametrize("pieces", [[4, 4, 3], [1] * len(IDS), [1, 10]])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_pieces_gives_what_it_gives_in_one(kind: str, pieces: list[int], tmp_path: Path) -> None:
    model = load(family(kind), tmp_path)
    arguments = {"start_seed": 7}
    whole, cache, found, at = run(model, IDS, **arguments).logits, DynamicCache(), [], 0
    for piece in pieces:
        found.append(run(model, IDS[at : at + piece], past_key_values=cache, **arguments).logits)
        at += piece
    assert torch.allclose(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-5)
    layers = model.config.num_prelude_layers + model.config.num_coda_layers
    assert len(cache) == layers + model.config.num_hidden_layers * model.config.total_ut_steps


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_loops_that_share_their_caches_leave_the_last_loops_rows(kind: str, chunk: int, tmp_path: Path) -> None:
    made = family(kind)
    model = shared(made, tmp_path, chunk_size=chunk)
    loops = loops_of(made)
    for depth in range(1, loops + 1):
        equations = Equations(made, shared=True)
        pieces = [equations.loops(IDS[at : at + chunk], depth)[-1] for at in range(0, len(IDS), chunk)]
        found = run(model, IDS, num_loops=depth, **zeros(made)).logits[0]
        assert error(found, np.concatenate(pieces)) <= MOST_ERROR, f"{depth} loops"
    cached = run(model, IDS, **zeros(made)).past_key_values
    once = model.config.num_prelude_layers + model.config.num_coda_layers
    assert len(cached) == once + model.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["huginn", "olmo"])
def test_a_prompt_in_chunks_of_a_shared_cache_continues_its_noise(kind: str, tmp_path: Path) -> None:
    model = shared(family(kind), tmp_path, chunk_size=2)
    whole = run(model, IDS[:8], start_seed=3)
    first = run(model, IDS[:4], start_seed=3)
    rest = run(model, IDS[4:8], start_seed=3, past_key_values=first.past_key_values)
    assert torch.allclose(torch.cat((first.logits, rest.logits), dim=1), whole.logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_auto_classes_read_the_published_layout_and_generate(kind: str, tmp_path: Path) -> None:
    directory = family(kind).write(tmp_path, shards=2)
    config = AutoConfig.from_pretrained(directory)
    assert config.model_type == family(kind).config["model_type"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = torch.tensor([IDS])
    tokens = model.generate(prompt, max_new_tokens=6, do_sample=False, start_seed=5, eos_token_id=None)
    ids = list(IDS)
    for _ in range(6):
        ids.append(int(run(model, ids, start_seed=5, use_cache=False).logits[0, -1].argmax()))
    assert tokens[0].tolist() == ids


def test_what_huginns_loader_cannot_do_is_refused(tmp_path: Path) -> None:
    directory = family("huginn").write(tmp_path)
    with pytest.raises(ValueError, match="device_map is not supported"):
        AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    with pytest.raises(OSError, match="nowhere is neither a directory nor a checkpoint"):
        type(load_model(directory)).from_pretrained(tmp_path / "nowhere")
    (directory / "model.safetensors").unlink()
    assert AutoConfig.from_pretrained(directory).norm_layout == "norm_of_sum", "the config alone says enough"


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_reads_back_as_it_was(kind: str, tmp_path: Path) -> None:
    model = load(family(kind), tmp_path)
    model.save_pretrained(tmp_path / "saved")
    for again in (load_model(tmp_path / "saved"), AutoModelForCausalLM.from_pretrained(tmp_path / "saved")):
        assert torch.equal(run(again, IDS).logits, run(model, IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_in_their_stored_type(kind: str, tmp_path: Path) -> None:
    model, weights = open_checkpoint(family(kind).write(tmp_path))
    assert weights.dtype == torch.bfloat16
    assert {weights[name].dtype for name in weights} == {torch.bfloat16}
    assert model.config.tie_word_embeddings == (kind == "huginn")
    loaded = load_model(tmp_path)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_exit_gate_no_exit_probability_can_be_asked_for(kind: str, tmp_path: Path) -> None:
    for model in (load(family(kind), tmp_path), shared(family(kind), tmp_path / "shared")):
        with pytest.raises(ValueError, match="no exit gate and so no exit probability"):
            run(model, IDS, exit_threshold=0.5)
        assert run(model, IDS, exit_threshold=1.0).depth.unique().tolist() == [model.config.total_ut_steps]


def test_only_a_model_with_an_injection_starts_from_zeros(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no token would be read"):
        run(load(family("nanbeige"), tmp_path), IDS, start_state="zeros")
    with pytest.raises(ValueError, match="'sideways'; this model starts from 'noise' or 'zeros'"):
        run(load(family("huginn"), tmp_path), IDS, start_state="sideways")


NANBEIGE_REFUSED = {
    "qk_layernorm": True,
    "emb_neighbor_num": 2,
    "insert_ngram_layer_idx": [0],
    "enable_double_loop_split": True,
    "loop_middle_layers": 2,
    "loop_share_kv": True,
    "enable_hyper_connection": True,
    "enable_mhc": True,
    "enable_depth_attention": True,
    "enable_something_new": True,
    "loop_loss_weights": [1.0],
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 128,
    "layer_types": ["full_attention", "sliding_attention"],
    "num_loops": 0,
    "hidden_act": "gelu",
    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("name", NANBEIGE_REFUSED)
def test_nanbeige_refuses_by_name_what_it_does_not_know(name: str, tmp_path: Path) -> None:
    directory = family("nanbeige", **{name: NANBEIGE_REFUSED[name]}).write(tmp_path)
    with pytest.raises(UnsupportedConfigError, match=name):
        read_config(directory)
    with pytest.raises((ValueError, StrictDataclassError), match=name):
        AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("name", ["num_loops", "rope_theta", "rms_norm_eps", "num_attention_heads"])
def test_nanbeige_needs_what_it_cannot_guess(name: str, tmp_path: Path) -> None:
    made = family("nanbeige")
    made.config[name] = None
    with pytest.raises(UnsupportedConfigError, match=f"the config has no {name}"):
        read_config(made.write(tmp_path))


def test_switches_that_are_off_are_accepted(tmp_path: Path) -> None:
    off = {name: [] if isinstance(value, list) else False for name, value in NANBEIGE_REFUSED.items()}
    kept = {"num_loops", "hidden_act", "rope_scaling", "layer_types"}
    directory = family("nanbeige", **{k: v for k, v in off.items() if k not in kept}).write(tmp_path)
    assert read_config(directory).total_ut_steps == 2


RAVEN_REFUSED = {
    "injection_type": "add",
    "state_init": "zero",
    "initial_state_mode": "skip-adapter",
    "block_class_name": "ParallelBlock",
    "norm_class_name": "LayerNorm",
    "mlp_class_name": "BaseMLP",
    "nonlin_name": "GELU",
    "architecture_class_name": "GPT",
    "bias": True,
    "test_time_noise": 0.1,
    "sliding_window": 64,
}


@pytest.mark.parametrize("kind", RAVENS)
@pytest.mark.parametrize("name", RAVEN_REFUSED)
def test_huginn_refuses_by_name_what_it_does_not_know(name: str, kind: str, tmp_path: Path) -> None:
    directory = family(kind, **{name: RAVEN_REFUSED[name]}).write(tmp_path)
    with pytest.raises(UnsupportedConfigError, match=name):
        read_config(directory)
    with pytest.raises(ValueError, match=name):
        AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("huginn", {"qk_bias": False}, "qk_bias is False, but the tensors attn.qk_bias are there"),
        ("llama", {"qk_bias": True}, "qk_bias is True, but the tensors attn.qk_bias are not there"),
        ("huginn", {"init_values": {"embed_scale": 1.0}}, "Huginn scales embeddings by sqrt"),
        ("llama", {"init_values": {}}, "the config has no embed_scale"),
        ("olmo", {"init_values": {"embed_scale": "1", "std": 0.1}}, "must be numbers"),
        ("olmo", {"rope_theta": None}, "the config has no rope_theta"),
        ("huginn", {"mean_recurrence": None}, "the config has no mean_recurrence"),
        ("huginn", {"mean_recurrence": 0}, "total_ut_steps is 0"),
        ("huginn", {"n_layers_in_prelude": -1}, "num_prelude_layers is -1"),
        ("huginn", {"n_layers_in_coda": 5000}, "asks for 5003 layers"),
    ],
)
def test_what_is_unclear_in_a_huginn_checkpoint_is_refused(
    kind: str, fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    made = family(kind)
    made.config |= fields
    with pytest.raises(CheckpointError, match=words):
        open_checkpoint(made.write(tmp_path))


def test_layers_that_are_neither_huginns_nor_retrofitted_are_refused(tmp_path: Path) -> None:
    made = family("huginn")
    made.tensors["transformer.core_block.0.attn.q_norm.weight"] = torch.ones(64)
    with pytest.raises(UnsupportedConfigError, match="four norms and q_norm"):
        read_config(made.write(tmp_path / "normed"))
    made = family("llama", qk_bias=True)
    made.tensors["transformer.core_block.0.attn.qk_bias"] = torch.ones(2, 1, 4, 16)
    with pytest.raises(UnsupportedConfigError, match="two norms and qk_bias"):
        read_config(made.write(tmp_path / "biased"))


def test_a_retrofitted_config_without_its_tensors_does_not_say_what_it_is(tmp_path: Path) -> None:
    config: Any = AutoConfig.for_model("huginn_raven")
    with pytest.raises(ValueError, match="must lie beside its tensors"):
        type(config).from_dict(dict(family_checkpoints.LLAMA))
    assert type(config).from_dict(dict(family_checkpoints.HUGINN)).norm_layout == "norm_of_sum"


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_too_few_or_too_many_or_of_another_shape_is_named_as_it_is_stored(kind: str, tmp_path: Path) -> None:
    made = family(kind)
    name = next(name for name in made.tensors if name.endswith(("Wqkv.weight", "q_proj.weight")) and ".0." in name)
    kept = made.tensors[name]
    made.tensors[name] = kept[:-16]
    with pytest.raises(CheckpointError, match=f"tensor {name} has shape"):
        open_checkpoint(made.write(tmp_path))
    made.tensors[name] = kept
    made.tensors[f"{name}.bias"] = kept.clone()
    with pytest.raises(CheckpointError, match=f"unexpected tensors: {name}.bias"):
        open_checkpoint(made.write(tmp_path))
    del made.tensors[f"{name}.bias"]
    del made.tensors[name]
    with pytest.raises(CheckpointError, match=f"lacks tensors: {name}"):
        open_checkpoint(made.write(tmp_path))


def test_a_head_that_is_stored_decides_whether_it_is_tied(tmp_path: Path) -> None:
    made = family("huginn")
    made.tensors["lm_head.weight"] = made.tensors["transformer.wte.weight"].clone()
    assert load_model(made.write(tmp_path / "same")).config.tie_word_embeddings
    made.tensors["lm_head.weight"] = made.tensors["transformer.wte.weight"] * 2
    model = load_model(made.write(tmp_path / "other"), dtype=torch.float32)
    assert not model.config.tie_word_embeddings
    expected = Equations(made).loops(IDS, 3)[-1] * 2
    assert error(run(model, IDS, start_state="zeros").logits[0], expected) <= MOST_ERROR
    untied = family("llama", tie_embeddings=True, tie_word_embeddings=True).write(tmp_path / "llama")
    assert not load_model(untied).config.tie_word_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_convert_puts_the_latent_gate_into_the_cores_layers_alone(kind: str, tmp_path: Path) -> None:
    made = family(kind)
    source = made.write(tmp_path / "source")
    config = convert(source, tmp_path / "melt", chunk_size=4)
    model = load_model(tmp_path / "melt", dtype=torch.float32)
    gated = {name.rsplit(".latent_gate", 1)[0] for name in model.state_dict() if "latent_gate" in name}
    assert gated == {f"model.layers.{layer}" for layer in range(config.num_hidden_layers)}
    assert config.untrained == ["latent_gate"]
    # Whatever the gate, the first loop's latent is its input: one loop equals the source's.
    one = Equations(made, shared=True)
    expected = np.concatenate([one.loops(IDS[at : at + 4], 1)[-1] for at in range(0, len(IDS), 4)])
    assert error(run(model, IDS, num_loops=1, **zeros(made)).logits[0], expected) <= MOST_ERROR
    model.generate(torch.tensor([IDS]), max_new_tokens=3, do_sample=False)


WRONG: list[Any] = [None, True, False, -1, 0, 3, 2.5, 1e400, "x", "", [], [1], {}, {"a": 1}, 10**30]


@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_config_is_refused_in_one_sentence_or_read(kind: str, tmp_path: Path) -> None:
    made = family(kind)
    directory, kept = made.write(tmp_path), dict(made.config)
    sentences = []
    for name in kept:
        for value in WRONG:
            (directory / "config.json").write_text(json.dumps(kept | {name: value}))
            try:
                open_checkpoint(directory)
            except CheckpointError as refusal:
                sentences.append(str(refusal))
    assert len(sentences) > 100
    assert all("\n" not in sentence and "Error" not in sentence for sentence in sentences)

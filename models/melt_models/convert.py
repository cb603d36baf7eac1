"""Conversion of a looped or Llama-shaped checkpoint to a MELT checkpoint whose gates are untrained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig

from .aggregation import GATE_BIAS_INIT
from .atomic import new_directory
from .checkpoint import (
    CONFIG_ERRORS,
    MODELS,
    MOST_TOKENIZER_BYTES,
    Weights,
    check_sizes,
    check_tensors,
    expected_shapes,
    innermost,
    meta_model,
    open_weights,
    read_config,
    read_json,
)
from .configuration import LoopedConfig, LoopLMConfig, MeltConfig, check_fields
from .errors import CheckpointError, UnsupportedConfigError
from .remote_code import add_code

# Files that are copied unchanged.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "example_prompt.txt",
)
TOKENIZER, _GENERATION = "tokenizer.json", "generation_config.json"
_SPECIAL = ("pad", "bos", "eos")
_MOST_ENDS = 256  # tokens that end a text; a runtime reads no more
# sigmoid(-30) is 1e-13: no token leaves early at an untrained exit gate.
_CLOSED_EXIT_BIAS = -30.0


def melt_config(
    source: PreTrainedConfig, *, loops: int | None = None, chunk_size: int = 128, **fields: Any
) -> MeltConfig:
    """Return the MELT configuration for a source's weights; ``fields`` are further fields of MeltConfig.

    Raises UnsupportedConfigError.
    """
    untrained = ["latent_gate"] if "gate" in str(fields.get("aggregation", "gate")) else []
    if isinstance(source, LlamaConfig):
        if source.attention_bias or source.mlp_bias:
            raise UnsupportedConfigError("the Llama checkpoint has biases, which MELT's layers do not")
        untrained.append("early_exit_gate")
        layout, default_loops = "pre", 1
    elif isinstance(source, LoopLMConfig):
        layout, default_loops = source.norm_layout, source.total_ut_steps
    else:
        raise UnsupportedConfigError(
            f"model_type {source.model_type!r} cannot become a MELT; looped models and 'llama' can"
        )
    shared = [name for name in LoopedConfig.__annotations__ if hasattr(source, name)]
    values = {name: getattr(source, name) for name in shared if name not in ("keys_to_ignore_at_inference",)}
    values.pop("default_theta", None)
    values.update(
        norm_layout=layout,
        total_ut_steps=default_loops if loops is None else loops,
        chunk_size=chunk_size,
        untrained=untrained,
        **fields,
    )
    try:
        return MeltConfig(**values)
    except CONFIG_ERRORS as error:
        raise UnsupportedConfigError(innermost(error)) from error


def melt_state(config: MeltConfig, weights: Weights) -> dict[str, Tensor]:
    """Return all tensors of a MELT: the source's own, and initial values for the parts it lacks, in the embedding's
    type.

    The latent gate starts with zero weights and a bias of -2, so z = 0.12: keys and values stay close to those of the
    last loop, which a LoopLM's projections were trained for. Raises CheckpointError.
    """
    check_sizes(config, weights)
    expected = expected_shapes(meta_model(config))
    fresh = {name for name in expected if any(f".{part}." in name for part in config.untrained)}
    check_tensors(
        weights, {name: shape for name, shape in expected.items() if name not in fresh}, tied=config.tie_word_embeddings
    )
    dtype = weights["model.embed_tokens.weight"].dtype
    state = {}
    for name, shape in expected.items():
        if name not in fresh:
            state[name] = weights.tensor(name)
        elif name.endswith("latent_gate.bias"):
            state[name] = torch.full(shape, GATE_BIAS_INIT, dtype=dtype)
        elif name.endswith("early_exit_gate.bias"):
            state[name] = torch.full(shape, _CLOSED_EXIT_BIAS, dtype=dtype)
        else:
            state[name] = torch.zeros(shape, dtype=dtype)
    return state


def convert(
    source: Path,
    output: Path,
    *,
    loops: int | None = None,
    chunk_size: int = 128,
    force: bool = False,
    remote_code: bool = False,
) -> MeltConfig:
    """Write the MELT checkpoint of ``source`` to ``output``. Raises CheckpointError, TargetExistsError.

    ``remote_code``: with a modelling file, so that it opens where this package is not installed.
    """
    published = read_config(source)
    config = melt_config(published, loops=loops, chunk_size=chunk_size)
    check_companions(source, config)
    weights = open_weights(source, published)
    with new_directory(output, force=force) as build:
        save_state(config, melt_state(config, weights), build)
        for name in COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, build / name)
        if remote_code:
            add_code(MODELS[config.model_type], build)
    return config


def check_companions(directory: Path, config: LoopedConfig) -> None:
    """Check the files that are copied with a checkpoint of this configuration.

    Raises CheckpointError for invalid JSON, for end tokens that are invalid or outside the vocabulary, and for a
    tokenizer with more tokens than the embedding has rows.
    """
    found = {
        name: read_json(directory / name, *([MOST_TOKENIZER_BYTES] if name == TOKENIZER else []))
        for name in COMPANIONS
        if _is_json(directory / name)
    }
    _check_ends(directory, found.get(_GENERATION, {}), config)
    rows = config.vocab_size
    most = max(_token_ids(found.get(TOKENIZER, {})), default=-1)
    if most >= rows:
        raise CheckpointError(
            f"{directory / TOKENIZER} has token ids up to {most:,}, the model rows for {rows:,}: they do not belong "
            f"together, or tokens were added; then let transformers give the model rows for them, with "
            f"resize_token_embeddings({most + 1}), and save both"
        )


def _check_ends(directory: Path, generation: Mapping[str, Any], config: LoopedConfig) -> None:
    """Check the special tokens of generation_config.json, or else of the configuration.

    Raises CheckpointError for values that are not token ids, and for an end token outside the vocabulary.
    """
    file, ends = directory / _GENERATION, generation.get("eos_token_id")
    try:
        check_fields({f"{part}_token_id": generation.get(f"{part}_token_id") for part in _SPECIAL})
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if ends is None:
        file, ends = directory / "config.json", config.eos_token_id
    ids = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if len(ids) > _MOST_ENDS:
        raise CheckpointError(f"{file}: eos_token_id is a list of {len(ids):,} tokens; {_MOST_ENDS} can end a text")
    outside = next((one for one in ids if one >= config.vocab_size), None)
    if outside is not None:
        raise CheckpointError(
            f"{file}: eos_token_id is {outside}, which the model cannot say: its vocabulary has {config.vocab_size:,} "
            "tokens"
        )


def _is_json(path: Path) -> bool:
    return path.suffix == ".json" and path.is_file()


def _token_ids(tokenizer: Mapping[str, Any]) -> Iterator[int]:
    """Yield the token ids of a parsed tokenizer.json, whatever its model."""
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):
        yield len(vocab) - 1
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(added if isinstance(added, list) else ())]
    for one in ids:
        value = one.get("id") if isinstance(one, dict) else one
        if isinstance(value, int):
            yield value


def save_state(config: MeltConfig, state: dict[str, Tensor], directory: Path) -> None:
    """Write config.json and the tensors as (sharded) safetensors, without a second copy in memory.

    Every tensor keeps its type. The config's dtype is the narrowest that can hold all of them.
    """
    model = meta_model(config)
    if config.tie_word_embeddings:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(directory)
    path = directory / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    dtype = str(reduce(torch.promote_types, {value.dtype for value in state.values()})).removeprefix("torch.")
    if content["dtype"] != dtype:
        path.write_text(json.dumps({**content, "dtype": dtype}, indent=2, sort_keys=True) + "\n", encoding="utf-8")

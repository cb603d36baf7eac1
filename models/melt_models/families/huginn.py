"""Huginn and the models retrofitted with its recurrence (``model_type: huginn_raven``), by three kinds of layer.

- ``huginn`` (Huginn-0125): norms of the residual sum, biases of queries and keys, RoPE in adjacent pairs, embeddings
  scaled by sqrt(d), the final norm also before the coda.
- ``llama`` (retrofitted TinyLlama and Llama 3.2): Llama's layers and RoPE; no norm before the coda.
- ``olmo`` (retrofitted OLMo 2): norms of the branches, RMS norm of the whole queries and keys; otherwise as ``llama``.

All have a prelude, a core with a linear injection and no norm between loops, a coda, and start from noise. The config
does not name its kind: the tensors decide, and what does not fit together is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM

from ..configuration import check_fields
from ..errors import UnsupportedConfigError, shown
from ..loading import HEAD, check_sizes, check_tensors, expected_shapes, load_weights, on_meta
from ..looplm import LoopLMForCausalLM
from ..tensors import Part, Weights, check_names
from .published import PublishedConfig, flag, needed, refuse_other, refuse_set

_KNOWN = {
    "architecture_class_name": "RecurrentGPT",
    "block_class_name": "SandwichBlock",
    "norm_class_name": "RMSNorm_llama",
    "mlp_class_name": "GatedMLP",
    "nonlin_name": "SiLU",
    "injection_type": "linear",
    "state_init": "like-init",
    "initial_state_mode": "random",
    "bias": False,
}
_REFUSED = {"sliding_window": "attention over a sliding window"}
_OF_TRANSFORMERS = ("device_map", "quantization_config", "load_in_8bit", "load_in_4bit")
_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_TABLE = "transformer.wte.weight"
# What each kind changes in the core's configuration.
_KINDS: dict[str, dict[str, Any]] = {
    "huginn": {"norm_layout": "norm_of_sum", "rotary_pairs": "adjacent", "norm_before_coda": True},
    "llama": {"norm_layout": "pre"},
    "olmo": {"norm_layout": "post_branch", "qk_norm": True},
}
# The norms of a layer in the order of their numbers, norm_1 first.
_NORMS = {
    "norm_of_sum": (
        "input_layernorm",
        "input_layernorm_2",
        "post_attention_layernorm",
        "post_attention_layernorm_2",
    ),
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post_branch": ("input_layernorm_2", "post_attention_layernorm_2"),
}
_STAGES = {"prelude": "prelude_layers", "core_block": "layers", "coda": "coda_layers"}


@strict
class HuginnConfig(PublishedConfig):
    """Configuration of Huginn and the retrofitted models."""

    model_type: ClassVar[str] = "huginn_raven"

    @classmethod
    def core_fields(cls, content: Mapping[str, Any], directory: Path | None) -> dict[str, Any]:
        refuse_other(content, _KNOWN)
        refuse_set(content, _REFUSED)
        if content.get("test_time_noise"):
            raise UnsupportedConfigError(
                f"test_time_noise is {shown(content['test_time_noise'])}; noise inside the loops is not supported"
            )
        weights = Weights(directory) if directory is not None else None
        kind = _kind(content, weights)
        d, heads = needed(content, "n_embd", "hidden_size"), needed(content, "n_heads", "num_attention_heads")
        check_fields({"hidden_size": d})
        scale, std = _scales(content, kind, d)
        retrofitted = kind != "huginn"
        positions = content.get("max_position_embeddings") if retrofitted else None
        return {
            **_KINDS[kind],
            **(_retrofitted_rope(content) if retrofitted else {"rope_theta": needed(content, "rope_base")}),
            "vocab_size": needed(content, "padded_vocab_size", "vocab_size"),
            "hidden_size": d,
            "intermediate_size": needed(content, "intermediate_size"),
            "num_attention_heads": heads,
            "num_key_value_heads": content.get("num_key_value_heads"),
            "head_dim": content.get("head_dim"),
            "rms_norm_eps": needed(content, "norm_eps"),
            "max_position_embeddings": needed(content, "block_size") if positions is None else positions,
            "num_prelude_layers": needed(content, "n_layers_in_prelude"),
            "num_hidden_layers": needed(content, "n_layers_in_recurrent_block"),
            "num_coda_layers": needed(content, "n_layers_in_coda"),
            "total_ut_steps": needed(content, "mean_recurrence"),
            "qk_bias": flag(content, "qk_bias"),
            "tie_word_embeddings": _tied(content, weights),
            "injection": "linear",
            "norm_between_loops": False,
            "embedding_scale": scale,
            "start_state": "noise",
            "start_std": std,
            "exit_gate": False,
        }

    def published_shapes(self, expected: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        shapes = self._parts(expected)[1]
        return {name: shape for name, shape in shapes.items() if name != HEAD or not self.tie_word_embeddings}

    def rename(self, weights: Weights, expected: Mapping[str, tuple[int, ...]]) -> Weights:
        parts, shapes = self._parts(expected)
        check_names(weights, shapes, {HEAD} if self.tie_word_embeddings else ())
        if self.tie_word_embeddings and HEAD in weights:
            parts[HEAD] = Part(HEAD, 0, self.vocab_size, weights[HEAD].shape)
        return weights.renamed(parts)

    def _parts(self, expected: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Part], dict[str, tuple[int, ...]]]:
        """Return where each of the model's tensors is stored, and the shapes of the stored tensors."""
        parts: dict[str, Part] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for stored, names, lead in self._layout():
            names = tuple(name for name in names if name in expected)
            if not names:
                continue
            first, rest = 0, (expected[names[0]][1:] if lead is None else lead)
            for name in names:
                rows = 1 if lead is not None else expected[name][0]
                parts[name] = Part(stored, first, first + rows, expected[name])
                first += rows
            shapes[stored] = (first, *rest)
        return parts, shapes

    def _layout(self) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...] | None]]:
        """Yield each stored tensor, the model's tensors that follow each other in its rows, and for a tensor that holds
        one of them in each row the shape of a row."""
        yield _TABLE, ("model.embed_tokens.weight",), None
        yield "transformer.adapter.weight", ("model.adapter.weight",), None
        yield "transformer.ln_f.weight", ("model.norm.weight",), None
        yield HEAD, (HEAD,), None
        counts = (self.num_prelude_layers, self.num_hidden_layers, self.num_coda_layers)
        for (stage, own), count in zip(_STAGES.items(), counts, strict=True):
            for layer in range(count):
                place, name = f"transformer.{stage}.{layer}", f"model.{own}.{layer}"
                attention, mlp = f"{name}.self_attn", f"{name}.mlp"
                qkv = tuple(f"{attention}.{part}_proj.weight" for part in "qkv")
                yield f"{place}.attn.Wqkv.weight", qkv, None
                biases = (f"{attention}.q_proj.bias", f"{attention}.k_proj.bias")
                yield f"{place}.attn.qk_bias", biases, (1, self.num_attention_heads, self.head_dim)
                yield f"{place}.attn.proj.weight", (f"{attention}.o_proj.weight",), None
                yield f"{place}.attn.q_norm.weight", (f"{attention}.q_norm.weight",), None
                yield f"{place}.attn.k_norm.weight", (f"{attention}.k_norm.weight",), None
                yield f"{place}.mlp.fc.weight", (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), None
                yield f"{place}.mlp.proj.weight", (f"{mlp}.down_proj.weight",), None
                for number, norm in enumerate(_NORMS[self.norm_layout], 1):
                    yield f"{place}.norm_{number}.weight", (f"{name}.{norm}.weight",), None


def _kind(content: Mapping[str, Any], weights: Weights | None) -> str:
    """Decide the kind of layer by tensors and flags. Raises UnsupportedConfigError for what does not fit together."""
    biased = flag(content, "qk_bias")
    if weights is None:
        if biased:
            return "huginn"
        raise UnsupportedConfigError(
            "the config does not say whether its layers are Huginn's, Llama's or OLMo's: it must lie beside its tensors"
        )
    ends = {name.split(".", 3)[3] for name in weights if name.startswith("transformer.core_block.0.")}
    four, normed, has_bias = "norm_4.weight" in ends, "attn.q_norm.weight" in ends, "attn.qk_bias" in ends
    if not ends:
        raise UnsupportedConfigError(f"{weights.directory} has no tensors transformer.core_block.0.*")
    if has_bias != biased:
        there = "there" if has_bias else "not there"
        raise UnsupportedConfigError(
            f"qk_bias is {shown(content.get('qk_bias'))}, but the tensors attn.qk_bias are {there}"
        )
    if (four and normed) or (biased and not four):
        mixed = "q_norm" if normed else "qk_bias"
        count = "four" if four else "two"
        raise UnsupportedConfigError(
            f"layers with {count} norms and {mixed} are neither Huginn's nor a retrofitted Llama's or OLMo's"
        )
    return "huginn" if four else "olmo" if normed else "llama"


def _scales(content: Mapping[str, Any], kind: str, d: int) -> tuple[float, float]:
    """Return the embedding's scale and the standard deviation of the start state, which has the same scale.

    A retrofitted model keeps the deviation of the Huginn config that it was made from.
    """
    values = content.get("init_values")
    values = values if isinstance(values, dict) else {}
    given = [values.get(name) for name in ("embed_scale", "std")]
    if any(isinstance(one, bool) or not isinstance(one, int | float | None) for one in given):
        raise UnsupportedConfigError(f"init_values is {shown(values)}; embed_scale and std must be numbers")
    if kind != "huginn":
        scale, std = (needed(values, name) for name in ("embed_scale", "std"))
        return float(scale), float(scale) * float(std)
    scale = math.sqrt(d)
    if given[0] is not None and not math.isclose(given[0], scale, rel_tol=1e-4):
        raise UnsupportedConfigError(
            f"init_values.embed_scale is {given[0]}, but Huginn scales embeddings by sqrt(n_embd) = {scale:.4f}"
        )
    return scale, scale * float(math.sqrt(2 / (5 * d)) if given[1] is None else given[1])


def _retrofitted_rope(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the RoPE of a retrofitted model: the one inherited, not ``rope_base``, which stays from Huginn."""
    needed(content, "rope_theta", "rope_parameters")
    names = ("rope_theta", "rope_scaling", "rope_parameters")
    return {name: content[name] for name in names if content.get(name) is not None}


def _tied(content: Mapping[str, Any], weights: Weights | None) -> bool:
    """Whether head and embedding are one tensor: by the config's flags, unless two different tensors are stored."""
    flagged = flag(content, "tie_embeddings") or flag(content, "tie_word_embeddings")
    if not flagged or weights is None or HEAD not in weights or _TABLE not in weights:
        return flagged
    same = weights[HEAD].shape == weights[_TABLE].shape
    return same and torch.equal(weights.tensor(HEAD), weights.tensor(_TABLE))


def _local(name: Any, options: Mapping[str, Any]) -> Path:
    """Return a checkpoint's directory; a name on the hub is downloaded, without code or pickles. Raises OSError."""
    if Path(name).is_dir():
        return Path(name)
    asked = {key: options[key] for key in _OF_THE_HUB if options.get(key) is not None}
    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json"], **asked))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"{name} is neither a directory nor a checkpoint that can be had from the hub: {error}"
        ) from error


class HuginnForCausalLM(LoopLMForCausalLM):
    """Huginn, or a model retrofitted with its recurrence, with a language-modelling head.

    ``start_seed`` seeds the noise that the loops start from; ``start_state="zeros"`` replaces it.
    """

    config_class = HuginnConfig

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, dtype: Any = None, **kwargs: Any
    ) -> Any:
        """Load a checkpoint, published or saved by this package: a directory, or a name on the hub.

        ``dtype`` None: the stored one. Raises CheckpointError, OSError for a name that cannot be had, and ValueError
        for ``device_map`` and its like with the published layout.
        """
        directory = _local(pretrained_model_name_or_path, kwargs)
        weights = Weights(directory)
        config = HuginnConfig.from_pretrained(directory) if config is None else config
        asked = next((name for name in _OF_TRANSFORMERS if kwargs.get(name) is not None), None)
        if config.is_own_layout(weights):
            return super().from_pretrained(directory, *args, config=config, dtype=dtype, **kwargs)
        if asked is not None:
            raise ValueError(
                f"{asked} is not supported for Huginn's own layout; load the model, then move it with .to()"
            )
        dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
        check_sizes(config, weights)
        model = on_meta(cls, config)
        weights = config.rename(weights, expected_shapes(model))
        check_tensors(weights, expected_shapes(model), tied=config.tie_word_embeddings)
        return load_weights(model, weights, weights.dtype if dtype in (None, "auto") else dtype)


AutoConfig.register("huginn_raven", HuginnConfig, exist_ok=True)
AutoModelForCausalLM.register(HuginnConfig, HuginnForCausalLM, exist_ok=True)

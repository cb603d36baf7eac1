"""Nanbeige4.2 (``model_type: nanbeige``): a Llama whose layers run ``num_loops`` times, with caches of every loop.

The final norm follows every loop, or with ``skip_loop_final_norm`` only the last. There is no exit gate. Tensor names
are Llama's, which are also this package's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, AutoModelForCausalLM

from ..configuration import MOST_LOOPS
from ..errors import UnsupportedConfigError, shown
from ..looplm import LoopLMForCausalLM
from .published import PublishedConfig, flag, is_set, needed, refuse_set

_REFUSED = {
    "qk_layernorm": "a norm of queries and keys",
    "emb_neighbor_num": "an embedding of neighbouring tokens",
    "emb_split_num": "an embedding of neighbouring tokens",
    "insert_ngram_layer_idx": "an n-gram embedding inside the layers",
    "ngram_insert_all_layers": "an n-gram embedding inside the layers",
    "enable_double_loop_split": "looping over the middle layers only",
    "loop_middle_layers": "looping over the middle layers only",
    "loop_share_kv": "reading the first loop's keys and values in all loops",
    "enable_hyper_connection": "hyper-connections between layers",
    "enable_mhc": "hyper-connections between layers",
    "enable_h_res_identity": "hyper-connections between layers",
    "enable_depth_attention": "attention over earlier layers",
    "loop_loss_weights": "a number of loops that follows from training weights",
    "attention_bias": "a bias in attention",
    "mlp_bias": "a bias in the MLP",
    "sliding_window": "attention over a sliding window",
}
_SAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
_IF_THERE = (
    "num_key_value_heads",
    "hidden_act",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
)


@strict
class NanbeigeConfig(PublishedConfig):
    """Nanbeige's configuration."""

    model_type: ClassVar[str] = "nanbeige"

    @classmethod
    def core_fields(cls, content: Mapping[str, Any], directory: Path | None) -> dict[str, Any]:
        refuse_set(content, _REFUSED)
        switches = [name for name, value in content.items() if name.startswith("enable_") and is_set(value)]
        if switches:
            raise UnsupportedConfigError(f"{switches[0]} is {shown(content[switches[0]])}: it is not known here")
        kinds = content.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise UnsupportedConfigError(f"layer_types is {shown(kinds)}; only 'full_attention' is supported")
        loops = needed(content, "num_loops")
        if isinstance(loops, bool) or not isinstance(loops, int) or not 1 <= loops <= MOST_LOOPS:
            raise UnsupportedConfigError(
                f"num_loops is {shown(loops)}; it must be a whole number from 1 to {MOST_LOOPS}"
            )
        needed(content, "rope_theta", "rope_parameters")
        return {
            **{name: needed(content, name) for name in _SAME},
            **{name: content[name] for name in _IF_THERE if content.get(name) is not None},
            "head_dim": content.get("head_dim") or content.get("kv_channels"),
            "tie_word_embeddings": flag(content, "tie_word_embeddings"),
            "total_ut_steps": loops,
            "norm_layout": "pre",
            "norm_between_loops": not flag(content, "skip_loop_final_norm"),
            "exit_gate": False,
        }


class NanbeigeForCausalLM(LoopLMForCausalLM):
    """Nanbeige with a language-modelling head. ``exit_at_step`` chooses the loop that the head reads."""

    config_class = NanbeigeConfig


AutoConfig.register("nanbeige", NanbeigeConfig, exist_ok=True)
AutoModelForCausalLM.register(NanbeigeConfig, NanbeigeForCausalLM, exist_ok=True)

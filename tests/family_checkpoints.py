"""Random checkpoints of the looped families in their published layouts, and what they compute, from the equations.

The forward is numpy in float64 and shares no code with the models. Tensors are named as on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

Array = NDArray[np.float64]
Caches = dict[tuple[Any, ...], list[Array]]

NANBEIGE: dict[str, Any] = {
    "architectures": ["NanbeigeForCausalLM"],
    "model_type": "nanbeige",
    "auto_map": {"AutoModelForCausalLM": "modeling_nanbeige.NanbeigeForCausalLM"},
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rope_theta": 70000000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "num_loops": 2,
    "loop_loss_weights": [],
    "skip_loop_final_norm": False,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
HUGINN: dict[str, Any] = {
    "architecture_class_name": "RecurrentGPT",
    "architectures": ["RavenForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "raven_modeling_minimal.RavenForCausalLM"},
    "bias": False,
    "block_class_name": "SandwichBlock",
    "block_size": 256,
    "head_dim": 16,
    "init_values": {"embed_scale": 8.0, "embedding": 0.0790569, "out_proj": 0.01, "std": 0.07905694150420949},
    "injection_type": "linear",
    "intermediate_size": 80,
    "mean_recurrence": 3,
    "mlp_class_name": "GatedMLP",
    "model_type": "huginn_raven",
    "n_embd": 64,
    "n_heads": 4,
    "n_layers": 4,
    "n_layers_in_coda": 1,
    "n_layers_in_prelude": 1,
    "n_layers_in_recurrent_block": 2,
    "nonlin_name": "SiLU",
    "norm_class_name": "RMSNorm_llama",
    "norm_eps": 1e-06,
    "num_key_value_heads": 4,
    "padded_vocab_size": 50,
    "padding_multiple": 4096,
    "qk_bias": True,
    "rope_base": 50000,
    "state_init": "like-init",
    "test_time_noise": 0,
    "test_time_noise_type": "fixed",
    "tie_embeddings": True,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 50,
}
_RETROFITTED: dict[str, Any] = HUGINN | {
    "init_values": {"embed_scale": 1.0, "embedding": 0.0087, "out_proj": 0.0005, "std": 0.008703882797784892},
    "n_layers_in_prelude": 2,
    "n_layers_in_coda": 2,
    "n_layers_in_recurrent_block": 1,
    "norm_eps": 1e-05,
    "num_key_value_heads": 2,
    "qk_bias": False,
    "rope_base": 500000.0,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_embeddings": False,
}
LLAMA: dict[str, Any] = _RETROFITTED | {
    "rope_scaling": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
}
OLMO: dict[str, Any] = _RETROFITTED | {"rope_theta": 500000.0}
CONFIGS = {
    "nanbeige": NANBEIGE,
    "nanbeige_skip": NANBEIGE | {"skip_loop_final_norm": True, "num_loops": 3},
    "huginn": HUGINN,
    "llama": LLAMA,
    "olmo": OLMO,
}


@dataclass
class Family:
    """A random model: its config.json and tensors, in bfloat16, under published names."""

    kind: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def write(self, directory: Path, *, shards: int = 1) -> Path:
        """Write config.json and the tensors in one file or in several."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        names = sorted(self.tensors)
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        files = files if shards > 1 else ["model.safetensors"]
        for i, file in enumerate(files):
            save_file({name: self.tensors[name].contiguous() for name in names[i::shards]}, directory / file)
        if shards > 1:
            index = {name: files[i % shards] for i, name in enumerate(names)}
            (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        return directory

    def array(self, name: str) -> Array:
        return self.tensors[name].to(torch.float64).numpy()


def family(kind: str, **fields: Any) -> Family:
    """Make a random model of a family. ``fields`` replace those of its config."""
    made = Family(kind, CONFIGS[kind] | fields)
    draw = np.random.default_rng(0)

    def put(name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> None:
        made.tensors[name] = torch.from_numpy(mean + std * draw.standard_normal(shape)).to(torch.bfloat16)

    if kind.startswith("nanbeige"):
        _nanbeige_tensors(made.config, put)
    else:
        _raven_tensors(made, put)
    return made


def _nanbeige_tensors(config: dict[str, Any], put: Any) -> None:
    d, ffn, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    put("model.embed_tokens.weight", config["vocab_size"], d)
    put("lm_head.weight", config["vocab_size"], d)
    put("model.norm.weight", d, mean=1)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for name, rows in (("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)):
            put(f"{at}.self_attn.{name}_proj.weight", rows, d)
        put(f"{at}.self_attn.o_proj.weight", d, heads * size)
        put(f"{at}.mlp.gate_proj.weight", ffn, d)
        put(f"{at}.mlp.up_proj.weight", ffn, d)
        put(f"{at}.mlp.down_proj.weight", d, ffn)
        put(f"{at}.input_layernorm.weight", d, mean=1)
        put(f"{at}.post_attention_layernorm.weight", d, mean=1)


def _raven_tensors(made: Family, put: Any) -> None:
    config, huginn = made.config, made.kind == "huginn"
    d, ffn, size = config["n_embd"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["n_heads"], config["num_key_value_heads"]
    put("transformer.wte.weight", config["vocab_size"], d)
    put("transformer.adapter.weight", d, 2 * d)
    put("transformer.ln_f.weight", d, mean=1)
    if huginn:
        made.tensors["freqs_cis"] = torch.zeros(1, config["block_size"], 1, size // 2, 2)
    else:
        put("lm_head.weight", config["vocab_size"], d)
    counts = {
        "prelude": config["n_layers_in_prelude"],
        "core_block": config["n_layers_in_recurrent_block"],
        "coda": config["n_layers_in_coda"],
    }
    for stage, count in counts.items():
        for layer in range(count):
            at = f"transformer.{stage}.{layer}"
            put(f"{at}.attn.Wqkv.weight", (heads + 2 * kv_heads) * size, d)
            put(f"{at}.attn.proj.weight", d, heads * size)
            put(f"{at}.mlp.fc.weight", 2 * ffn, d)
            put(f"{at}.mlp.proj.weight", d, ffn)
            for norm in range(1, 5 if huginn else 3):
                put(f"{at}.norm_{norm}.weight", d, mean=1)
            if huginn:
                put(f"{at}.attn.qk_bias", 2, 1, heads, size)
            if made.kind == "olmo":
                put(f"{at}.attn.q_norm.weight", heads * size, mean=1)
                put(f"{at}.attn.k_norm.weight", kv_heads * size, mean=1)


def norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def frequencies(config: dict[str, Any], size: int, *, base: float) -> Array:
    """RoPE's frequencies (size / 2,), with Llama 3's scaling if the config has it."""
    plain = base ** -(np.arange(0, size, 2) / size)
    scaling = config.get("rope_scaling")
    if not scaling:
        return plain
    length, low, high = (
        scaling[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = length * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (blend + (1 - blend) / scaling["factor"])


def rope(x: Array, positions: NDArray[Any], rates: Array, *, adjacent: bool) -> Array:
    """Rotate x (tokens, heads, size)."""
    turn = np.exp(1j * positions[:, None, None] * rates)
    if adjacent:
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((z.real, z.imag), -1).reshape(x.shape)
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate((z.real, z.imag), -1)


def attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention. q: (new, heads, size), the last tokens; k, v: (all, kv_heads, size) -> (new, heads * size)."""
    new, heads, size = q.shape
    groups, total = heads // k.shape[1], k.shape[0]
    out = np.zeros_like(q)
    for token in range(new):
        seen = total - new + token + 1
        for head in range(heads):
            scores = k[:seen, head // groups] @ q[token, head] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[token, head] = weights / weights.sum() @ v[:seen, head // groups]
    return out.reshape(new, -1)


class Equations:
    """The forward of one sequence, piece by piece. ``shared``: all loops write one cache per layer of the core."""

    def __init__(self, made: Family, *, shared: bool = False):
        self.made, self.config, self.shared = made, made.config, shared
        self.caches: Caches = {}
        self.length = 0

    def loops(self, ids: list[int], loops: int, noise: Array | None = None) -> list[Array]:
        """Run the next tokens. Returns the logits (tokens, vocab) that the head reads after each loop; only the last
        loop's coda stays in the coda's caches."""
        self.positions = self.length + np.arange(len(ids))
        states = list(
            self._nanbeige(ids, loops) if self.made.kind.startswith("nanbeige") else self._raven(ids, loops, noise)
        )
        self.length += len(ids)
        return states

    def _keep(self, cache: tuple[Any, ...], k: Array, v: Array) -> tuple[Array, Array]:
        """Write the tokens' keys and values and return all that the tokens may see."""
        kept = self.caches.setdefault(cache, [k[:0], v[:0]])
        self.caches[cache] = [np.concatenate((old[: self.length], new)) for old, new in zip(kept, (k, v), strict=True)]
        return self.caches[cache][0], self.caches[cache][1]

    def _nanbeige(self, ids: list[int], loops: int) -> Iterator[Array]:
        config, array, eps = self.config, self.made.array, self.config["rms_norm_eps"]
        size = config["head_dim"]
        rates = frequencies(config, size, base=config["rope_theta"])
        h = array("model.embed_tokens.weight")[ids]
        for loop in range(loops):
            for layer in range(config["num_hidden_layers"]):
                at = f"model.layers.{layer}"
                a = norm(h, array(f"{at}.input_layernorm.weight"), eps)
                q, k, v = (
                    (a @ array(f"{at}.self_attn.{part}_proj.weight").T).reshape(len(ids), -1, size) for part in "qkv"
                )
                q, k = (rope(x, self.positions, rates, adjacent=False) for x in (q, k))
                keys, values = self._keep((layer, 0 if self.shared else loop), k, v)
                h = h + attention(q, keys, values) @ array(f"{at}.self_attn.o_proj.weight").T
                m = norm(h, array(f"{at}.post_attention_layernorm.weight"), eps)
                gate, up = (m @ array(f"{at}.mlp.{part}_proj.weight").T for part in ("gate", "up"))
                h = h + (silu(gate) * up) @ array(f"{at}.mlp.down_proj.weight").T
            normed = norm(h, array("model.norm.weight"), eps)
            if not config["skip_loop_final_norm"]:
                h = normed
            yield normed @ array("lm_head.weight").T

    def _raven(self, ids: list[int], loops: int, noise: Array | None) -> Iterator[Array]:
        config, array, huginn = self.config, self.made.array, self.made.kind == "huginn"
        d, eps = config["n_embd"], config["norm_eps"]
        head = array("transformer.wte.weight" if huginn else "lm_head.weight")
        e = array("transformer.wte.weight")[ids] * (math.sqrt(d) if huginn else 1.0)
        for layer in range(config["n_layers_in_prelude"]):
            e = self._block(f"transformer.prelude.{layer}", e, ("prelude", layer))
        s = np.zeros_like(e) if noise is None else noise
        for loop in range(loops):
            s = np.concatenate((s, e), -1) @ array("transformer.adapter.weight").T
            for layer in range(config["n_layers_in_recurrent_block"]):
                cache = ("core", layer, 0 if self.shared else loop)
                s = self._block(f"transformer.core_block.{layer}", s, cache)
            x = norm(s, array("transformer.ln_f.weight"), eps) if huginn else s
            for layer in range(config["n_layers_in_coda"]):
                x = self._block(f"transformer.coda.{layer}", x, ("coda", layer))
            yield norm(x, array("transformer.ln_f.weight"), eps) @ head.T

    def _block(self, at: str, x: Array, cache: tuple[Any, ...]) -> Array:
        config, array, kind = self.config, self.made.array, self.made.kind
        eps, size = config["norm_eps"], config["head_dim"]

        def normed(number: int, y: Array) -> Array:
            return norm(y, array(f"{at}.norm_{number}.weight"), eps)

        def attend(a: Array) -> Array:
            heads, kv = config["n_heads"] * size, config["num_key_value_heads"] * size
            fused = a @ array(f"{at}.attn.Wqkv.weight").T
            q, k, v = fused[:, :heads], fused[:, heads : heads + kv], fused[:, heads + kv :]
            if kind == "olmo":
                q = norm(q, array(f"{at}.attn.q_norm.weight"), eps)
                k = norm(k, array(f"{at}.attn.k_norm.weight"), eps)
            q, k, v = (y.reshape(len(y), -1, size) for y in (q, k, v))
            if kind == "huginn":
                bias = array(f"{at}.attn.qk_bias")
                q, k = q + bias[0], k + bias[1]
            base = config["rope_base" if kind == "huginn" else "rope_theta"]
            rates = frequencies(config, size, base=base)
            q, k = (rope(y, self.positions, rates, adjacent=kind == "huginn") for y in (q, k))
            keys, values = self._keep(cache, k, v)
            return attention(q, keys, values) @ array(f"{at}.attn.proj.weight").T

        def mlp(y: Array) -> Array:
            first, second = np.split(y @ array(f"{at}.mlp.fc.weight").T, 2, axis=-1)
            return (silu(first) * second) @ array(f"{at}.mlp.proj.weight").T

        if kind == "huginn":
            x = normed(2, attend(normed(1, x)) + x)
            return normed(4, mlp(normed(3, x)) + x)
        if kind == "olmo":
            x = x + normed(1, attend(x))
            return x + normed(2, mlp(x))
        x = x + attend(normed(1, x))
        return x + mlp(normed(2, x))

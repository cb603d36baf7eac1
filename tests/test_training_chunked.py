"""The chunk-wise forward of training: what it equals, and that its gradients are right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_models.configuration import AGGREGATIONS
from melt_models.layers import rotary_tables, rotate
from melt_models.training.chunked import ChunkedForward, TeacherForward
from torch import Tensor

SIZES = {
    "vocab_size": 17,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "total_ut_steps": 3,
    "max_position_embeddings": 64,
}
IDS = torch.arange(3, 17).view(2, 7)


def randomise(model: MeltForCausalLM | LoopLMForCausalLM) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * 0.4
            weight.copy_(noise + ("norm" in name))


def melt(**fields: object) -> MeltForCausalLM:
    model = MeltForCausalLM(MeltConfig(**{**SIZES, "chunk_size": 3, **fields})).double()
    randomise(model)
    return model


def looplm(student: MeltForCausalLM) -> LoopLMForCausalLM:
    """The LoopLM with a MELT's weights."""
    model = LoopLMForCausalLM(LoopLMConfig(**SIZES)).double()
    model.load_state_dict({k: v for k, v in student.state_dict().items() if "latent_gate" not in k})
    return model


def run(model: MeltForCausalLM, chunk: int = 3, loops: int = 3, cut: bool = False, **options: object) -> Iterator:
    forward = ChunkedForward(model.model, loops, **options)  # type: ignore[arg-type]
    for at in range(0, IDS.shape[1], chunk):
        yield forward.run(model.model.embed_tokens(IDS[:, at : at + chunk]))
        if cut:
            forward.cut()


def hidden(model: MeltForCausalLM, **options: object) -> Tensor:
    """Every loop's hidden states, (loops, batch, tokens, d)."""
    return torch.cat([states.hidden for states in run(model, **options)], dim=2)  # type: ignore[arg-type]


def scalar(states: Tensor) -> Tensor:
    """A fixed projection of any states to one number, so that there is something to differentiate."""
    generator = torch.Generator().manual_seed(2)
    return (states * torch.randn(states.shape, generator=generator, dtype=states.dtype)).sum()


def gradients(model: MeltForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def close(actual: Tensor, expected: Tensor) -> None:
    # RoPE's tables are float32: both sides share them, so float64 agreement is what is left.
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_at_alpha_zero_every_loop_is_looplms_whatever_the_gate_says(chunk: int) -> None:
    student = melt()
    expected = looplm(student)(IDS).loop_hidden
    close(hidden(student, chunk=chunk, alpha=0.0), expected)
    assert not torch.allclose(hidden(student, chunk=chunk, alpha=0.5), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_at_alpha_one_every_loop_is_melts(aggregation: str, chunk: int) -> None:
    student = melt(aggregation=aggregation)
    close(hidden(student, chunk=chunk), student(IDS, chunk_size=chunk).loop_hidden)


def test_at_chunk_one_it_is_token_by_token_decoding() -> None:
    student = melt()
    cache, steps = None, []
    for at in range(IDS.shape[1]):
        output = student(IDS[:, at : at + 1], past_key_values=cache)
        cache = output.past_key_values
        steps.append(output.loop_hidden)
    close(hidden(student, chunk=1), torch.cat(steps, dim=2))


def test_the_teacher_in_chunks_is_its_forward_over_the_whole_sequence() -> None:
    teacher = looplm(melt())
    forward = TeacherForward(teacher, 3)
    pieces = [forward.run(IDS[:, at : at + 3]) for at in range(0, 7, 3)]
    expected = teacher(IDS)
    close(torch.cat([p.hidden for p in pieces], dim=2), expected.loop_hidden)
    assert torch.cat([p.exit_probability for p in pieces], dim=2).shape == expected.exit_distribution.shape
    assert not any(p.hidden.requires_grad for p in pieces)


def test_recorded_attention_is_the_teachers_at_alpha_zero() -> None:
    student = melt()
    teacher = TeacherForward(looplm(student), 3).run(IDS).attention
    mine = torch.cat([states.attention for states in run(student, alpha=0.0)], dim=3)
    assert mine.shape == (3, 2, 2, 7, 8)
    close(mine, teacher)


def naive(model: MeltForCausalLM, chunk: int, alpha: float) -> Tensor:
    """MELT written out once more, token by token and head by head: every loop's hidden states, (loops, b, n, d)."""
    config, tokens = model.config, IDS.shape[1]
    size, heads, layers = config.head_dim, config.num_attention_heads, config.num_hidden_layers
    states: list[list[Tensor]] = [[] for _ in range(config.total_ut_steps)]
    rows: dict[tuple, tuple[Tensor, Tensor]] = {}  # (kind, layer, loop, token) -> key, value

    def norm(weight: Tensor, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def turned(x: Tensor, at: int) -> Tensor:
        cos, sin = rotary_tables(config, torch.tensor([[at]]))
        return rotate(x[:, None, None], cos, sin)[:, 0, 0]

    for start in range(0, tokens, chunk):
        members = range(start, min(start + chunk, tokens))
        x = {n: model.model.embed_tokens(IDS[:, n]) for n in members}
        latent: dict[tuple[int, int], Tensor] = {}
        for loop in range(config.total_ut_steps):
            for index in range(layers):
                layer = model.model.layers[index]
                a = {n: norm(layer.input_layernorm.weight, x[n]) for n in members}
                gate = layer.latent_gate
                for n in members:
                    old = latent.get((index, n), a[n])
                    z = torch.sigmoid(a[n] @ gate.input_proj.weight.T + old @ gate.latent_proj.weight.T + gate.bias)
                    h = latent[index, n] = z * old + (1 - z) * a[n]
                    for kind, source in (("melt", h), ("looplm", a[n])):
                        key = turned(source @ layer.self_attn.k_proj.weight.T, n)
                        value = source @ layer.self_attn.v_proj.weight.T
                        rows[kind, index, loop if kind == "looplm" else "last", n] = key, value
                new = {}
                for n in members:
                    query = (a[n] @ layer.self_attn.q_proj.weight.T).unflatten(-1, (heads, size))
                    mixed = [
                        tuple(
                            alpha * m + (1 - alpha) * o
                            for m, o in zip(rows["melt", index, "last", j], rows["looplm", index, loop, j], strict=True)
                        )
                        for j in range(n + 1)
                    ]
                    outs = []
                    for head in range(heads):
                        q = turned(query[:, head], n)
                        scores = torch.stack([(q * key).sum(-1) / size**0.5 for key, _ in mixed], dim=-1)
                        weights = scores.softmax(-1)
                        outs.append(sum(weights[:, j, None] * value for j, (_, value) in enumerate(mixed)))
                    o = torch.cat(outs, dim=-1) @ layer.self_attn.o_proj.weight.T
                    y = x[n] + norm(layer.input_layernorm_2.weight, o)
                    m = norm(layer.post_attention_layernorm.weight, y)
                    mlp = layer.mlp
                    m = F.silu(m @ mlp.gate_proj.weight.T) * (m @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T
                    new[n] = y + norm(layer.post_attention_layernorm_2.weight, m)
                x = new
            x = {n: norm(model.model.norm.weight, x[n]) for n in members}
            states[loop] += [x[n] for n in members]
    return torch.stack([torch.stack(loop, dim=1) for loop in states])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 3])
def test_values_and_gradients_are_those_of_a_plain_reference(chunk: int, alpha: float, checkpointing: bool) -> None:
    model = melt()
    expected = naive(model, chunk, alpha)
    actual = hidden(model, chunk=chunk, alpha=alpha, checkpointing=checkpointing)
    close(actual, expected)
    want, got = gradients(model, scalar(expected)), gradients(model, scalar(actual))
    for name in {*want, *got}:
        zero = torch.zeros_like(model.get_parameter(name))
        close(got.get(name, zero), want.get(name, zero))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_agree_with_finite_differences(aggregation: str) -> None:
    model = melt(aggregation=aggregation)
    got = gradients(model, scalar(hidden(model, alpha=0.6, checkpointing=True)))
    generator = torch.Generator().manual_seed(3)
    directions = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in sorted(got.items())}
    slope = sum((got[name] * direction).sum() for name, direction in directions.items())
    values = []
    with torch.no_grad():
        for shift in (1e-6, -2e-6):
            for name, direction in directions.items():
                model.get_parameter(name).add_(direction, alpha=shift)
            values.append(scalar(hidden(model, alpha=0.6)))
    torch.testing.assert_close((values[0] - values[1]) / 2e-6, slope, rtol=1e-5, atol=1e-5)


def first_embedding_gradient(cut: bool) -> Tensor:
    """Of the last chunk's states with respect to the first token's embedding."""
    model = melt()
    *_, last = run(model, cut=cut)
    return gradients(model, scalar(last.hidden))["model.embed_tokens.weight"][IDS[:, 0]]


def test_gradients_cross_chunks_unless_they_are_cut() -> None:
    assert first_embedding_gradient(cut=False).abs().max() > 1e-3
    assert first_embedding_gradient(cut=True).abs().max() == 0


def saved_bytes(**options: object) -> int:
    """Memory that the backward pass keeps, each storage counted once; the weights are not."""
    model = melt()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = hidden(model, **options)
        total = sum(kept.values())
    del states
    return total


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    assert saved_bytes(checkpointing=True) < saved_bytes() / 3


def test_an_early_chunk_leaves_the_rows_of_its_own_last_loop() -> None:
    model = melt()
    forward = ChunkedForward(model.model, 3)
    first = forward.run(model.model.embed_tokens(IDS[:, :3]), 2)
    second = forward.run(model.model.embed_tokens(IDS[:, 3:6]))
    output = model(IDS[:, :3], num_loops=2)
    expected = model(IDS[:, 3:6], past_key_values=output.past_key_values)
    assert len(first.hidden) == 2
    close(second.hidden, expected.loop_hidden)


def test_a_chunk_cannot_leave_early_while_looplms_rows_are_read() -> None:
    model = melt()
    with pytest.raises(ValueError, match="alpha = 1"):
        ChunkedForward(model.model, 3, alpha=0.5).run(model.model.embed_tokens(IDS), 2)

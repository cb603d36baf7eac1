"""LoopLM against the equations, written down again here without cache, batching or shared code."""

import math

import pytest
import torch
from melt_models import LoopLMConfig, LoopLMForCausalLM
from torch import Tensor
from torch.nn.functional import silu
from transformers import DynamicCache

VOCAB, HIDDEN, HEADS, HEAD_DIM, THETA, EPS = 50, 64, 4, 16, 10_000.0, 1e-6


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def looplm(
    loops: int = 3, kv_heads: int = 2, tied: bool = False, layout: str = "sandwich", seed: int = 0
) -> LoopLMForCausalLM:
    """A small random LoopLM, its norms and exit gate random too."""
    torch.manual_seed(seed)
    config = LoopLMConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        rms_norm_eps=EPS,
        rope_theta=THETA,
        tie_word_embeddings=tied,
        total_ut_steps=loops,
        norm_layout=layout,
    )
    model = LoopLMForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + ("norm" in name))
    return model


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def naive(model: LoopLMForCausalLM, ids: list[int], loops: int) -> tuple[list[Tensor], list[list[float]]]:
    """Each loop's normed hidden states (tokens, d) and each token's exit distribution, in float64."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    sandwich = "model.layers.0.input_layernorm_2.weight" in w

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor, position: int) -> Tensor:
        half, out = HEAD_DIM // 2, x.clone()
        for i in range(half):
            angle = position * THETA ** (-2 * i / HEAD_DIM)
            out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
        return out

    def attention(a: Tensor, at: str) -> Tensor:
        q, k, v = (a @ w[f"{at}.{name}_proj.weight"].T for name in "qkv")
        share = q.shape[1] // k.shape[1]
        rows = []
        for i in range(len(a)):
            heads = []
            for head in range(HEADS):
                mine = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                theirs = slice(head // share * HEAD_DIM, (head // share + 1) * HEAD_DIM)
                query = turned(q[i, mine], i)
                scores = torch.stack([query @ turned(k[j, theirs], j) for j in range(i + 1)]) / math.sqrt(HEAD_DIM)
                heads.append(scores.softmax(0) @ v[: i + 1, theirs])
            rows.append(torch.cat(heads))
        return torch.stack(rows) @ w[f"{at}.o_proj.weight"].T

    x = w["model.embed_tokens.weight"][ids]
    hiddens, exits = [], []
    for _ in range(loops):
        for layer in range(2):
            at = f"model.layers.{layer}"
            inner = attention(norm(x, f"{at}.input_layernorm"), f"{at}.self_attn")
            x = x + (norm(inner, f"{at}.input_layernorm_2") if sandwich else inner)
            a = norm(x, f"{at}.post_attention_layernorm")
            up = silu(a @ w[f"{at}.mlp.gate_proj.weight"].T) * (a @ w[f"{at}.mlp.up_proj.weight"].T)
            inner = up @ w[f"{at}.mlp.down_proj.weight"].T
            x = x + (norm(inner, f"{at}.post_attention_layernorm_2") if sandwich else inner)
        x = norm(x, "model.norm")
        hiddens.append(x)
        gate = x @ w["model.early_exit_gate.weight"][0] + w["model.early_exit_gate.bias"]
        exits.append(torch.sigmoid(gate).tolist())
    distribution = []
    for token in range(len(ids)):
        left, row = 1.0, []
        for loop in range(loops):
            row.append(left if loop == loops - 1 else left * exits[loop][token])
            left *= 1.0 - exits[loop][token]
        distribution.append(row)
    return hiddens, distribution


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["sandwich", "pre"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@torch.no_grad()
def test_every_loop_and_the_logits_follow_the_equations(kv_heads: int, tied: bool, layout: str) -> None:
    model = looplm(3, kv_heads, tied, layout)
    ids = tokens(7)
    out = model(ids)
    hiddens, _ = naive(model, ids[0].tolist(), 3)
    for loop in range(3):
        close(out.loop_hidden[loop, 0], hiddens[loop])
    close(out.logits[0], hiddens[-1] @ model.lm_head.weight.double().T)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("loops", [1, 2, 4])
@torch.no_grad()
def test_the_exit_distribution_gives_the_last_loop_the_rest(loops: int) -> None:
    model = looplm(loops)
    ids = tokens(5)
    actual = model(ids).exit_distribution[:, 0]
    _, expected = naive(model, ids[0].tolist(), loops)
    close(actual.T, torch.tensor(expected))
    close(actual.sum(0), torch.ones(5))


@pytest.mark.parametrize("loops", [1, 5])
@torch.no_grad()
def test_num_loops_overrides_the_config(loops: int) -> None:
    model = looplm(3)
    ids = tokens(5)
    out = model(ids, num_loops=loops)
    assert out.loop_hidden.shape[0] == loops
    close(out.loop_hidden[-1, 0], naive(model, ids[0].tolist(), loops)[0][-1])


@pytest.mark.parametrize("pieces", [[1] * 9, [4, 1, 4], [8, 1]])
@torch.no_grad()
def test_cached_decoding_equals_the_full_forward(pieces: list[int]) -> None:
    model = looplm()
    ids = tokens(9)
    cache, logits = DynamicCache(), []
    for piece in ids.split(pieces, dim=1):
        logits.append(model(piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cache_has_an_entry_for_each_loop_and_layer_loops_outermost() -> None:
    model = looplm(3)
    cache = model(tokens(6)).past_key_values
    assert len(cache) == 3 * 2
    # Layer 0's values in loop t + 1 come straight from loop t's normed output.
    out = model(tokens(6))
    first = model.model.layers[0]
    inputs = [model.model.embed_tokens(tokens(6)), *out.loop_hidden]
    for loop in range(3):
        values = first.self_attn.v_proj(first.input_layernorm(inputs[loop])).unflatten(-1, (2, HEAD_DIM))
        torch.testing.assert_close(cache.layers[loop * 2].values, values.transpose(1, 2), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_left_padded_batch_generates_what_each_sequence_generates_alone() -> None:
    model = looplm()
    prompts = [tokens(3, 2)[0], tokens(7, 3)[0], tokens(5, 4)[0]]
    alone = [model.generate(p[None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, len(p) :] for p in prompts]
    batch = torch.stack([torch.cat((torch.zeros(7 - len(p), dtype=torch.long), p)) for p in prompts])
    mask = torch.stack([torch.arange(7) >= 7 - len(p) for p in prompts]).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(together[:, 7:], torch.stack(alone))


@torch.no_grad()
def test_padding_changes_no_logit() -> None:
    model = looplm()
    ids = tokens(4)
    padded = torch.cat((torch.full((1, 3), 9), ids), dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(model(padded, mask).logits[:, 3:], model(ids).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_generate_without_a_cache_gives_the_same_text() -> None:
    model = looplm()
    texts = [
        model.generate(tokens(4), max_new_tokens=5, do_sample=False, use_cache=c, pad_token_id=0) for c in (False, True)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize("step", [0, 1, 2])
@torch.no_grad()
def test_exit_at_step_counts_from_zero_and_reads_that_loop(step: int) -> None:
    model = looplm(3)
    out = model(tokens(5), exit_at_step=step)
    torch.testing.assert_close(out.logits, model.lm_head(out.loop_hidden[step]))
    assert out.depth.unique().tolist() == [step + 1]


def set_exits(model: LoopLMForCausalLM, lambdas: list[float]) -> None:
    """Makes loop t's exit probability lambdas[t] for every token."""
    calls = iter(lambdas)

    def gate(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return torch.full_like(output, torch.logit(torch.tensor(next(calls), dtype=torch.float64)).item())

    model.model.early_exit_gate.register_forward_hook(gate)


@pytest.mark.parametrize(
    ("threshold", "depth"),
    [(0.0, 1), (0.29, 1), (0.31, 2), (0.57, 2), (0.59, 3), (0.95, 4), (1.0, 4)],
)
@torch.no_grad()
def test_a_threshold_picks_the_first_loop_whose_cumulative_probability_reaches_it(threshold: float, depth: int) -> None:
    model = looplm(4)
    set_exits(model, [0.3, 0.4, 0.5, 0.6])  # cumulative: 0.3, 0.58, 0.79, then the rest
    out = model(tokens(3), exit_threshold=threshold)
    assert out.depth.unique().tolist() == [depth]
    torch.testing.assert_close(out.logits, model.lm_head(out.loop_hidden[depth - 1]))


@torch.no_grad()
def test_tokens_with_different_exit_probabilities_read_different_loops() -> None:
    model = looplm(4)
    ids = tokens(12)
    out = model(ids, exit_threshold=0.6)
    _, distribution = naive(model, ids[0].tolist(), 4)
    expected = []
    for row in distribution:
        expected.append(next((t + 1 for t in range(4) if sum(row[: t + 1]) >= 0.6), 4))
    assert len(set(expected)) > 1
    assert out.depth[0].tolist() == expected


@torch.no_grad()
def test_a_threshold_of_one_never_leaves_early_however_sure_the_gate_is() -> None:
    model = looplm(4)
    set_exits(model, [1.0, 1.0, 1.0, 1.0])
    assert model(tokens(3), exit_threshold=1.0).depth.unique().tolist() == [4]


@pytest.mark.parametrize("loops", [0, -1])
def test_fewer_than_one_loop_is_refused(loops: int) -> None:
    with pytest.raises(ValueError, match=f"num_loops is {loops}"):
        looplm()(tokens(2), num_loops=loops)


@pytest.mark.parametrize("step", [-1, 3, 9])
def test_an_exit_step_outside_the_loops_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"exit_at_step is {step}; with 3 loops it goes from 0 to 2"):
        looplm(3)(tokens(2), exit_at_step=step)


@torch.no_grad()
def test_a_filled_cache_cannot_be_deepened() -> None:
    model = looplm(4)
    cache = model(tokens(4), num_loops=2).past_key_values
    with pytest.raises(ValueError, match="fewer than 4 loops"):
        model(tokens(1), past_key_values=cache)


def test_gradients_reach_every_parameter() -> None:
    model = looplm().train()
    ids = tokens(6)
    out = model(ids, labels=ids)
    (out.loss + out.exit_distribution[0].sum()).backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not without


def test_the_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model = looplm()
    ids = tokens(6)
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(out.loss, expected)


@torch.no_grad()
def test_logits_to_keep_returns_only_the_last_tokens() -> None:
    model = looplm()
    torch.testing.assert_close(model(tokens(6), logits_to_keep=2).logits, model(tokens(6)).logits[:, -2:])

"""MELT against the paper's equations, written down again here token by token, without batching or shared code."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltCache, MeltConfig, MeltForCausalLM
from melt_models.cache import ChunkAttention
from melt_models.melt import LatentGate
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import silu
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

GREEDY = {"do_sample": False, "pad_token_id": 0}
VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, THETA, EPS = 50, 64, 4, 2, 16, 10_000.0, 1e-6
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
SIZES |= {"rms_norm_eps": EPS, "rope_theta": THETA}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def melt(
    loops: int = 3, chunk: int = 3, layout: str = "sandwich", init: str = "first_input", **more: object
) -> MeltForCausalLM:
    """A small random MELT, its norms and gates random too."""
    torch.manual_seed(0)
    config = MeltConfig(**SIZES, total_ut_steps=loops, chunk_size=chunk, norm_layout=layout, latent_init=init, **more)
    model = MeltForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn_like(weight) * 0.15 + ("norm" in name))
    return model


def looplm_of(model: MeltForCausalLM) -> LoopLMForCausalLM:
    """The LoopLM with a MELT's weights."""
    own = model.config
    config = LoopLMConfig(**SIZES, total_ut_steps=own.total_ut_steps, norm_layout=own.norm_layout)
    looplm = LoopLMForCausalLM(config).eval()
    looplm.load_state_dict({name: w for name, w in model.state_dict().items() if "latent_gate" not in name})
    return looplm


def set_gate(model: MeltForCausalLM, z: float) -> None:
    """Fixes the latent gate at 0 or 1."""
    for name, weight in model.named_parameters():
        if "latent_gate" in name:
            weight.data.fill_(0.0 if "proj" in name else 400.0 * z - 200.0)


def tokens(count: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def naive(
    model: MeltForCausalLM, ids: list[int], loops: int, chunk: int, threshold: float = 1.0
) -> tuple[list[Tensor], list[int]]:
    """MELT in float64, one token after the other: each loop's hidden states (tokens, d), and each token's depth."""
    w = {name: value.double() for name, value in model.state_dict().items()}
    sandwich, from_zero = model.config.norm_layout == "sandwich", model.config.latent_init == "zeros"
    frequency = THETA ** (-torch.arange(HEAD_DIM // 2, dtype=torch.float64) / (HEAD_DIM // 2))

    def linear(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ x

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean() + EPS).sqrt() * w[f"{name}.weight"]

    def turned(x: Tensor, position: int) -> Tensor:
        """The two halves of each head as one complex number, turned by its angle."""
        first, second = x.view(-1, 2, HEAD_DIM // 2).unbind(1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(frequency), position * frequency)
        return torch.cat((turned.real, turned.imag), dim=1)

    keys: list[dict[int, Tensor]] = [{}, {}]
    values: list[dict[int, Tensor]] = [{}, {}]
    history, depth = [torch.zeros(len(ids), HIDDEN, dtype=torch.float64) for _ in range(loops)], [0] * len(ids)
    for begin in range(0, len(ids), chunk):
        chunk_tokens = range(begin, min(begin + chunk, len(ids)))
        hidden = {i: w["model.embed_tokens.weight"][ids[i]] for i in chunk_tokens}
        latent: dict[tuple[int, int], Tensor] = {}
        staying = dict.fromkeys(chunk_tokens, 1.0)  # the active tokens: probability of still looping
        for loop in range(loops):
            x = dict(hidden)
            for layer in range(2):
                at = f"model.layers.{layer}"
                a = {i: norm(x[i], f"{at}.input_layernorm") for i in staying}
                for i in staying:
                    old = latent.get((layer, i), torch.zeros_like(a[i]) if from_zero else a[i])
                    gate = linear(a[i], f"{at}.latent_gate.input_proj") + linear(old, f"{at}.latent_gate.latent_proj")
                    z = torch.sigmoid(gate + w[f"{at}.latent_gate.bias"])
                    latent[layer, i] = h = z * old + (1 - z) * a[i]
                    keys[layer][i] = turned(linear(h, f"{at}.self_attn.k_proj"), i)
                    values[layer][i] = linear(h, f"{at}.self_attn.v_proj").view(KV_HEADS, HEAD_DIM)
                for i in staying:
                    q, heads = turned(linear(a[i], f"{at}.self_attn.q_proj"), i), []
                    for head in range(HEADS):
                        kv = head * KV_HEADS // HEADS
                        scores = torch.stack([q[head] @ keys[layer][j][kv] for j in range(i + 1)]) / HEAD_DIM**0.5
                        heads.append(scores.softmax(0) @ torch.stack([values[layer][j][kv] for j in range(i + 1)]))
                    inner = linear(torch.cat(heads), f"{at}.self_attn.o_proj")
                    x[i] = x[i] + (norm(inner, f"{at}.input_layernorm_2") if sandwich else inner)
                    b = norm(x[i], f"{at}.post_attention_layernorm")
                    wide = silu(linear(b, f"{at}.mlp.gate_proj")) * linear(b, f"{at}.mlp.up_proj")
                    inner = linear(wide, f"{at}.mlp.down_proj")
                    x[i] = x[i] + (norm(inner, f"{at}.post_attention_layernorm_2") if sandwich else inner)
            for i in list(staying):
                hidden[i] = norm(x[i], "model.norm")
                depth[i] += 1
                gate = linear(hidden[i], "model.early_exit_gate")[0] + w["model.early_exit_gate.bias"][0]
                staying[i] *= 1.0 - torch.sigmoid(gate).item()
                if threshold < 1.0 and 1.0 - staying[i] >= threshold:
                    del staying[i]
            for i in chunk_tokens:
                history[loop][i] = hidden[i]
    return history, depth


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["first_input", "zeros"])
@pytest.mark.parametrize("layout", ["sandwich", "pre"])
@pytest.mark.parametrize("loops", [1, 2, 4, 6])
@pytest.mark.parametrize("chunk", [1, 3, 7])
@torch.no_grad()
def test_every_loop_and_the_logits_follow_the_equations(chunk: int, loops: int, layout: str, init: str) -> None:
    model = melt(2, 4, layout, init)
    ids = tokens(7)
    out = model(ids, num_loops=loops, chunk_size=chunk)
    expected, _ = naive(model, ids[0].tolist(), loops, chunk)
    for loop in range(loops):
        close(out.loop_hidden[loop, 0], expected[loop])
    close(out.logits[0], expected[-1] @ model.lm_head.weight.double().T)
    assert out.depth.unique().tolist() == [loops]


@pytest.mark.parametrize("layout", ["sandwich", "pre"])
@torch.no_grad()
def test_one_loop_from_the_first_input_is_exactly_looplms_first_loop(layout: str) -> None:
    model = melt(1, 9, layout)
    assert torch.equal(model(tokens(9)).logits, looplm_of(model)(tokens(9), exit_at_step=0).logits)


@torch.no_grad()
def test_a_closed_gate_in_one_chunk_is_looplm_in_every_loop() -> None:
    model = melt(4, 9)
    set_gate(model, 0)
    torch.testing.assert_close(model(tokens(9)).loop_hidden, looplm_of(model)(tokens(9)).loop_hidden)


@pytest.mark.parametrize(("z", "loop"), [(0, -1), (1, 0)])
@torch.no_grad()
def test_a_closed_gate_keeps_the_last_loops_rows_and_an_open_one_the_firsts(z: int, loop: int) -> None:
    model = melt(4, 1)
    set_gate(model, z)
    out = model(tokens(5))
    first = model.model.layers[0]
    inputs = [model.model.embed_tokens(tokens(5)), *out.loop_hidden[:-1]]
    expected = first.self_attn.v_proj(first.input_layernorm(inputs[loop])).unflatten(-1, (KV_HEADS, HEAD_DIM))
    close(out.past_key_values.layers[0].values, expected.transpose(1, 2))


@torch.no_grad()
def test_the_latent_is_the_gated_mean_of_old_latent_and_new_input() -> None:
    torch.manual_seed(3)
    gate = LatentGate(HIDDEN)
    a, h = torch.randn(2, 1, 5, HIDDEN).unbind()
    z = torch.sigmoid(a @ gate.input_proj.weight.T + h @ gate.latent_proj.weight.T - 2.0)
    torch.testing.assert_close(gate(a, h), z * h + (1 - z) * a)
    assert torch.equal(gate(a, a), a)


@pytest.mark.parametrize(("chunk", "pieces"), [(1, [1] * 7), (1, [4, 3]), (3, [3, 3, 1]), (3, [6, 1]), (2, [2, 4, 1])])
@torch.no_grad()
def test_forwards_over_pieces_with_the_cache_equal_one_forward(chunk: int, pieces: list[int]) -> None:
    model = melt(3, chunk)
    ids, cache, outputs = tokens(7), MeltCache(2), []
    for piece in ids.split(pieces, dim=1):
        outputs.append(model(piece, past_key_values=cache))
    whole = model(ids)
    close(torch.cat([out.logits for out in outputs], dim=1), whole.logits)
    assert cache.get_seq_length() == 7
    close(cache.layers[1].keys, whole.past_key_values.layers[1].keys)


def padded(lengths: list[int], side: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sequences of these lengths, each alone (1, n) and as a padded batch with its mask."""
    alone = [tokens(n, seed=n) for n in lengths]
    width = max(lengths)
    batch, mask = torch.full((len(lengths), width), 9), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, ids in enumerate(alone):
        at = slice(width - ids.shape[1], width) if side == "left" else slice(0, ids.shape[1])
        batch[row, at], mask[row, at] = ids[0], 1
    return alone, batch, mask


@pytest.mark.parametrize("threshold", [1.0, 0.6])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_sequence_gives_what_it_gives_alone(side: str, threshold: float) -> None:
    model = melt(4)
    alone, batch, mask = padded([2, 7, 5, 1], side)
    out = model(batch, mask, exit_threshold=threshold)
    for row, ids in enumerate(alone):
        single = model(ids, exit_threshold=threshold)
        close(out.logits[row, mask[row].bool()], single.logits[0])
        assert torch.equal(out.depth[row, mask[row].bool()], single.depth[0])


@torch.no_grad()
def test_decoding_continues_a_padded_batch_as_each_sequence_alone() -> None:
    model = melt(3)
    alone, batch, mask = padded([2, 7, 5], "right")
    cache = model(batch, mask).past_key_values
    following = torch.tensor([[11], [12], [13]])
    out = model(following, torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1), past_key_values=cache)
    for row, ids in enumerate(alone):
        single = model(following[row : row + 1], past_key_values=model(ids).past_key_values)
        close(out.logits[row], single.logits[0])


def decode(model: MeltForCausalLM, ids: Tensor, count: int) -> Tensor:
    """Greedy decoding by hand."""
    cache, out, new = MeltCache(2), [], ids
    for _ in range(count):
        new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        out.append(new)
    return torch.cat(out, dim=1)


@torch.no_grad()
def test_greedy_generation_of_a_padded_batch_equals_decoding_each_by_hand() -> None:
    model = melt(3)
    alone, batch, mask = padded([2, 7, 5], "left")
    out = model.generate(batch, attention_mask=mask, max_new_tokens=6, **GREEDY)
    assert torch.equal(out[:, 7:], torch.cat([decode(model, ids, 6) for ids in alone]))


@torch.no_grad()
def test_sampling_repeats_with_its_seed_and_differs_without() -> None:
    model = melt(2)
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(tokens(4), max_new_tokens=12, do_sample=True, pad_token_id=0).tolist())
    assert texts[0] == texts[1] != texts[2]


@torch.no_grad()
def test_beam_search_scores_are_the_sequences_own_log_probabilities() -> None:
    model = melt(2)
    _, batch, mask = padded([3, 5], "left")
    options = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0, "return_dict_in_generate": True}
    out = model.generate(batch, attention_mask=mask, max_new_tokens=5, output_scores=True, **options, **GREEDY)
    for row, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
        prompt, new = sequence[None, :5][:, mask[row // 2].bool()], sequence[5:]
        first = model(prompt)
        logits = [first.logits[0, -1]]
        for token in new[:-1]:
            logits.append(model(token[None, None], past_key_values=first.past_key_values).logits[0, -1])
        expected = torch.stack(logits).log_softmax(-1).gather(1, new[:, None]).sum()
        close(score, expected)


@torch.no_grad()
def test_generation_continues_from_a_returned_cache() -> None:
    model = melt(2)
    first = model.generate(tokens(4), max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=3, **GREEDY)
    assert second[0, 4:].tolist() == decode(model, tokens(4), 6)[0].tolist()


@torch.no_grad()
def test_the_cache_has_one_row_a_token_and_layer_whatever_the_loops() -> None:
    for loops in (1, 4, 8):
        cache = melt(loops)(tokens(7)).past_key_values
        assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, KV_HEADS, 7, HEAD_DIM)] * 2
        assert [tuple(layer.values.shape) for layer in cache.layers] == [(1, KV_HEADS, 7, HEAD_DIM)] * 2


@pytest.mark.parametrize("chunk", [1, 4, 12])
@torch.no_grad()
def test_early_exit_follows_the_equations_and_reports_its_depth(chunk: int) -> None:
    model = melt(5, chunk)
    ids = tokens(12)
    expected, depth = naive(model, ids[0].tolist(), 5, chunk, threshold=0.7)
    assert len(set(depth)) > 1
    out = model(ids, exit_threshold=0.7)
    assert out.depth[0].tolist() == depth
    close(out.logits[0], expected[-1] @ model.lm_head.weight.double().T)


@torch.no_grad()
def test_a_tokens_hidden_and_cache_rows_are_frozen_from_its_exit_on() -> None:
    model = melt(5, 12).model
    cache, hiddens, rows, actives = MeltCache(2), [], [], []
    embedded, valid = model.embed_tokens(tokens(12)), torch.ones(1, 12, dtype=torch.bool)
    for step, active in model.loops(embedded, valid, cache, 5, 0.7):
        hiddens.append(step.hidden[0])
        rows.append(torch.cat([x[0] for layer in cache.layers for x in (layer.keys, layer.values)]))
        actives.append(active[0])
    frozen = 0
    for loop in range(1, len(actives)):
        done = ~actives[loop]
        frozen += int(done.sum())
        assert torch.equal(hiddens[loop][done], hiddens[loop - 1][done])
        assert torch.equal(rows[loop][:, done], rows[loop - 1][:, done])
        assert not torch.equal(rows[loop][:, ~done], rows[loop - 1][:, ~done])
    assert frozen


@torch.no_grad()
def test_loops_end_once_no_token_is_active() -> None:
    model = melt(5)
    out = model(tokens(3), exit_threshold=0.0)
    assert out.loop_hidden.shape[0] == 1
    assert out.depth.unique().tolist() == [1]


@torch.no_grad()
def test_an_exit_in_one_sequence_changes_no_other() -> None:
    model = melt(5)
    batch = torch.cat([tokens(6, seed) for seed in (1, 2, 3)])
    together = model(batch, exit_threshold=0.7)
    assert len(together.depth.unique()) > 1
    for row in range(3):
        alone = model(batch[row : row + 1], exit_threshold=0.7)
        close(together.logits[row], alone.logits[0])
        assert torch.equal(together.depth[row], alone.depth[0])


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_saved_model_comes_back_through_the_auto_classes(tied: bool, tmp_path: Path) -> None:
    model = melt(3, 2, "pre", "zeros", tie_word_embeddings=tied, untrained=["latent_gate"])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MeltConfig)
    fields = ("total_ut_steps", "chunk_size", "norm_layout", "latent_init", "untrained", "head_dim", "rope_parameters")
    assert [getattr(config, name) for name in fields] == [getattr(model.config, name) for name in fields]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, MeltForCausalLM)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    again = copy.deepcopy(again)  # weights that lie where they are in the file are added up in another order
    assert torch.equal(again(tokens(5)).logits, model(tokens(5)).logits)


def test_the_gate_of_an_earlier_chunk_learns_from_a_later_one() -> None:
    model = melt(2, 3)
    cache = model(tokens(3)).past_key_values
    constant = {name: weight.detach() for name, weight in model.named_parameters()}
    later = functional_call(model, constant, (tokens(3, 2),), {"past_key_values": cache})
    later.logits.square().sum().backward()
    for layer in model.model.layers:
        for weight in layer.latent_gate.parameters():
            assert weight.grad is not None
            assert weight.grad.any()


def test_gradients_reach_every_parameter_but_the_exit_gates() -> None:
    model = melt(2, 3).train()
    model(tokens(7), labels=tokens(7)).loss.backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}
    assert without == {"model.early_exit_gate.weight", "model.early_exit_gate.bias"}


@pytest.mark.parametrize("count", [3, 2])  # tokens in a chunk of three columns
@pytest.mark.parametrize("init", ["first_input", "zeros"])
@torch.no_grad()
def test_the_first_loop_does_not_read_the_latent_it_is_given(init: str, count: int) -> None:
    model = melt(2, init=init).model
    hidden, active, first = model.embed_tokens(tokens(3)), torch.arange(3)[None] < count, torch.tensor([True])
    steps = []
    for value in (0.0, torch.nan):
        attend = ChunkAttention(model.config, MeltCache(2), active)
        steps.append(model.loop_step(hidden, torch.full((2, *hidden.shape), value), first, active, attend))
    assert torch.equal(*[step.hidden[:, :count] for step in steps])
    assert torch.equal(*[step.latent[:, :, :count] for step in steps])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_loops": 0}, "both must be 1 or more"),
        ({"chunk_size": 0}, "both must be 1 or more"),
        ({"past_key_values": DynamicCache()}, "DynamicCache; MELT needs a MeltCache"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "holes"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "no token"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        melt()(tokens(3), **arguments)


@pytest.mark.parametrize("init", ["first_input", "zeros"])
@pytest.mark.parametrize("aggregation", ["gate", "scalar_gate", "ema", "mean", "last"])
def test_the_only_loop_is_the_first_to_the_last_bit(aggregation: str, init: str) -> None:
    model = melt(loops=1, init=init, aggregation=aggregation).model
    hidden = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(0))
    every = torch.ones(2, 3, dtype=torch.bool)

    def attend() -> ChunkAttention:
        return ChunkAttention(model.config, MeltCache(2), every)

    latent = hidden.new_zeros(2, 2, 3, model.config.latent_size)
    with torch.no_grad():
        step = model.loop_step(hidden, latent, every[:, 0], every, attend())
        alone = model.only_loop(hidden, attend())
    assert torch.equal(step.hidden, alone[0])
    assert torch.equal(step.exit_probability, alone[1])

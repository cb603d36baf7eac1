"""Staggered decoding in PyTorch: what each token sees, what is kept of the drafts, and what it costs."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import TINY
from melt_models import MeltConfig, MeltForCausalLM
from melt_models.cache import ChunkAttention, MeltCache
from melt_models.checkpoint import load_model
from melt_models.decoding import Decoded, TokensInFlight, greedy_tokens
from tokenizers import Tokenizer
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ADDITION = ROOT / "examples"
sys.path.insert(0, str(ROOT / "benchmarks"))

import staggered as benchmark  # noqa: E402

PROMPT = [5, 9, 4, 7, 8, 30, 31, 12, 2, 6, 11]


def melt(loops: int = 4, **fields: object) -> MeltForCausalLM:
    torch.manual_seed(0)
    return MeltForCausalLM(MeltConfig(**{**TINY, "total_ut_steps": loops, **fields})).eval()


@dataclass
class Alone:
    """A token that runs its loops as a chunk of its own."""

    token: int
    loops: int = 0
    hidden: Tensor | None = None
    latent: Tensor | None = None
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # key and value of each layer


class OneByOne:
    """Staggered decoding by its description: single tokens, each over the keys and values that earlier ones have left.

    ``past``: of each layer, the keys and values of all final tokens.
    """

    def __init__(self, model: MeltForCausalLM, prompt: list[int]):
        self.model = model
        cache = MeltCache(len(model.model.layers))
        output = model(torch.tensor([prompt]), past_key_values=cache, exit_threshold=1.0)
        self.first = int(output.logits[0, -1].argmax())
        self.past = [(layer.keys, layer.values) for layer in cache.layers]

    def loop(self, token: Alone, before: list[Alone]) -> Tensor:
        """Run a token's next loop behind those in flight and return the logits."""
        model, cache = self.model.model, MeltCache(len(self.past))
        for layer, (keys, values) in enumerate(self.past):
            rows = [earlier.rows[layer] for earlier in before]
            cache.write(layer, *(torch.cat(part, dim=2) for part in zip((keys, values), *rows, strict=True)))
        count = self.past[0][0].shape[2] + len(before)
        cache.commit(torch.ones(1, count, dtype=torch.bool))
        active = torch.ones(1, 1, dtype=torch.bool)
        hidden = model.embed_tokens(torch.tensor([[token.token]])) if token.hidden is None else token.hidden
        latent = torch.full(
            (len(self.past), *hidden.shape[:2], model.config.latent_size), torch.nan, dtype=hidden.dtype
        )
        latent = latent if token.latent is None else token.latent
        attend = ChunkAttention(model.config, cache, active)
        step = model.loop_step(hidden, latent, torch.tensor([token.loops == 0]), active, attend)
        token.hidden, token.latent, token.loops = step.hidden, step.latent, token.loops + 1
        token.rows = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]
        return self.model.lm_head(step.hidden)[0, 0]

    def settle(self, token: Alone) -> None:
        """Put a token that has run all loops into the past."""
        self.past = [
            (torch.cat((keys, row[0]), dim=2), torch.cat((values, row[1]), dim=2))
            for (keys, values), row in zip(self.past, token.rows, strict=True)
        ]

    def decode(self, loops: int, count: int) -> Decoded:
        """Decode greedily: the newest word for a place wins, and drops what it contradicts."""
        final, runs = [self.first], 0
        flight = [Alone(self.first)]
        while len(final) < count:
            runs += 1
            words = [int(self.loop(token, flight[:at]).argmax()) for at, token in enumerate(flight)]
            for at, word in enumerate(words):
                if at + 1 == len(flight) or flight[at + 1].token != word:
                    flight[at + 1 :] = [Alone(word)]
                    break
            if flight[0].loops == loops:
                final.append(words[0])
                self.settle(flight.pop(0))
        return Decoded(final, runs)


@pytest.mark.parametrize("aggregation", ["gate", "mean", "last"])
@torch.no_grad()
def test_a_token_sees_the_rows_that_earlier_tokens_write_in_the_same_run(aggregation: str) -> None:
    model = melt(aggregation=aggregation).double()
    tokens, reference = [8, 30, 2, 2, 17, 9], OneByOne(model, PROMPT)
    cache = MeltCache(2)
    model(torch.tensor([PROMPT]), past_key_values=cache)
    flight, alone = TokensInFlight(model.model, cache), []
    for run in range(len(tokens) + 3):
        if run < len(tokens):
            flight.enter(tokens[run])
            alone.append(Alone(tokens[run]))
        got = model.lm_head(flight.run())[0]
        want = torch.stack([reference.loop(token, alone[:at]) for at, token in enumerate(alone)])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        if flight.loops[0] == 4:
            flight.keep(1, len(flight))
            reference.settle(alone.pop(0))
    assert len(flight) == 0
    assert cache.get_seq_length() == len(PROMPT) + len(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loops", [1, 2, 3, 5])
@torch.no_grad()
def test_the_newest_word_wins_and_drops_all_behind_it(loops: int, dtype: torch.dtype) -> None:
    model = melt(loops).to(dtype)
    want = OneByOne(model, PROMPT).decode(loops, 30)
    got = greedy_tokens(model, PROMPT, 30, decode="staggered")
    assert got.tokens == want.tokens
    assert 29 <= got.runs <= want.runs <= 29 * loops


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_prelude_layers": 1, "num_coda_layers": 2, "injection": "linear"},
        {"num_prelude_layers": 1, "injection": "linear", "start_state": "noise"},
    ],
)
def test_plain_decoding_is_that_of_generate(fields: dict[str, object]) -> None:
    model = melt(**fields)
    written = model.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None)
    got = greedy_tokens(model, PROMPT, 12)
    assert got.tokens == written[0, len(PROMPT) :].tolist()
    assert got.runs == 11 * 4
    assert len(greedy_tokens(model, PROMPT, 12, decode="staggered").tokens) == 12


def test_one_lane_is_plain_decoding() -> None:
    model = melt(chunk_size=4)
    assert greedy_tokens(model, PROMPT, 20, decode="staggered", lanes=1) == greedy_tokens(model, PROMPT, 20)


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("decode", ["plain", "staggered"])
def test_it_ends_at_a_stop_or_at_the_last_token_and_runs_nothing_behind(decode: str, count: int) -> None:
    model = melt()
    every = greedy_tokens(model, PROMPT, 20, decode=decode)
    some = greedy_tokens(model, PROMPT, count, decode=decode)
    assert some.tokens == every.tokens[:count]
    stop = every.tokens[count]
    stopped = greedy_tokens(model, PROMPT, 20, decode=decode, stop_ids={stop})
    assert stopped.tokens == every.tokens[: every.tokens.index(stop) + 1]


def test_the_addition_checkpoint_writes_the_same_answers_in_about_half_the_runs() -> None:
    directory = ADDITION / "addition-melt"
    model, tokenizer = load_model(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    stop = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    runs = tokens = 0
    for line in (ADDITION / "addition_problems.jsonl").read_text().splitlines()[:20]:
        ids = tokenizer.encode(json.loads(line)["prompt"]).ids
        plain, staggered = (
            greedy_tokens(model, ids, 12, decode=decode, stop_ids={stop}) for decode in ("plain", "staggered")
        )
        assert staggered.tokens == plain.tokens
        assert plain.runs == 4 * (len(plain.tokens) - 1)
        runs, tokens = runs + staggered.runs, tokens + len(staggered.tokens) - 1
    assert 1.0 < runs / tokens < 2.2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"decode": "pipelined"}, "decode is 'pipelined'"),
        ({"lanes": 0}, "lanes 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"num_loops": 0}, "num_loops is 0"),
        ({"prompt": []}, "no token"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        greedy_tokens(melt(), **{"prompt": PROMPT, "max_tokens": 4, **arguments})  # type: ignore[arg-type]


def test_the_benchmark_decodes_every_way_to_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(ADDITION / "addition-melt", ADDITION / "addition_problems.jsonl", 3, True)
    rows = re.findall(r"│ ([a-z]+)[^│]*│ ([\d.]+)% +│ (\d) of 3 +│ ([\d.]+) +│", capsys.readouterr().out)
    assert [name for name, *_ in rows] == ["plain"] + 3 * ["staggered"] + 3 * ["drafted"]
    assert {right for _, right, *_ in rows} == {"100.0"}
    assert {same for _, _, same, _ in rows} == {"3"}
    assert float(rows[0][3]) == 4.0
    assert float(rows[3][3]) < 2.5

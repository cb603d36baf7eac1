"""Packages of the looped families that people can download: exact at every loop, in all that a request can do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from conftest import FAMILY_SIZES, MakeFamily, MakePackage
from family_checkpoints import CONFIGS, Equations, Family, family
from melt_models.checkpoint import load_model
from melt_models.convert import convert
from melt_models.start_state import start_noise as models_noise
from melt_runtime import ArgumentError, LoopSettings, PrefixCache, Request, Runtime, Scheduler
from melt_runtime.decoding import start_state
from melt_runtime.package.specs import DIALECTS
from serving import WAIT, Server

from melt_export.export import building
from melt_export.options import ExportOptions
from melt_export.parity.verify import verify
from melt_export.quantization.options import CacheOptions, WeightOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))


RAVENS = ["huginn", "llama", "olmo"]
SMALL = {"nanbeige4.2-3b": "nanbeige", "huginn-0125": "huginn"}
IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
MOST_ERROR = 1e-4


def loops_of(made: Family) -> int:
    return made.config.get("num_loops") or made.config["mean_recurrence"]


def noise_of(made: Family, seed: int, first: int, count: int) -> Any:
    std = made.config["init_values"]["std"] * made.config["init_values"]["embed_scale"]
    return models_noise(seed, np.arange(first, first + count), made.config["n_embd"], std).astype(np.float64)


def error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Parity


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_loop_agrees_with_pytorch(
    kind: str, dialect: str, make_family: MakeFamily, make_package: MakePackage
) -> None:
    checkpoint = make_family(kind)
    package = make_package(checkpoint, **FAMILY_SIZES, **({} if dialect == "onnxruntime" else {"dialect": dialect}))
    report = verify(package, checkpoint, tokens=12)
    assert report.failures() == []
    assert "exit probability" not in {state.quantity for state in report.states}
    assert all(run.same == run.tokens for run in report.generations)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("kind", "options"), [("huginn", {}), ("llama", {"precision": "fp16"}), ("nanbeige_skip", {})])
def test_fewer_loops_than_have_caches_agree_with_pytorch_too(
    kind: str, options: dict[str, Any], dialect: str, make_family: MakeFamily, make_package: MakePackage
) -> None:
    checkpoint = make_family(kind)
    package = make_package(checkpoint, **FAMILY_SIZES, dialect=dialect, **options)
    for loops in (1, 2):
        report = verify(package, checkpoint, tokens=8, loops=loops)
        assert report.failures() == []
        assert {state.loop for state in report.states if state.quantity == "hidden"} == set(range(1, loops + 1))


@pytest.mark.parametrize(
    ("kind", "dialect"),
    [("huginn", "onnxruntime"), ("huginn", "portable"), ("olmo", "standard"), ("nanbeige_skip", "portable")],
)
def test_every_loop_agrees_with_pytorch_where_loops_share_their_caches(
    kind: str, dialect: str, make_family: MakeFamily, make_package: MakePackage
) -> None:
    checkpoint = make_family(kind)
    package = make_package(checkpoint, **FAMILY_SIZES, dialect=dialect, share_caches="last")
    for loops in (None, 7):  # more than it was trained for: shared caches hold any number
        assert verify(package, checkpoint, tokens=12, loops=loops).failures() == []


@pytest.mark.parametrize(("kind", "dialect"), [("huginn", "onnxruntime"), ("llama", "portable"), ("olmo", "standard")])
def test_a_family_with_melts_gate_in_its_loops_agrees_with_pytorch(
    kind: str, dialect: str, make_family: MakeFamily, make_package: MakePackage, tmp_path: Path
) -> None:
    convert(make_family(kind), tmp_path / "melt", chunk_size=8)
    report = verify(make_package(tmp_path / "melt", **FAMILY_SIZES, dialect=dialect), tmp_path / "melt", tokens=12)
    assert report.failures() == []
    assert "latent" in {state.quantity for state in report.states}


@pytest.mark.parametrize("chunk", [1, 4, 8])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("kind", ["nanbeige", "nanbeige_skip", *RAVENS])
def test_logits_after_every_loop_are_those_of_the_equations(
    kind: str, shares: bool, chunk: int, make_runtime: Callable[..., Runtime]
) -> None:
    made, runtime = family(kind), make_runtime(kind, **({"share_caches": "last"} if shares else {}))
    for loops in range(1, loops_of(made) + 1):
        equations, seed = Equations(made, shared=shares), 7
        expected = []
        for at in range(0, len(IDS), chunk):
            ids = IDS[at : at + chunk]
            noise = noise_of(made, seed, at, len(ids)) if kind in RAVENS else None
            expected.append(equations.loops(ids, loops, noise)[-1])
        driver = runtime.driver()
        settings = LoopSettings(loops, chunk=chunk, start_seed=seed)
        logits = driver.append([IDS], settings)[0]
        assert error(logits, np.concatenate(expected)[-1]) <= MOST_ERROR, f"{loops} loops"


@pytest.mark.parametrize(
    "options",
    [
        {"weights": WeightOptions("int4", 32, method="rtn")},
        {"weights": WeightOptions("int8", 32, embedding="int8")},
        {"cache": CacheOptions("int8")},
        {"precision": "fp16"},
        {"share_caches": "last", "cache": CacheOptions("int8")},
    ],
)
def test_a_quantized_huginn_agrees_with_pytorch_on_its_stored_values(
    options: dict[str, Any], make_family: MakeFamily, make_package: MakePackage
) -> None:
    checkpoint = make_family("huginn")
    report = verify(make_package(checkpoint, **FAMILY_SIZES, **options), checkpoint, tokens=4)
    assert [failure for failure in report.failures() if not failure.startswith("quantization moved")] == []


# What a request can do


def test_noise_in_the_runtime_is_pytorchs_bit_for_bit() -> None:
    source = Path(start_state.__file__).read_text(encoding="utf-8")
    assert source == (Path(__file__).parents[1] / "models/melt_models/start_state.py").read_text(encoding="utf-8")


def test_the_seed_decides_the_answer_and_zeros_need_none(
    make_runtime: Callable[..., Runtime], make_family: MakeFamily
) -> None:
    runtime, model = make_runtime("huginn"), load_model(make_family("huginn"), dtype=torch.float32)
    logits = {}
    for name, options in (("0", {}), ("5", {"start_seed": 5}), ("zeros", {"start_state": "zeros"})):
        settings = LoopSettings(3, **options)
        logits[name] = runtime.driver().append([IDS], settings)[0]
        with torch.no_grad():
            expected = model(torch.tensor([IDS]), **options).logits[0, -1].numpy()
        assert error(logits[name], expected) <= MOST_ERROR
    assert error(logits["0"], logits["5"]) > 1e-3
    assert error(logits["0"], logits["zeros"]) > 1e-3


def test_tokens_of_one_seed_are_the_same_alone_in_a_batch_and_from_a_stream(
    make_runtime: Callable[..., Runtime],
) -> None:
    for options in (
        {},
        {"dialect": "portable"},
        {"share_caches": "last"},
        {"share_caches": "last", "dialect": "portable"},
    ):
        runtime = make_runtime("huginn", **options)
        prompts = [IDS, IDS[:3], [7]]
        request = {"max_tokens": 8, "ignore_eos": True, "start_seed": 3}
        together = runtime.generate(prompts, **request)
        alone = [runtime.generate(prompt, **request) for prompt in prompts]
        assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]


def test_sequences_of_a_batch_have_seeds_and_depths_of_their_own(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime("huginn", share_caches="last")
    each = [LoopSettings(3, start_seed=1), LoopSettings(2, start_seed=2), LoopSettings(5, start_state="zeros")]
    driver = runtime.driver(3)
    for tokens in ([IDS, IDS, IDS[:4]], [[5], [6], [7]], [[8], [], [9]]):
        together = driver.append(tokens, each)
    for slot, tokens in ((0, [IDS, [5], [8]]), (2, [IDS[:4], [7], [9]])):
        alone = runtime.driver()
        for new in tokens:
            logits = alone.append([new], each[slot])
        assert error(together[slot], logits[0]) <= MOST_ERROR


def test_sessions_fork_go_back_and_lie_in_a_file(make_runtime: Callable[..., Runtime], tmp_path: Path) -> None:
    for options in ({}, {"dialect": "portable"}, {"share_caches": "last", "dialect": "portable"}):
        runtime = make_runtime("huginn", **options)
        request: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "start_seed": 4}
        expected = runtime.generate(IDS, **request).token_ids
        session = runtime.session(**request)
        session.append(IDS)
        session.save(tmp_path / "session")
        fork = session.fork()
        assert session.generate().token_ids == expected
        assert fork.generate().token_ids == expected
        assert runtime.load_session(tmp_path / "session").generate().token_ids == expected
        session.truncate(8)
        session.append(IDS[8:])
        assert session.generate().token_ids == expected


def test_a_known_beginning_is_restored_only_for_its_own_start(make_runtime: Callable[..., Runtime]) -> None:
    runtime, prefixes = make_runtime("llama", share_caches="last"), PrefixCache(1 << 24)
    prompt = [*IDS, *IDS]
    expected = {}
    for seed in (0, 1, 0, 1):
        driver = runtime.driver()
        settings = LoopSettings(3, start_seed=seed)
        known = prefixes.restore(driver, 0, prompt, settings)
        logits = driver.append([prompt[known:]], settings)[0]
        prefixes.keep(driver, 0, prompt, settings)
        if seed in expected:
            assert known == 16
            assert error(logits, expected[seed]) <= MOST_ERROR
        else:
            assert known == 0
            expected[seed] = logits
    assert error(expected[0], expected[1]) > 1e-4


def test_tokens_leave_once_their_hidden_state_stands_still(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime("huginn", share_caches="last")
    answer = runtime.generate(IDS, max_tokens=8, ignore_eos=True, loops=12, exit_change=0.3)
    assert min(answer.depth) < 12
    assert min(answer.depth) >= 2
    exact = runtime.generate(IDS, max_tokens=8, ignore_eos=True, loops=12, exit_change=1e-9)
    assert set(exact.depth) == {12}


def entropies(logits: Any) -> Any:
    wide = logits.astype(np.float64)
    return (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )


@pytest.mark.parametrize("kind", ["huginn", "nanbeige"])
def test_a_token_leaves_once_what_the_head_says_of_it_stands_still(
    kind: str, make_runtime: Callable[..., Runtime]
) -> None:
    runtime, most = make_runtime(kind, share_caches="last"), 10
    driver = runtime.driver()
    driver.append([IDS], LoopSettings(most))
    [chunk] = driver.chunks([[5]])
    said = []
    for control in driver.loops(chunk, LoopSettings(most)):
        driver.state.coda(control)
        said.append(entropies(driver.state.logits(np.zeros((1, 1), np.int64))[0, 0].copy()))
    kl = [float((np.exp(b) * (b - a)).sum()) for a, b in pairwise(said)]
    best = [int(one.argmax()) for one in said]

    def depth(**how: Any) -> int:
        driver = runtime.driver()
        driver.append([IDS], LoopSettings(most, **how))
        assert set(driver.depth[0]) == {most}  # a prompt's chunk runs all loops
        driver.append([[5]], LoopSettings(most, **how))
        return driver.depth[0][-1]

    limit = sorted(kl)[len(kl) // 2] * 1.01
    assert depth(exit_kl=limit) == 2 + next(at for at, one in enumerate(kl) if one < limit) < most
    for same in (1, 2):
        stays = (at + 1 for at in range(same, most) if len(set(best[at - same : at + 1])) == 1)
        assert depth(exit_same=same) == next(stays, most)
    assert depth(exit_kl=limit, min_loops=9) >= 9


def test_what_the_head_says_ends_a_token_alike_alone_and_beside_others(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime("huginn", share_caches="last")
    prompts = [IDS, IDS[:3], [7], IDS[:5]]
    request: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True, "loops": 8, "exit_kl": 0.1, "exit_same": 3}
    together = runtime.generate(prompts, **request)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = runtime.generate(prompt, **request)
        assert (alone.token_ids, alone.depth) == (answer.token_ids, answer.depth)
    assert min(together[0].depth) < 8


def test_a_scheduler_answers_each_request_as_alone(make_runtime: Callable[..., Runtime]) -> None:
    for options in ({}, {"share_caches": "last"}):
        runtime = make_runtime("huginn", **options)
        asked = [
            (
                IDS[: 2 + which],
                {"max_tokens": 4 + which, "start_seed": which, "loops": 1 + which % 3, "ignore_eos": True},
            )
            for which in range(5)
        ]
        with Scheduler(runtime, slots=3, prefixes=PrefixCache(1 << 24)) as scheduler:
            handles = [scheduler.submit(Request(tuple(ids), runtime.options(**how))) for ids, how in asked]
            answers = [handle.result() for handle in handles]
        for (ids, how), answer in zip(asked, answers, strict=True):
            assert answer.token_ids == runtime.generate(ids, **how).token_ids


def test_the_server_takes_seed_start_and_exits(make_family: MakeFamily, make_package: MakePackage) -> None:
    package = make_package(make_family("huginn"), **FAMILY_SIZES, share_caches="last")
    runtime = Runtime.load(package)
    asked: tuple[dict[str, Any], ...] = (
        {"start_seed": 5},
        {"start_seed": 2**64 - 1, "exit_at_step": 0},
        {"start_state": "zeros"},
        {"exit_kl": 0.1, "exit_same": 2, "loops": 6},
    )
    with Server(package, "--name", "huginn") as server:
        url = f"{server.url}/v1/completions"
        body = {"model": "huginn", "prompt": IDS, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        for more in asked:
            [choice] = httpx.post(url, json=body | more, timeout=WAIT).json()["choices"]
            expected = runtime.generate(IDS, max_tokens=4, ignore_eos=True, **more)
            assert choice["token_ids"] == list(expected.token_ids), more
            assert choice["depth"] == list(expected.depth[len(IDS) - 1 :]), more
        refused: tuple[dict[str, Any], ...] = (
            {"start_seed": -1},
            {"start_state": "ones"},
            {"start_seed": 5, "start_state": "zeros"},
            {"exit_at_step": 3},
            {"exit_threshold": 0.5},
        )
        for wrong in refused:
            reply = httpx.post(url, json=body | wrong, timeout=WAIT)
            assert reply.status_code == 400
            assert all(name in reply.json()["error"]["message"] for name in wrong)


def test_exit_at_step_counts_loops_from_0_as_pytorch_does(
    make_runtime: Callable[..., Runtime], make_family: MakeFamily
) -> None:
    runtime, model = make_runtime("nanbeige"), load_model(make_family("nanbeige"), dtype=torch.float32)
    for step in (0, 1):
        answer = runtime.generate(IDS, max_tokens=1, exit_at_step=step, ignore_eos=True)
        with torch.no_grad():
            expected = model(torch.tensor([IDS]), exit_at_step=step).logits[0, -1]
        assert answer.token_ids == (int(expected.argmax()),)
        assert set(answer.depth) == {step + 1}
    for wrong in (2, -1, True, 0.5):
        with pytest.raises(ArgumentError, match="exit_at_step is"):
            runtime.generate(IDS, exit_at_step=wrong)


def test_shared_caches_have_one_size_at_any_number_of_loops(make_runtime: Callable[..., Runtime]) -> None:
    shared, own = (make_runtime("huginn", **o).manifest for o in ({"share_caches": "last"}, {}))
    once = own.cache_bytes_once(60)
    assert once > 0
    assert own.cache_bytes(60) == once + 3 * own.cache_bytes_per_loop(60)
    assert shared.cache_bytes(60) == once + own.cache_bytes_per_loop(60)
    assert shared.most_loops is None


# What a package says, and what is refused


def test_a_package_says_what_sharing_caches_costs(make_runtime: Callable[..., Runtime]) -> None:
    loss = make_runtime("huginn", share_caches="last").manifest.shared_caches
    assert loss["how"] == "last"
    assert loss["chunk"] == 1
    assert loss["kl"] > 0
    assert 0 <= loss["top1"] <= 1
    assert make_runtime("huginn").manifest.shared_caches == {}


def test_what_sharing_costs_is_measured_as_answers_are_written(make_family: MakeFamily, tmp_path: Path) -> None:
    losses = []
    for chunk in (8, 64):  # within a chunk nothing is lost
        options = ExportOptions(chunk=chunk, max_seq_len=64, share_caches="last")
        with building(make_family("nanbeige"), tmp_path / str(chunk), options):
            pass
        losses.append(Runtime.load(tmp_path / str(chunk)).manifest.shared_caches)
    assert losses[0] == losses[1]
    made = family("nanbeige")
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 50, 256).tolist()[:64]
    own, shared = Equations(made).loops(ids, 2)[-1], []
    equations = Equations(made, shared=True)
    for one in ids:
        shared.append(equations.loops([one], 2)[-1][0])
    want, got = entropies(own), entropies(np.stack(shared))
    assert losses[0]["kl"] == pytest.approx(float((np.exp(want) * (want - got)).sum(-1).mean()), rel=0.5)


def test_nanbeige_is_pipelined_with_the_tokens_of_plain_decoding(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime("nanbeige")
    for options in ({}, {"temperature": 0.9, "seed": 4}):
        asked: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, **options}
        found = runtime.generate(IDS, pipeline="on", **asked)
        assert found == runtime.generate(IDS, pipeline="off", **asked)
        assert found.pipeline is not None
        assert found.pipeline.tokens == 15


@pytest.mark.parametrize("options", [{}, {"share_caches": "last"}])
@pytest.mark.parametrize("kind", ["nanbeige", "huginn"])
def test_states_after_every_loop_are_pytorchs(
    kind: str, options: dict[str, Any], make_runtime: Callable[..., Runtime]
) -> None:
    made, runtime = family(kind), make_runtime(kind, **options)
    loops = loops_of(made)
    states = runtime.loops(IDS, start_seed=2)
    assert states.logits is not None
    assert states.exit_probability is None
    assert states.token_ids == tuple(IDS)
    equations, expected = Equations(made, shared=bool(options)), []
    for at in range(0, len(IDS), FAMILY_SIZES["chunk"]):
        ids = IDS[at : at + FAMILY_SIZES["chunk"]]
        noise = noise_of(made, 2, at, len(ids)) if kind in RAVENS else None
        expected.append(equations.loops(ids, loops, noise))
    for loop in range(loops):
        assert error(states.logits[loop], np.concatenate([piece[loop] for piece in expected])) <= MOST_ERROR
    assert states.hidden.shape == (loops, len(IDS), 64)
    first = runtime.loops(IDS, start_seed=2, loops=1, logits=False)
    assert first.logits is None
    same = FAMILY_SIZES["chunk"]  # a later chunk reads what the last loop left in shared caches
    assert error(first.hidden[0, :same], states.hidden[0, :same]) <= MOST_ERROR


def test_a_melts_states_come_with_its_exit_probabilities(tiny_package: Path) -> None:
    states = Runtime.load(tiny_package).loops(IDS)
    assert states.exit_probability is not None
    assert states.exit_probability.shape == (4, len(IDS))
    assert ((states.exit_probability > 0) & (states.exit_probability < 1)).all()


def test_states_that_no_memory_holds_are_refused(
    make_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("melt_runtime.decoding.loop_states.available_memory", lambda: 1000)
    with pytest.raises(ArgumentError, match="are available; give fewer tokens or loops"):
        make_runtime("nanbeige").loops(IDS)


# Full-size shapes

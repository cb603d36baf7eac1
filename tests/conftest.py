"""Small real models, exported once per session and shared by the tests."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from family_checkpoints import family
from melt_models import LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
from melt_runtime import Runtime
from processes import let_ctrl_c_through
from sharing import made_once, shared_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from melt_export.export import building
from melt_export.options import ExportOptions

if TYPE_CHECKING:
    from serving import Server

let_ctrl_c_through()
torch.set_num_threads(1)
# pytest captures loggers that do not propagate, and PyTorch then writes a trace of all its work.
logging.getLogger("torch.__trace").propagate = True

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,!?0123456789:"
TINY = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "total_ut_steps": 4,
    "chunk_size": 8,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}!{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

MakeCheckpoint = Callable[..., Path]
MakePackage = Callable[..., Path]
MakeFamily = Callable[..., Path]
FAMILY_SIZES = {"chunk": 8, "max_seq_len": 64}


def write_tokenizer(directory: Path, alphabet: str = ALPHABET) -> None:
    """Write a character-level tokenizer, by default of 45 tokens, with a chat template."""
    vocab = {token: index for index, token in enumerate(["<pad>", "<end>", "<unk>", *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<end>", "<unk>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that all processes of a test run share. Tests do not change its content."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def make_checkpoint(shared: Path) -> MakeCheckpoint:
    """A function that makes a random MELT checkpoint from config fields, once for equal fields.

    ``tokenizer``: whether it has a tokenizer; ``alphabet``: its characters.
    """

    def make(*, tokenizer: bool = False, alphabet: str = "", **fields: object) -> Path:
        def build(directory: Path) -> None:
            torch.manual_seed(0)
            MeltForCausalLM(MeltConfig(**{**TINY, **fields})).save_pretrained(directory)
            if tokenizer or alphabet:
                write_tokenizer(directory, alphabet or ALPHABET)

        return made_once(shared, "checkpoint", repr((tokenizer, alphabet, sorted(fields.items()))), build)

    return make


@pytest.fixture(scope="session")
def make_looplm(shared: Path) -> MakeCheckpoint:
    """A function that makes a random LoopLM (Ouro) checkpoint from config fields, once for equal fields."""

    def make(**fields: object) -> Path:
        def build(directory: Path) -> None:
            shape = {name: value for name, value in TINY.items() if name != "chunk_size"}
            torch.manual_seed(0)
            LoopLMForCausalLM(LoopLMConfig(**{**shape, **fields})).save_pretrained(directory)

        return made_once(shared, "looplm", repr(sorted(fields.items())), build)

    return make


@pytest.fixture(scope="session")
def make_package(shared: Path) -> MakePackage:
    """A function that exports a checkpoint, once for equal arguments. Do not change the package."""

    def make(checkpoint: Path, **options: object) -> Path:
        def build(directory: Path) -> None:
            with building(checkpoint, directory / "package", ExportOptions(**options)):  # type: ignore[arg-type]
                pass

        return made_once(shared, "packages", repr((checkpoint, sorted(options.items()))), build) / "package"

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    """The default small model, with a tokenizer."""
    return make_checkpoint(tokenizer=True)


@pytest.fixture(scope="session")
def tiny_package(make_package: MakePackage, tiny_checkpoint: Path) -> Path:
    """The default small model in fp32 for ONNX Runtime, with a tokenizer. Do not change it."""
    return make_package(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_package_without_tokenizer(make_package: MakePackage, make_checkpoint: MakeCheckpoint) -> Path:
    """The default small package without a tokenizer. Do not change it."""
    return make_package(make_checkpoint())


@pytest.fixture(scope="session")
def served_package(make_checkpoint: MakeCheckpoint, make_package: MakePackage) -> Path:
    """A small model that can write every printable character, with room for long streams in four slots."""
    alphabet = "\n" + "".join(map(chr, range(32, 127)))
    return make_package(make_checkpoint(vocab_size=104, max_position_embeddings=8192, alphabet=alphabet), max_batch=4)


@pytest.fixture(scope="session")
def served_runtime(served_package: Path) -> Runtime:
    """The runtime that the server's answers are compared with."""
    return Runtime.load(served_package)


@pytest.fixture(scope="module")
def server(served_package: Path) -> Iterator[Server]:
    """A server process with that package, one per test module."""
    from serving import Server  # imports the client, which only these tests need

    with Server(served_package) as server:
        yield server


@pytest.fixture
def package_copy(tiny_package: Path, tmp_path: Path) -> Path:
    """A copy of the default package that a test may change."""
    return Path(shutil.copytree(tiny_package, tmp_path / "copy"))


@pytest.fixture(scope="session")
def make_family(shared: Path) -> MakeFamily:
    """A function that writes a family's random checkpoint in its published layout, once for equal arguments."""

    def make(kind: str, **fields: Any) -> Path:
        return made_once(shared, "family", repr((kind, sorted(fields.items()))), family(kind, **fields).write)

    return make


@pytest.fixture(scope="session")
def make_runtime(make_family: MakeFamily, make_package: MakePackage) -> Callable[..., Runtime]:
    """A function that exports a family's checkpoint and loads the package."""

    def make(kind: str, **options: Any) -> Runtime:
        return Runtime.load(make_package(make_family(kind), **FAMILY_SIZES, **options))

    return make

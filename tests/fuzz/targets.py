"""Targets of the fuzzer. A target prepares itself once in its worker process, lists good inputs, and tries one at a
time.

To add one, write a class of this form and name it in ``TARGETS``. An error of ``refused`` is a refusal. Any other error
is a finding, and so are a death, a hang, and an unchecked allocation.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Protocol

from chat_styles import STYLES
from melt_runtime import MeltError, Package, Runtime
from melt_runtime.cli.inspect import describe
from melt_runtime.cli.tables import print_facts
from melt_runtime.loaded_model import load_tokenizer
from melt_runtime.package.onnx_file import external_data, initializer_bytes, read_operators
from melt_runtime.session import file as session_file
from melt_runtime.text.end_tokens import stop_ids_of
from melt_runtime.text.templating.chat_template import ChatTemplate
from melt_runtime.text.tokenizer_file import tokenizer_of
from safetensors import safe_open
from safetensors.numpy import save_file

from . import mutations


class Target(Protocol):
    """One kind of input. ``package``: a valid package, which it may change."""

    mutate: ClassVar[mutations.Mutate]
    refused: ClassVar[tuple[type[BaseException], ...]]

    def __init__(self, package: Path) -> None: ...

    def seeds(self) -> list[bytes]:
        """Return good inputs."""

    def attempt(self, content: bytes) -> None:
        """Use an input, or raise one of ``refused``."""


class ManifestTarget:
    """manifest.json: opened, described, loaded and run."""

    mutate = mutations.json_documents
    refused = (MeltError,)

    def __init__(self, package: Path):
        self.package = package
        self.path = package / "manifest.json"
        self.sound = self.path.read_bytes()

    def seeds(self) -> list[bytes]:
        content = json.loads(self.sound)
        rows = content["cache_rows"]
        sizes = {"batch": [1, 1, 1], "chunk": [1, 1, 1], "context": [8, 8, rows]}
        engine = {
            "flavour": "tensorrt-rtx",
            "version": "1.7.1",
            "compute_capabilities": ["8.9"],
            "precision": "fp32",
            "weights": None,
            "dialect": "standard",
            "profiles": [{"name": "decode", **sizes}],
            "buckets": [8, rows],
            "options": {"workspace": 512, "compute_capability": ["8.9"]},
            "source": "0" * 64,
            "files": {graph: {"sha256": "0" * 64, "bytes": 9} for graph in ("embed", "loop_step", "lm_head")},
        }
        weights = {"kind": "int8", "block": 32, "head": "int8", "method": "rtn", "raised": []}
        return [self.sound, json.dumps({**content, "engines": {"rtx": engine}, "weights": weights}).encode()]

    def attempt(self, content: bytes) -> None:
        self.path.write_bytes(content)
        print_facts(describe(Package.open(self.package, check_hashes=False)))
        runtime = Runtime.load(self.package, backend="onnxruntime", threads=1, check_hashes=False)
        runtime.generate([5, 6, 7], max_tokens=2, loops=min(runtime.manifest.loops, 4))


class TextTarget:
    """The tokenizer and its settings: read, and used once. An input names its file in its first line."""

    mutate = mutations.named_files
    refused = (MeltError,)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")

    def __init__(self, package: Path):
        self.package = package
        self.manifest = json.loads((package / "manifest.json").read_text())
        special = {"content": "<end>", "lstrip": False}
        config = {
            "bos_token": None,
            "eos_token": special,
            "model_max_length": 10**30,
            "chat_template": "{{ messages }}",
        }
        (package / "tokenizer_config.json").write_text(json.dumps(config))
        (package / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.5}))
        self.sound = {name: (package / name).read_bytes() for name in self.names}

    def seeds(self) -> list[bytes]:
        return [name.encode() + b"\n" + content for name, content in self.sound.items()]

    def attempt(self, content: bytes) -> None:
        name, _, text = content.partition(b"\n")
        files = self.sound | {name.decode(): text}
        for file, kept in files.items():
            (self.package / file).write_bytes(kept)
            self.manifest["files"][file] = {"sha256": "", "bytes": len(kept)}
        (self.package / "manifest.json").write_text(json.dumps(self.manifest))
        package = Package.open(self.package, check_hashes=False)
        stop_ids_of(package)
        tokenizer = load_tokenizer(package)
        assert tokenizer is not None
        tokenizer.decode(tokenizer.encode("12"))
        if tokenizer.has_chat_template:
            tokenizer.render_chat([{"role": "user", "content": "12"}])


class TemplateTarget:
    """A chat template: compiled, and rendered for a conversation."""

    mutate = mutations.templates
    refused = (MeltError,)

    def __init__(self, package: Path):
        pass

    def seeds(self) -> list[bytes]:
        return [template.encode() for template in STYLES.values()]

    def attempt(self, content: bytes) -> None:
        template = ChatTemplate(content.decode("utf-8", "replace"))
        turn = {"role": "user", "content": "hello 12"}
        messages = [turn, {**turn, "role": "assistant"}, turn]
        template.render({"messages": messages, "tools": None, "bos_token": "<s>", "eos_token": "</s>"})


class SessionTarget:
    """The description in a session file, under a correct hash."""

    mutate = mutations.json_documents
    refused = (MeltError,)

    def __init__(self, package: Path):
        self.runtime = Runtime.load(package, backend="onnxruntime", threads=1)
        self.path = package.parent / "fuzzed.session"
        session = self.runtime.session(temperature=0.5, seed=1)
        session.append([3, 4, 5, 6, 7, 8, 9, 3, 4, 5])
        session.generate(max_tokens=3)
        session.save(self.path)
        with safe_open(self.path, framework="numpy") as file:
            self.metadata = dict(file.metadata())
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def seeds(self) -> list[bytes]:
        said = {**json.loads(self.metadata["session"]), "messages": [{"role": "user", "content": "a"}]}
        return [self.metadata["session"].encode(), json.dumps(said).encode()]

    def attempt(self, content: bytes) -> None:
        metadata = {name: value for name, value in self.metadata.items() if name != "sha256"}
        metadata["session"] = content.decode("utf-8", "replace")
        metadata["sha256"] = session_file._digest(metadata, self.arrays)
        save_file(self.arrays, self.path, metadata)
        self.runtime.load_session(self.path).generate(max_tokens=1)


class SessionFileTarget(SessionTarget):
    """The bytes of a session file, which a hash protects."""

    mutate = mutations.bytes_of

    def seeds(self) -> list[bytes]:
        return [self.path.read_bytes()]

    def attempt(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self.runtime.load_session(self.path)


class ParityTarget:
    """parity.json, which may be invalid without spoiling the package."""

    mutate = mutations.json_documents
    refused = ()

    def __init__(self, package: Path):
        self.package = Package.open(package)

    def seeds(self) -> list[bytes]:
        said = {"passed": False, "failures": ["hidden of loop 3 differs"], "manifest_sha256": "0" * 64}
        return [json.dumps(said).encode()]

    def attempt(self, content: bytes) -> None:
        (self.package.directory / "parity.json").write_bytes(content)
        print_facts(describe(self.package))


class GraphTarget:
    """The bytes of an ONNX file, read by our own reader. ONNX Runtime's reader is not tried."""

    mutate = mutations.bytes_of
    refused = (MeltError,)

    def __init__(self, package: Path):
        self.package = package
        self.path = package / "fuzzed.onnx"

    def seeds(self) -> list[bytes]:
        return [(self.package / f"{graph}.onnx").read_bytes() for graph in ("embed", "loop_step", "lm_head")]

    def attempt(self, content: bytes) -> None:
        self.path.write_bytes(content)
        external_data(self.path)
        read_operators(self.path)
        initializer_bytes(self.path)


class CheckpointTarget:
    """config.json of every kind of checkpoint: read and checked, and its model built without memory."""

    mutate = mutations.json_documents
    refused: ClassVar[tuple[type[BaseException], ...]]

    def __init__(self, package: Path):
        from family_checkpoints import family
        from melt_models import CheckpointError, LoopLMConfig, LoopLMForCausalLM, MeltConfig, MeltForCausalLM
        from melt_models.checkpoint import open_checkpoint, open_weights, read_config
        from melt_models.convert import melt_config, melt_state
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        type(self).refused = (CheckpointError,)
        sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        self.places = {}
        for model in (
            MeltForCausalLM(MeltConfig(**sizes, chunk_size=8)),
            LoopLMForCausalLM(LoopLMConfig(**sizes, total_ut_steps=3)),
            LlamaForCausalLM(LlamaConfig(**sizes)),
        ):
            self.places[model.config.model_type] = package.parent / model.config.model_type
            model.save_pretrained(self.places[model.config.model_type])
        for name in ("nanbeige", "huginn"):
            made = family(name)
            self.places[made.config["model_type"]] = made.write(package.parent / name)

        def convert(directory: Path) -> None:
            config = read_config(directory)
            melt_state(melt_config(config), open_weights(directory, config))

        self.open, self.convert = open_checkpoint, convert

    def seeds(self) -> list[bytes]:
        return [(place / "config.json").read_bytes() for place in self.places.values()]

    def attempt(self, content: bytes) -> None:
        kind = next((kind for kind in self.places if f'"model_type": "{kind}"'.encode() in content), "melt")
        (self.places[kind] / "config.json").write_bytes(content)
        (self.convert if kind == "llama" else self.open)(self.places[kind])


class TokenizerTarget:
    """tokenizer.json with faults over which the tokenizers library panics and ends the process."""

    mutate = mutations.json_documents
    refused = (ValueError,)

    def __init__(self, package: Path):
        """Prepare nothing."""

    def seeds(self) -> list[bytes]:
        empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
        common = {"version": "1.0", "added_tokens": [], **empty}
        pairs = {"type": "BPE", "vocab": {"é": 0, "##é": 1, "éé": 2}, "merges": [["é", "##é"]]}
        deltas = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
        template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
        swap = {"type": "Replace", "pattern": {"String": "a"}, "content": "é"}
        first = {"SpecialToken": {"id": "<unk>", "type_id": 0}}
        parts = {
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "é"}, swap, swap]},
            "decoder": {"type": "Sequence", "decoders": [swap, {"type": "Fuse"}, swap]},
            "post_processor": {
                **template,
                "single": [first, *template["single"]],
                "pair": [],
                "special_tokens": {"<unk>": {"id": "<unk>", "ids": [0, 0], "tokens": ["<unk>", "<unk>"]}},
            },
        }
        return [
            json.dumps({**common, "model": deltas, **parts}).encode(),
            json.dumps({**common, "model": {**pairs, "continuing_subword_prefix": "##"}}).encode(),
            json.dumps({**common, "model": {**pairs, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}).encode(),
            json.dumps(
                {**common, "model": deltas, "post_processor": {**template, "pair": [], "special_tokens": {}}}
            ).encode(),
        ]

    def attempt(self, content: bytes) -> None:
        tokenizer = tokenizer_of(content.decode("utf-8"))
        with suppress(Exception):  # ordinary errors are fine; a panic is not an Exception
            tokenizer.decode(tokenizer.encode("a é").ids)


TARGETS: dict[str, Callable[[Path], Target]] = {
    "manifest": ManifestTarget,
    "text": TextTarget,
    "template": TemplateTarget,
    "session": SessionTarget,
    "session file": SessionFileTarget,
    "parity": ParityTarget,
    "graph": GraphTarget,
    "checkpoint": CheckpointTarget,
    "tokenizer": TokenizerTarget,
}


def prepared(name: str, package: Path, work: Path) -> Target:
    """Return a target with a copy of the package in an empty directory."""
    return TARGETS[name](Path(shutil.copytree(package, work / "package")))

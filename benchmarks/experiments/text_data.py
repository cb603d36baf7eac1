"""Gathers free text from Debian's packages and packs it for training: token files, a tokenizer, and what is in them.

    python benchmarks/experiments/text_data.py [--out build/text/data]

Needs `apt-get` and `dpkg` of a Debian 12; nothing is installed. Documents are split before anything else: held-out ones
train neither the tokenizer nor a model. Per source the folder holds NAME.bin and NAME-held-out.bin (uint16 token ids,
the end token after each document); data.json says what they are.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from melt_models.atomic import new_directory
from sources import SOURCES, Source
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END, PAD = "<|end|>", "<|pad|>"
LENGTH = 1024  # tokens that the models are built for


def unpack(source: Source, folder: Path) -> None:
    """Download a source's packages and unpack them into ``folder``."""
    subprocess.run(["apt-get", "download", "-q", *source.packages], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package.name, "."], cwd=folder, check=True)


def gather(source: Source) -> dict[bool, list[tuple[str, str]]]:
    """Return a source's documents (name, text): False: to train on; True: held out."""
    with tempfile.TemporaryDirectory(prefix="melt-text-") as name:
        unpack(source, Path(name))
        documents = list(source.read(Path(name)))
    split: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for number, (document, text) in enumerate(documents):
        split[source.is_held_out(document, number)].append((document, text))
    if not all(split.values()):
        raise ValueError(f"{source.name}: no document {'to train on' if split[True] else 'is held out'}")
    return split


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=LENGTH,
    )


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """Return the tokens of all documents, each followed by the end token: (n,) uint16."""
    end = [tokenizer.eos_token_id]
    parts = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + end for text in texts]
    return np.concatenate([np.array(part, dtype=np.uint16) for part in parts])


def pack(out: Path, gathered: dict[str, dict[bool, list[tuple[str, str]]]]) -> dict[str, Any]:
    """Write tokenizer, token files and data.json into ``out``. Returns the content of data.json."""
    training = [text for split in gathered.values() for _, text in split[False]]
    tokenizer = train_tokenizer(block for text in training for block in text.split("\n\n"))
    tokenizer.save_pretrained(out / "tokenizer")
    content: dict[str, Any] = {"vocabulary": len(tokenizer), "sources": {}}
    known = {source.name: source for source in SOURCES}
    for name, split in gathered.items():
        source = known[name]
        about: dict[str, Any] = {
            "title": source.title,
            "packages": list(source.packages),
            "licence": source.licence,
            "held_out": [document for document, _ in split[True]],
        }
        for held_out, part in ((False, "training"), (True, "held-out")):
            texts = [text for _, text in split[held_out]]
            tokens = tokens_of(tokenizer, texts)
            (out / f"{name}{'-held-out' * held_out}.bin").write_bytes(tokens.tobytes())
            size = sum(len(text.encode()) for text in texts)
            about[part] = {"documents": len(texts), "bytes": size, "tokens": len(tokens)}
        content["sources"][name] = about
    (out / "data.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def main(
    out: Annotated[Path, typer.Option(help="Where the packed data are written.")] = Path("build/text/data"),
    source: Annotated[list[str] | None, typer.Option(help="Only this source; repeatable.")] = None,
) -> None:
    """Gather, split, tokenize and pack the text."""
    chosen = [one for one in SOURCES if not source or one.name in source]
    if source and len(chosen) != len(set(source)):
        raise typer.BadParameter(f"there are {', '.join(one.name for one in SOURCES)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    gathered = {one.name: gather(one) for one in chosen}
    with new_directory(out, force=True) as build:
        content = pack(build, gathered)
    for name, about in content["sources"].items():
        parts = [
            f"{part}: {about[part]['documents']} documents, {about[part]['tokens']:,} tokens"
            for part in ("training", "held-out")
        ]
        print(f"{name}: {'; '.join(parts)}")


if __name__ == "__main__":
    typer.run(main)

"""Batches: nothing lost, nothing mixed up, train and test apart, and a resumed stream is the uninterrupted one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from melt_models.training.data import (
    IGNORE,
    Batch,
    Batches,
    FileBatches,
    TaskBatches,
    character_tokenizer,
    make_batches,
)
from melt_models.training.tasks import END, PAD, Addition, make_task
from transformers import AutoTokenizer

CHARACTERS = (PAD, END, *"abcdefghijklmnopqrstuvwxyz0123456789 \n")
IDS = {token: index for index, token in enumerate(CHARACTERS)}
LENGTH = 7
DOCUMENTS = [f"document {n} {'abc' * (n % 5)}" for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    character_tokenizer(CHARACTERS, 64).save_pretrained(directory)
    return directory


def write(directory: Path, kind: str, documents: list[str] = DOCUMENTS) -> list[str]:
    """The documents in two files of a kind; of token files, their tokens. Or a directory of three such files."""
    if kind == "dataset":
        place = directory / "set" / "data"
        place.mkdir(parents=True)
        for part in range(3):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in documents[part::3])
            (place / f"train-{part:05d}-of-00003.jsonl").write_text(rows)
        return [str(directory / "set")]
    names = []
    for part, texts in enumerate((documents[:25], documents[25:])):
        file = directory / f"part{part}[{kind}]"  # datasets takes file names for patterns
        if kind == "text":
            file = file.with_suffix(".txt")
            file.write_text("".join(text + "\n" for text in texts))
        elif kind == "jsonl":
            file = file.with_suffix(".jsonl")
            file.write_text("".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)))
        elif kind == "parquet":
            file = file.with_suffix(".parquet")
            pq.write_table(pa.table({"text": texts}), file, row_group_size=4)
        else:
            file = file.with_suffix(f".{kind}")
            tokens = np.array([IDS[c] for text in texts for c in text], dtype=np.uint16)
            np.save(file, tokens) if kind == "npy" else tokens.tofile(file)
        names.append(str(file))
    return names


def options(directory: Path, kind: str, tokenizer: Path, **more: Any) -> dict[str, Any]:
    source = {"npy": "tokens", "bin": "tokens"}.get(kind, kind)
    files = write(directory, kind)
    made = {source: files[0] if kind == "dataset" else files, "tokenizer": str(tokenizer), "sequence_length": LENGTH}
    made |= more
    made |= {"dtype": "uint16"} if kind == "bin" else {}
    return made if source == "tokens" else {"shuffle_buffer": 6, **made}


def stream(batches: Batches, tokens: int) -> list[str]:
    """The inputs of a stream, one after the other: with no token lost or doubled, that is the corpus."""
    found: list[int] = []
    while len(found) < tokens:
        found += batches.take(3, 0.0).input_ids.flatten().tolist()
    return [CHARACTERS[token] for token in found[:tokens]]


def documents(tokens: list[str]) -> list[str]:
    """The documents that end in a stream."""
    return "".join(tokens).split(END)[:-1]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.input_ids, b.input_ids) and torch.equal(a.targets, b.targets)


kinds = pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "dataset", "npy", "bin"])
documents_only = pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "dataset"])


# Tasks


def test_a_task_batch_reads_the_example_and_predicts_the_answer_and_end() -> None:
    task = Addition(digits=3)
    batch = TaskBatches(task, seed=0).take(20, 1.0)
    assert batch.input_ids.shape == batch.targets.shape == (20, task.prompt_tokens + task.answer_tokens - 1)
    for read, predicted in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        text = "".join(task.vocabulary[token] for token in read)
        prompt, answer = text[: task.prompt_tokens], text[task.prompt_tokens :]
        a, b = prompt.removesuffix("=").split("+")
        assert answer == f"{int(a) + int(b):03d}"
        assert predicted[: task.prompt_tokens - 1] == [IGNORE] * (task.prompt_tokens - 1)
        assert "".join(task.vocabulary[token] for token in predicted[task.prompt_tokens - 1 :]) == answer + END


@pytest.mark.parametrize("task", ["addition", "modular", "p-hop"])
def test_a_resumed_task_stream_continues_as_if_never_interrupted(task: str) -> None:
    whole, first = (make_batches({"task": task}, seed=3) for _ in range(2))
    expected = [whole.take(4, step / 6) for step in range(6)]
    for step in range(3):
        assert same(first.take(4, step / 6), expected[step])
    resumed = make_batches({"task": task}, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(3, 6):
        assert same(resumed.take(4, step / 6), expected[step])


def test_task_batches_differ_by_seed_and_from_one_to_the_next() -> None:
    one, other = TaskBatches(Addition(), seed=0), TaskBatches(Addition(), seed=1)
    first = one.take(8, 0.5)
    assert not same(first, one.take(8, 0.5))
    assert not same(first, other.take(8, 0.5))


def test_held_out_task_batches_hold_only_held_out_examples() -> None:
    task = Addition(digits=5)
    for held_out in (False, True):
        batch = TaskBatches(task, seed=0, held_out=held_out).take(30, 1.0)
        prompts = ["".join(task.vocabulary[t] for t in row[: task.prompt_tokens]) for row in batch.input_ids.tolist()]
        assert {task.example(*map(int, p[:-1].split("+"))).held_out for p in prompts} == {held_out}


@pytest.mark.parametrize("name", ["addition", "modular", "p-hop"])
def test_the_saved_task_tokenizer_adds_nothing_and_loses_nothing(tmp_path: Path, name: str) -> None:
    task = make_task(name)
    batches = TaskBatches(task, seed=0)
    batches.save_tokenizer(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    example = task.test_set(1)[0]
    ids = saved(example.prompt + example.answer + END)["input_ids"]
    assert [task.vocabulary[token] for token in ids] == [*example.prompt, *example.answer, END]
    assert saved.decode(ids) == example.prompt + example.answer + END
    assert (len(saved), saved.pad_token_id, saved.eos_token_id) == (batches.vocab_size, 0, 1)
    assert (batches.pad_token_id, batches.eos_token_id) == (0, 1)


# Files


@kinds
def test_targets_are_the_tokens_after_the_inputs(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    batch = make_batches(options(tmp_path, kind, tokenizer), seed=0).take(5, 0.0)
    assert batch.input_ids.shape == batch.targets.shape == (5, LENGTH)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])


@documents_only
def test_packing_loses_no_document_and_no_token(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    batches = make_batches(options(tmp_path, kind, tokenizer, held_out_percent=0), seed=0)
    tokens = sum(len(text) + 1 for text in DOCUMENTS)
    both = stream(batches, 2 * tokens)
    for epoch in (both[:tokens], both[tokens:]):
        assert epoch[-1] == END
        assert sorted(documents(epoch)) == sorted(DOCUMENTS)


@documents_only
def test_every_epoch_has_another_order(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    tokens = sum(len(text) + 1 for text in DOCUMENTS)
    given = options(tmp_path, kind, tokenizer, held_out_percent=0)
    both = stream(make_batches(given, seed=0), 2 * tokens)
    orders = [both[:tokens], both[tokens:], stream(make_batches(given, seed=1), tokens)]
    assert len({tuple(documents(order)) for order in orders} | {tuple(DOCUMENTS)}) == 4


@kinds
@pytest.mark.parametrize("before", [1, 2, 9, 40, 47])
def test_a_resumed_stream_continues_as_if_never_interrupted(
    tmp_path: Path, tokenizer: Path, kind: str, before: int
) -> None:
    """An epoch is about 100 sequences: 40 batches of 3 lie after its end."""
    given = options(tmp_path, kind, tokenizer)
    whole, first = make_batches(given, seed=5), make_batches(given, seed=5)
    expected = [whole.take(3, 0.0) for _ in range(before + 45)]
    for batch in expected[:before]:
        assert same(first.take(3, 0.0), batch)
    state = json.dumps(first.state_dict())
    first.take(3, 0.0)  # a state already taken does not move with its stream
    resumed = make_batches(given, seed=5)
    resumed.load_state_dict(json.loads(state))
    for batch in expected[before:]:
        assert same(resumed.take(3, 0.0), batch)
    assert json.dumps(resumed.state_dict()) == json.dumps(whole.state_dict())


def test_a_position_stays_small_in_a_long_document(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "long.txt").write_text("a" * 100_000 + "\n")
    given = {"text": str(tmp_path / "long.txt"), "tokenizer": str(tokenizer), "sequence_length": 100}
    batches = make_batches(given, seed=0)
    batches.take(10, 0.0)
    assert len(json.dumps(batches.state_dict())) < 1000


@documents_only
def test_a_document_is_either_trained_on_or_held_out(tmp_path: Path, tokenizer: Path, kind: str) -> None:
    given = options(tmp_path, kind, tokenizer, held_out_percent=25)
    tokens = 4 * sum(len(text) + 1 for text in DOCUMENTS)  # enough to see all of either part
    parts = [
        set(documents(stream(make_batches(given, seed=seed, held_out=held_out), tokens)))
        for seed, held_out in enumerate((False, True))
    ]
    assert parts[0] | parts[1] == set(DOCUMENTS)
    assert not parts[0] & parts[1]
    assert 4 <= len(parts[1]) <= 16


def test_the_last_part_of_token_files_is_held_out(tmp_path: Path, tokenizer: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(2, 39, dtype=np.int64))
    given = {"tokens": str(tmp_path / "ids.npy"), "tokenizer": str(tokenizer), "sequence_length": 3}
    seen = []
    for held_out in (False, True):
        batches = make_batches({**given, "held_out_percent": 20}, seed=0, held_out=held_out)
        taken = [batches.take(10, 0.0) for _ in range(20)]
        seen.append({int(x) for batch in taken for x in torch.cat((batch.input_ids, batch.targets), 1).flatten()})
    assert seen == [set(range(2, 32)), set(range(32, 39))]


def test_an_epoch_of_token_files_has_every_sequence_once(tmp_path: Path, tokenizer: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(0, 13, dtype=np.uint32))
    np.save(tmp_path / "b.npy", np.arange(20, 29, dtype=np.int32))
    given = {"tokens": [str(tmp_path / f"{n}.npy") for n in "ab"], "tokenizer": str(tokenizer), "sequence_length": 4}
    batches = make_batches({**given, "held_out_percent": 0}, seed=0)
    epochs = [batches.take(5, 0.0).input_ids.tolist() for _ in range(3)]
    for epoch in epochs:
        assert sorted(x for row in epoch for x in row) == [*range(12), *range(20, 28)]
    assert epochs[0] != epochs[1]


def test_paragraphs_or_whole_files_can_be_the_documents(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\nthree\n")
    found = {}
    for document in ("line", "paragraph", "file"):
        given = {"text": str(tmp_path / "a.txt"), "tokenizer": str(tokenizer), "sequence_length": 3}
        batches = make_batches({**given, "document": document, "held_out_percent": 0}, seed=0)
        found[document] = {text.strip() for text in documents(stream(batches, 60))}
    assert found == {"line": {"one", "two", "three"}, "paragraph": {"one\ntwo", "three"}, "file": {"one\ntwo\n\nthree"}}


def test_rows_without_text_are_passed_over(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "abc"}\n{"body": null}\n{"body": " "}\n{"body": "def"}\n')
    given = {"jsonl": str(tmp_path / "a.jsonl"), "tokenizer": str(tokenizer), "sequence_length": 4, "field": "body"}
    batches = make_batches({**given, "held_out_percent": 0}, seed=0)
    assert sorted(documents(stream(batches, 8))) == ["abc", "def"]


def test_file_batches_save_the_tokenizer_that_they_read_with(tmp_path: Path, tokenizer: Path) -> None:
    batches = make_batches(options(tmp_path, "text", tokenizer), seed=0)
    batches.save_tokenizer(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("abc")["input_ids"] == [IDS[c] for c in "abc"]
    assert (batches.vocab_size, batches.pad_token_id, batches.eos_token_id) == (len(CHARACTERS), 0, 1)


# Data sets


def saved(directory: Path) -> Path:
    """A directory that save_to_disk wrote, with the splits train and tests."""
    parts = {
        name: datasets.Dataset.from_dict(
            {"text": texts}, features=datasets.Features({"text": datasets.Value("string")})
        )
        for name, texts in (("train", DOCUMENTS), ("tests", ["kept apart", "this too"]))
    }
    datasets.DatasetDict(parts).save_to_disk(directory, num_shards={"train": 4, "tests": 1})
    return directory


def test_a_saved_data_set_is_read_and_a_split_of_it_held_out(tmp_path: Path, tokenizer: Path) -> None:
    given = {"dataset": str(saved(tmp_path / "saved")), "tokenizer": str(tokenizer), "sequence_length": LENGTH}
    given["held_out"] = "tests"
    tokens = sum(len(text) + 1 for text in DOCUMENTS)
    assert sorted(documents(stream(make_batches(given, seed=0), tokens))) == sorted(DOCUMENTS)
    apart = set(documents(stream(make_batches(given, seed=0, held_out=True), 60)))
    assert apart == {"kept apart", "this too"}


def test_a_saved_data_set_resumes_within_a_shard(tmp_path: Path, tokenizer: Path) -> None:
    given = {"dataset": str(saved(tmp_path / "saved")), "tokenizer": str(tokenizer), "sequence_length": LENGTH}
    given["shuffle_buffer"] = 6
    whole, first = make_batches(given, seed=5), make_batches(given, seed=5)
    expected = [whole.take(3, 0.0) for _ in range(60)]
    for batch in expected[:20]:
        assert same(first.take(3, 0.0), batch)
    resumed = make_batches(given, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(same(resumed.take(3, 0.0), batch) for batch in expected[20:])


HUB = """
import sys, json
import datasets
from pathlib import Path
from melt_models.training.data import make_batches

asked, local = [], datasets.load_dataset

def load_dataset(name, subset=None, *, split, revision=None, streaming):
    asked.append([name, subset, split, revision, streaming])
    return local(sys.argv[1], split="train", streaming=streaming)

datasets.load_dataset = load_dataset
given = {"dataset": "org/set@abc", "subset": "en", "split": "part", "tokenizer": sys.argv[2], "sequence_length": 7}
ids = make_batches(given, seed=0).take(2, 0.0).input_ids
print(json.dumps([asked[0], list(ids.shape)]))
"""


def test_a_data_set_of_a_hub_is_asked_for_by_name_subset_split_and_revision(tmp_path: Path, tokenizer: Path) -> None:
    (directory,) = write(tmp_path, "dataset")
    done = subprocess.run(
        [sys.executable, "-c", HUB, directory, str(tokenizer)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["org/set", "en", "part", "abc", True], [2, 7]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"dataset": "nowhere"},
            "data set nowhere, split train, cannot be read: it is no directory, and no name on a hub",
        ),
        ({"dataset": "no-such/thing"}, "data set no-such/thing, split train, cannot be read: "),
        ({"split": "test"}, r"data set .*set, split test, cannot be read: .*train"),
        ({"subset": "english"}, r"split train, cannot be read: .*english"),
        ({"field": "body"}, "there is no field 'body', only text"),
        ({"held_out": "train"}, "the split train is both trained on and held out"),
        ({"held_out": ["a.txt"]}, r"held_out is \['a.txt'\]; it must be a name"),
        ({"held_out": "test", "held_out_percent": 3}, "held_out and held_out_percent exclude each other"),
        ({"dataset": ["a", "b"]}, "must be a name on a hub or a directory"),
        ({"document": "line"}, "data from a dataset has no option document"),
    ],
)
def test_data_sets_that_cannot_be_read_are_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=said) as error:
        make_batches(options(tmp_path, "dataset", tokenizer) | change, seed=0)
    assert "\n" not in str(error.value)


# Refusals


def spoil(directory: Path, given: dict[str, Any], case: str) -> None:
    """Makes the good options or files of a case bad."""
    if case == "missing":
        given["text"] = "nowhere.txt"
    elif case == "empty":
        given["text"] = str(directory / "empty.txt")
        Path(given["text"]).touch()
    elif case == "blank":
        given["text"] = str(directory / "blank.txt")
        Path(given["text"]).write_text("\n \n")
    elif case == "latin":
        given["text"] = str(directory / "latin.txt")
        Path(given["text"]).write_bytes(b"caf\xe9\n")
    elif case == "no eos":
        given["tokenizer"] = str(directory / "no-eos")
        made = character_tokenizer(CHARACTERS, 64)
        made.eos_token = None
        made.save_pretrained(given["tokenizer"])


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("missing", "data file nowhere.txt does not exist"),
        ("empty", r"empty.txt is empty"),
        ("blank", r"no document of .*blank.txt is left to train on"),
        ("latin", r"latin.txt cannot be read as text: .*utf-8"),
        ("no eos", "names no eos_token"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, tokenizer: Path, case: str, said: str) -> None:
    given = options(tmp_path, "text", tokenizer)
    spoil(tmp_path, given, case)
    with pytest.raises(ValueError, match=said):
        make_batches(given, seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"field": "body"}, "there is no field 'body', only text, id"),
        ({"field": "id"}, "field 'id' holds 0, which is not text"),
        ({"sequence_length": 0}, "sequence_length is 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ({"held_out_percent": 100}, "held_out_percent is 100"),
        ({"dtype": "uint16"}, "data from jsonl files has no option dtype"),
        ({"text": "a.txt"}, "it names jsonl and text|it names text and jsonl"),
        ({"tokenizer": "nowhere"}, "tokenizer directory nowhere does not exist"),
        ({"jsonl": 3}, "must be a file's name or a list of them"),
        ({"jsonl": []}, "must be a file's name or a list of them"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, tokenizer: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make_batches(options(tmp_path, "jsonl", tokenizer) | change, seed=0)


def test_a_data_section_without_a_source_or_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="it names none of them"):
        make_batches({"sequence_length": 8}, seed=0)
    with pytest.raises(ValueError, match="needs tokenizer and sequence_length"):
        make_batches({"text": "a.txt"}, seed=0)
    with pytest.raises(ValueError, match="task addition has no option colour"):
        make_batches({"task": "addition", "colour": 1}, seed=0)


def test_broken_json_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    given = {"jsonl": str(tmp_path / "bad.jsonl"), "tokenizer": str(tokenizer), "sequence_length": 4}
    with pytest.raises(ValueError, match=r"bad.jsonl cannot be read as json"):
        make_batches(given, seed=0)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    given = options(tmp_path, "text", tokenizer) | {"tokenizer": str(tmp_path)}
    with pytest.raises(ValueError, match="has no tokenizer that transformers can read"):
        make_batches(given, seed=0)


def test_a_tokenizer_over_which_its_library_panics_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    broken = Path(shutil.copytree(tokenizer, tmp_path / "broken"))
    content = json.loads((broken / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    (broken / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"broken has no tokenizer that transformers can read"):
        make_batches(options(tmp_path, "text", tokenizer) | {"tokenizer": str(broken)}, seed=0)


def test_nothing_held_out_is_said_when_it_is_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"no document of .* is held out"):
        make_batches(options(tmp_path, "text", tokenizer, held_out_percent=0), seed=0, held_out=True)


@pytest.mark.parametrize(
    ("name", "content", "dtype", "said"),
    [
        ("ids.npy", np.arange(50, dtype=np.uint16), None, "the files hold token 49, and .* has only 40"),
        ("ids.npy", np.arange(-9, 30), None, "the files hold token -9"),
        ("ids.npy", np.zeros(50), None, "holds float64 of shape"),
        ("ids.npy", np.zeros((5, 10), dtype=np.int64), None, r"shape \(5, 10\)"),
        ("ids.npy", np.zeros(3, dtype=np.int64), None, "has no 8 tokens in a row"),
        ("ids.npy", np.zeros(50, dtype=np.int64), "uint16", "says its own type"),
        ("ids.bin", np.zeros(50, dtype=np.uint16), None, "dtype is None; it must be uint16 or uint32"),
        ("ids.bin", np.zeros(51, dtype=np.uint16), "uint32", "has 102 bytes"),
        ("ids.bin", np.full(50, 7, dtype=np.uint16), "uint32", "the files hold token 458759"),
        ("ids.dat", np.zeros(50, dtype=np.uint16), None, "must end in .npy or .bin"),
    ],
)
def test_token_files_that_make_no_sense_are_refused(
    tmp_path: Path, tokenizer: Path, name: str, content: np.ndarray, dtype: str | None, said: str
) -> None:
    file = tmp_path / name
    np.save(file, content) if name.endswith("npy") else content.tofile(file)
    with pytest.raises(ValueError, match=said):
        FileBatches("tokens", [file], tokenizer, LENGTH, 0, dtype=dtype, held_out_percent=0).take(7, 0.0)

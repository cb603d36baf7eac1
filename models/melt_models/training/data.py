"""Batches of token ids for training, from a synthetic task or packed from files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from melt_hub import Kind, local_directory

from .documents import DataSet
from .tasks import END, PAD, Task, make_task

if TYPE_CHECKING:
    from .files import DocumentStream, TokenStream

IGNORE = -100
# Keys of the data section by kind of file, beside tokenizer and sequence_length.
FILE_OPTIONS = {
    "text": ("document", "shuffle_buffer", "held_out_percent", "held_out"),
    "jsonl": ("field", "shuffle_buffer", "held_out_percent", "held_out"),
    "parquet": ("field", "shuffle_buffer", "held_out_percent", "held_out"),
    "tokens": ("dtype", "held_out_percent", "held_out"),
    "dataset": ("split", "subset", "field", "shuffle_buffer", "held_out_percent", "held_out"),
}
_WORDS = {kind: "a dataset" if kind == "dataset" else f"{kind} files" for kind in FILE_OPTIONS}
# Files of a tokenizer, which may be named on a hub.
_TOKENIZER = Kind("tokenizer", ("*.json", "*.jinja", "*.model", "merges.txt"), ("*/*",))


class Batch(NamedTuple):
    """``input_ids`` (batch, n) int64, and ``targets`` (batch, n) int64: the token after each input token, or IGNORE."""

    input_ids: Tensor
    targets: Tensor


class Batches(Protocol):
    """Endless stream of batches that can be saved and resumed at any point."""

    vocab_size: int
    pad_token_id: int | None
    eos_token_id: int | None
    sequence_length: int  # n of a batch

    @property
    def epoch(self) -> int:
        """Number of times that the data have begun anew."""
        ...

    def take(self, size: int, progress: float) -> Batch:
        """Return the next ``size`` sequences. ``progress`` (0 to 1) is the run's, for curricula."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the stream's position as JSON values.

        A stream that loads it continues with exactly the same batches.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save_tokenizer(self, directory: Path) -> None: ...


class TaskBatches:
    """Examples of a task, generated on demand. The loss covers the answer and END; targets of the prompt are IGNORE.

    A batch depends only on the seed, the number of sequences taken before, its size and the progress.
    """

    def __init__(self, task: Task, seed: int, held_out: bool = False):
        self.task, self.seed, self.held_out, self.taken = task, seed, held_out, 0
        self.ids = {token: index for index, token in enumerate(task.vocabulary)}
        self.vocab_size = len(self.ids)
        self.pad_token_id: int | None = self.ids[PAD]
        self.eos_token_id: int | None = self.ids[END]
        self.sequence_length = task.prompt_tokens + task.answer_tokens - 1
        self.epoch = 0  # examples are drawn, not repeated

    def take(self, size: int, progress: float) -> Batch:
        rng = np.random.default_rng([self.seed, self.taken])
        examples = self.task.sample(rng, size, self.held_out, progress)
        self.taken += size
        rows = [[*(self.ids[c] for c in x.prompt + x.answer), self.ids[END]] for x in examples]
        tokens = torch.tensor(rows)
        targets = tokens[:, 1:].clone()
        targets[:, : self.task.prompt_tokens - 1] = IGNORE
        return Batch(tokens[:, :-1], targets)

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.taken = int(state["taken"])

    def save_tokenizer(self, directory: Path) -> None:
        length = self.task.prompt_tokens + self.task.answer_tokens
        character_tokenizer(self.task.vocabulary, length).save_pretrained(directory)


def character_tokenizer(vocabulary: tuple[str, ...], length: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character.

    ``length``: the largest number of tokens that the model supports.
    """
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=length,
    )


class FileBatches:
    """Packed sequences from files or a data set, epoch after epoch, each in another order.

    ``kind`` is text, jsonl, parquet or dataset (documents, each followed by eos; see ``DocumentStream``) or tokens
    (flat ids; see ``TokenStream``); ``options`` are those of FILE_OPTIONS. ``tokenizer`` is a directory with the
    checkpoint's tokenizer. A sequence begins with the last token of the one before, so that every token is a target.
    ``held_out`` reads the part that is not trained on. Raises ValueError for unusable options or files, in take() for
    faults found while reading.
    """

    def __init__(
        self,
        kind: str,
        files: list[Path] | DataSet,
        tokenizer: Path,
        sequence_length: int,
        seed: int,
        held_out: bool = False,
        **options: Any,
    ):
        from .files import DocumentStream, TokenStream, file_source

        if type(sequence_length) is not int or sequence_length < 1:
            raise ValueError(f"sequence_length is {sequence_length!r}; it must be a whole number from 1")
        self.sequence_length = sequence_length
        self.tokenizer = read_tokenizer(tokenizer)
        self.vocab_size = len(self.tokenizer)
        self.pad_token_id: int | None = self.tokenizer.pad_token_id
        self.eos_token_id: int | None = self.tokenizer.eos_token_id
        self.stream: TokenStream | DocumentStream
        if kind == "tokens":
            assert isinstance(files, list)
            self.stream = TokenStream(files, sequence_length, seed, held_out, **options)
            return
        unit = {"document": options.pop("document")} if "document" in options else {}
        source = files if isinstance(files, DataSet) else file_source(kind, files, **unit)
        self.stream = DocumentStream(source, self._encode, sequence_length, seed, held_out, **options)

    @property
    def epoch(self) -> int:
        return max(0, self.stream.epoch)

    def take(self, size: int, progress: float) -> Batch:
        rows = np.stack([self.stream.next() for _ in range(size)])
        if int(rows.max()) >= self.vocab_size or int(rows.min()) < 0:
            wrong = int(rows.max() if rows.max() >= self.vocab_size else rows.min())
            raise ValueError(
                f"the files hold token {wrong}, and the tokenizer in {self.tokenizer.name_or_path} has only "
                f"{self.vocab_size}; they were written with another tokenizer or dtype"
            )
        tokens = torch.from_numpy(rows)
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def state_dict(self) -> dict[str, Any]:
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stream.load_state_dict(state)

    def save_tokenizer(self, directory: Path) -> None:
        self.tokenizer.save_pretrained(directory)

    def _encode(self, text: str) -> np.ndarray:
        """Return a document's tokens and eos, (n,) int64."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array([*ids, self.eos_token_id], dtype=np.int64)


def read_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a checkpoint directory, from local files only. Raises ValueError if it has no eos token."""
    if not directory.is_dir():
        raise ValueError(f"tokenizer directory {directory} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # transformers raises errors of many kinds; a panic of tokenizers is no Exception
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{directory} has no tokenizer that transformers can read: {reason[0]}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {directory} names no eos_token, which must stand between documents")
    return tokenizer


def make_batches(options: Mapping[str, Any], seed: int, held_out: bool = False) -> Batches:
    """Make batches from the ``data`` section of a run's YAML file, for training or from the held-out part.

    The section names a task and its options; or one of text, jsonl, parquet and tokens with one file or a list, or a
    dataset by its name, with ``tokenizer``, ``sequence_length`` and options of FILE_OPTIONS. ``held_out`` names files,
    or a split, that are held out in place of a percentage of the others. Raises ValueError, and OSError where a hub is
    asked in vain for a tokenizer.
    """
    sources = [name for name in ("task", *FILE_OPTIONS) if name in options]
    if len(sources) != 1:
        named = " and ".join(sources) or "none of them"
        raise ValueError(f"data must name exactly one of task, {', '.join(FILE_OPTIONS)}; it names {named}")
    kind, rest = sources[0], dict(options)
    source = rest.pop(kind)
    if kind == "task":
        return TaskBatches(make_task(source, **rest), seed, held_out)
    known = ("tokenizer", "sequence_length", *FILE_OPTIONS[kind])
    unknown = [name for name in rest if name not in known]
    if unknown:
        raise ValueError(f"data from {_WORDS[kind]} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    missing = [name for name in known[:2] if name not in rest]
    if missing:
        raise ValueError(f"data from {_WORDS[kind]} needs {' and '.join(missing)}")
    directory, length = rest.pop("tokenizer"), rest.pop("sequence_length")
    if not isinstance(directory, str):
        raise ValueError(f"data: tokenizer is {directory!r}; it must be a directory's name")
    place = local_directory(directory, _TOKENIZER)
    if "held_out" in rest and "held_out_percent" in rest:
        raise ValueError("data: held_out and held_out_percent exclude each other")
    if kind == "dataset":
        split_apart = "held_out" in rest
        split = _split(source, rest, held_out)
        return FileBatches(kind, split, place, length, seed, held_out and not split_apart, **rest)
    files = _files(kind, source)
    if "held_out" in rest:
        apart = _files("held_out", rest.pop("held_out"))
        both = {file.resolve() for file in files} & {file.resolve() for file in apart}
        if both:
            raise ValueError(f"data: {min(both)} is both trained on and held out")
        files, held_out, rest["held_out_percent"] = apart if held_out else files, False, 0.0
    return FileBatches(kind, files, place, length, seed, held_out, **rest)


def _files(key: str, names: Any) -> list[Path]:
    names = names if isinstance(names, list) else [names]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"data: {key} must be a file's name or a list of them")
    return [Path(name) for name in names]


def _split(name: Any, rest: dict[str, Any], held_out: bool) -> DataSet:
    """Take a data set's own keys out of ``rest`` and return the split to read. Raises ValueError."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"data: dataset is {name!r}; it must be a name on a hub or a directory")
    split, subset, apart = rest.pop("split", "train"), rest.pop("subset", None), rest.pop("held_out", None)
    for key, value in (("split", split), ("subset", subset), ("held_out", apart)):
        if not isinstance(value, str) and not (value is None and key != "split"):
            raise ValueError(f"data: {key} is {value!r}; it must be a name")
    if apart is None:
        return DataSet(name, split, subset)
    if apart == split:
        raise ValueError(f"data: the split {split} is both trained on and held out")
    rest["held_out_percent"] = 0.0
    return DataSet(name, apart if held_out else split, subset)

"""Packages in EleutherAI's lm-evaluation-harness, as its model ``melt_run``.

    python -m melt_runtime.lm_eval run --model melt_run --model_args package=DIR,loops=2 --tasks TASK

takes every option of the ``lm_eval`` command. After ``import melt_runtime.lm_eval``, ``lm_eval.simple_evaluate`` knows
the model.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from .decoding.next_logits import NextLogits
from .errors import ArgumentError
from .runtime import Runtime
from .sampling.logprobs import logprobs_of
from .scheduler.request import Request, RequestHandle
from .scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)
_LOADED = ("backend", "threads", "low_memory", "engine", "check_hashes", "expected_hash")
_ROWS = 1 << 22  # logits that are read at once, 16 MiB
_MOST_TOKENS = 256  # per answer, as in the harness's hf model
_WAITING = 64
Pair = tuple[list[int], list[int]]  # context and continuation
T = TypeVar("T")


class _Score:
    """Reads the log probabilities of continuations of one length that follow the same tokens but for their last."""

    def __init__(self, length: int, continuations: Sequence[Sequence[int]]):
        self._continuations, self._first = continuations, length - len(continuations[0])
        self.sums = np.zeros(len(continuations), np.float64)
        self.greedy = np.ones(len(continuations), np.bool_)

    def read(self, logits: NextLogits, slot: int, start: int, tokens: Sequence[int]) -> None:
        """Read a chunk that has run. Raises ArgumentError if the model returns NaN."""
        at, step = max(self._first - start, 0), max(_ROWS // logits.size, 1)
        while at < len(tokens):
            for row in logits.of_chunk(slot, slice(at, min(at + step, len(tokens)))):
                self._take(start + at - self._first, row)
                at += 1

    def _take(self, place: int, row: Any) -> None:
        if np.isnan(row).any():
            raise ArgumentError("the model returned NaN logits; check its weights and the precision it runs in")
        for number, continuation in enumerate(self._continuations):
            found = logprobs_of(row, continuation[place], 1)
            self.sums[number] += found.token
            self.greedy[number] &= found.top[0][0] == continuation[place]

    def answers(self) -> list[tuple[float, bool]]:
        """Return each continuation's log probability, and whether it is what greedy decoding would say."""
        return list(zip(self.sums.tolist(), self.greedy.tolist(), strict=True))


@register_model("melt_run")
class MeltRun(TemplateLM):
    """A package, scored and continued by the runtime. Raises MeltError.

    ``package``: its directory. ``batch_size``: sequences that run at once, "auto" for the most that the package has
    room for. ``device``: "cpu", "cuda" or "cuda:1". ``max_length``: tokens per sequence, by default the package's;
    longer ones lose their beginning, as in the harness's ``hf`` model. ``add_bos_token``, ``prefix_token_id``: as
    there.

    ``options``: loading options of ``Runtime.load``, and depth options of ``Runtime.generate``: ``loops``,
    ``exit_threshold``, ``chunk`` and so on.
    """

    def __init__(
        self,
        package: str | None = None,
        pretrained: str | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = _MOST_TOKENS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        **options: Any,
    ):
        super().__init__()
        if package is not None and pretrained not in (None, package):
            raise ArgumentError(
                f"package is {package!r} and pretrained {pretrained!r} in --model_args; give one of them"
            )
        directory = package or pretrained
        if directory is None:
            raise ArgumentError("no package is named; give --model_args package=DIR")
        loading = {name: options.pop(name) for name in _LOADED if name in options}
        self.runtime = Runtime.load(directory, **_on_device(device), **loading)
        if self.runtime.tokenizer is None:
            raise ArgumentError(f"{directory} has no tokenizer, and the harness gives text")
        self._directory, self._text = str(directory), self.runtime.tokenizer
        self._options = options
        self._depth = self.runtime.options(**options)  # refuses what it does not know, before anything runs
        self._add_bos, self._prefix = add_bos_token, prefix_token_id
        self.max_gen_toks = max_gen_toks
        room = self.runtime.manifest.max_seq_len
        self.max_length = room if max_length is None else min(int(max_length), room)
        self._scheduler = Scheduler(self.runtime, self._slots(batch_size, max_batch_size), max_waiting=_WAITING)

    def _slots(self, batch_size: int | str | None, most: int | None) -> int:
        room = self.runtime.backend.max_batch if most is None else min(most, self.runtime.backend.max_batch)
        if isinstance(batch_size, str) and batch_size.partition(":")[0] == "auto":
            return room
        wanted = 1 if batch_size is None else int(batch_size)
        if wanted > room:
            logger.warning("batch_size is %s; the package runs %s sequences at once", wanted, room)
        return min(wanted, room)

    @property
    def tokenizer_name(self) -> str:
        """The package's directory, which names its tokenizer and template in the harness's caches."""
        return self._directory

    @property
    def batch_size(self) -> int:
        """How many sequences run at once."""
        return self._scheduler.slots

    def _special(self, *names: str) -> int | None:
        """Return the id of the first of these special tokens that the tokenizer has."""
        texts = [self._text.special_tokens[name] for name in names if name in self._text.special_tokens]
        ids = [self._text.token_id(text) for text in texts]
        return next((one for one in ids if one is not None), None)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises ArgumentError if there is none."""
        own = self._special("eos_token")
        ends = sorted(self.runtime.stop_ids) if own is None else [own]
        if not ends:
            raise ArgumentError("the package has no end token; name the token before a text: prefix_token_id=ID")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context follows: the one asked for, the tokenizer's BOS, or its EOS."""
        if self._prefix is not None:
            return self._prefix
        first = self._special("bos_token")
        return self.eot_token_id if first is None else first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's token ids. Unless told, special tokens are added to a text that does not begin with BOS."""
        begin = self._text.special_tokens.get("bos_token")
        if add_special_tokens is None:
            written = begin is not None and string.startswith(begin)
            add_special_tokens = False if written else self._add_bos is not False
        ids = self._text.encode(string, add_special_tokens)
        first = self._special("bos_token")
        if self._add_bos and add_special_tokens and first is not None and ids[:1] != [first]:
            return [first, *ids]
        return ids

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self._text.decode([tokens] if isinstance(tokens, int) else tokens, skip_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the prompt of a conversation."""
        return self._text.render_chat(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return nothing: the package's own template is used, whatever its name."""
        return "" if self._text.has_chat_template else None

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found: dict[int, tuple[float, bool]] = {}
        groups = self._grouped(pairs)
        scores = [_Score(len(ids), [pairs[one][1] for one in members]) for ids, members in groups]
        made = (
            Request(ids, self._depth, reading=score, prompt_only=True)
            for (ids, _), score in zip(groups, scores, strict=True)
        )
        for (_, members), score, _ in zip(groups, scores, self._run(made, len(groups), disable_tqdm), strict=True):
            for one, answer in zip(members, score.answers(), strict=True):
                found[one] = answer
                if requests[one][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[one][0], answer)
        return [found[one] for one in range(len(pairs))]

    def _grouped(self, pairs: Sequence[Pair]) -> list[tuple[tuple[int, ...], list[int]]]:
        """Return the sequences to run, longest first, each with the numbers of its pairs: those that differ only in the
        continuation's last token share a run. Raises ArgumentError."""
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ArgumentError("a request to score has no context or no continuation, in tokens")
            if len(continuation) > self.max_length:
                raise ArgumentError(
                    f"a continuation has {len(continuation)} tokens; the package has room for {self.max_length}"
                )
            whole = (*context, *continuation)
            if len(whole) > self.max_length + 1:
                logger.warning("%s tokens are cut from the left to %s", len(whole), self.max_length + 1)
            ids = whole[-(self.max_length + 1) :][:-1]
            groups.setdefault((ids, len(continuation)), []).append(number)
        ordered = sorted(groups.items(), key=lambda group: -len(group[0][0]))
        return [(ids, members) for (ids, _), members in ordered]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return each text's log probability, in windows of ``max_length`` tokens that do not overlap."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return each prompt's continuation, up to its stop strings or the end token."""
        prepared = [self._generation(*request.args) for request in requests]
        made = (request for request, _ in prepared)
        texts = []
        for request, (_, until), handle in zip(
            requests, prepared, self._run(made, len(prepared), disable_tqdm), strict=True
        ):
            text = postprocess_generated_text(handle.result().text, stop=until, think_end_token=None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _generation(self, prompt: str, asked: Mapping[str, Any]) -> tuple[Request, list[str]]:
        """Return the request for a prompt, and its stop strings. Raises ArgumentError."""
        options = normalize_gen_kwargs(dict(asked), self.max_gen_toks)
        until = handle_stop_sequences(options.pop("until", None), eos=None)
        tokens = options.pop("max_gen_toks")
        if options.pop("do_sample"):
            options.setdefault("temperature", 1.0)
        room = self.max_length - tokens
        if room < 1:
            raise ArgumentError(f"max_gen_toks is {tokens}; a sequence of the package has room for {self.max_length}")
        own = {**options, "max_tokens": tokens, "stop": [one for one in until if one]}
        for name in self._options.keys() & own.keys():
            if name not in asked and name != "stop":
                del own[name]  # the harness's default, such as a temperature of 0
            elif self._options[name] != own[name]:
                raise ArgumentError(
                    f"{name} is {own[name]!r} in the task's generation arguments and {self._options[name]!r} in "
                    "--model_args; give one of them"
                )
        made = self.runtime.options(**{**self._options, **own})
        return Request(tuple(self.tok_encode(prompt)[-room:]), made), until

    def _run(self, requests: Iterator[Request], count: int, quiet: bool) -> Iterator[RequestHandle]:
        """Yield the handles of requests that have ended, in order. Raises MeltError if one failed."""
        with tqdm(total=count, disable=quiet, desc="melt_run") as bar:
            for handle in _ahead(requests, self._scheduler.submit, self._scheduler.slots + _WAITING):
                handle.result()
                bar.update()
                yield handle


def _ahead(items: Iterator[Request], begin: Callable[[Request], T], most: int) -> Iterator[T]:
    """Yield what ``begin`` returns for each item, having begun up to ``most`` of them."""
    begun: deque[T] = deque()
    for item in items:
        if len(begun) == most:
            yield begun.popleft()
        begun.append(begin(item))
    yield from begun


def _on_device(device: str | None) -> dict[str, Any]:
    """Translate the harness's ``device`` for ``Runtime.load``. Raises ArgumentError."""
    if device is None:
        return {}
    kind, _, index = str(device).partition(":")
    if kind == "cpu" and not index:
        return {"backend": "onnxruntime"}
    if kind == "cuda" and (index.isdecimal() or not index):
        return {"device": int(index or 0)}
    raise ArgumentError(f'device is {device!r}; it must be "cpu", "cuda" or "cuda:NUMBER"')


if __name__ == "__main__":
    cli_evaluate()

"""What ``generate``, ``stream``, sessions and the scheduler take as prompts and options, and what they refuse."""

from __future__ import annotations

import array
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from melt_runtime import ArgumentError, Generator, PromptError, Request, Runtime, Scheduler

IDS = [5, 6, 7, 8]
LONG: dict[str, Any] = {"max_tokens": 6, "ignore_eos": True}
ROOT = Path(__file__).parent.parent

Take = Callable[..., Any]


@pytest.fixture(scope="module")
def runtime(tiny_package: Path) -> Runtime:
    return Runtime.load(tiny_package)


def generated(runtime: Runtime, prompt: Any, **options: Any) -> str:
    return runtime.generate(prompt, **options).text


def streamed(runtime: Runtime, prompt: Any, **options: Any) -> str:
    return "".join(runtime.stream(prompt, **options))


def in_a_session(runtime: Runtime, prompt: Any, **options: Any) -> str:
    session = runtime.session()
    session.append(prompt)
    return session.generate(**options).text


def in_a_session_of_its_own(runtime: Runtime, prompt: Any, **options: Any) -> str:
    session = runtime.session(**options)
    session.append(prompt)
    return "".join(session.stream())


def scheduled(runtime: Runtime, prompt: Any, **options: Any) -> str:
    with Scheduler(runtime, 1) as scheduler:
        return scheduler.submit(Request(prompt, runtime.options(**options))).result(60).text


def by_hand(runtime: Runtime, prompt: Any, **options: Any) -> str:
    generator = Generator(runtime.driver(), [prompt], runtime.options(**options), runtime.tokenizer)
    return "".join(delta.text for delta in generator)


WAYS: list[Take] = [generated, streamed, in_a_session, in_a_session_of_its_own, scheduled, by_hand]
every_way = pytest.mark.parametrize("take", WAYS, ids=lambda take: take.__name__)

ROWS: dict[str, Callable[[], Any]] = {
    "list": lambda: IDS,
    "tuple": lambda: tuple(IDS),
    "range": lambda: range(5, 9),
    "deque": lambda: deque(IDS),
    "array": lambda: array.array("i", IDS),
    "numpy": lambda: np.array(IDS),
    "numpy bytes": lambda: np.array(IDS, np.uint8),
    "torch": lambda: torch.tensor(IDS),
    "numpy numbers": lambda: list(np.array(IDS, np.int32)),
    "torch numbers": lambda: list(torch.tensor(IDS)),
    "iterator": lambda: iter(IDS),
}


@every_way
@pytest.mark.parametrize("kind", ROWS)
def test_ids_of_every_kind_are_the_same_prompt(runtime: Runtime, take: Take, kind: str) -> None:
    assert take(runtime, ROWS[kind](), **LONG) == runtime.generate(IDS, **LONG).text


@pytest.mark.parametrize("kind", [np.array, torch.tensor, list], ids=["numpy", "torch", "list"])
def test_rows_of_ids_are_several_prompts(runtime: Runtime, kind: Callable[[Any], Any]) -> None:
    rows = [IDS, [9, 10, 11, 12]]
    expected = [runtime.generate(row, **LONG) for row in rows]
    assert runtime.generate(kind(rows), **LONG) == expected
    assert runtime.generate(kind(rows[:1]), **LONG) == expected[:1]
    assert runtime.generate([kind(row) for row in rows], **LONG) == expected


def test_text_and_ids_may_be_prompts_of_one_call(runtime: Runtime) -> None:
    assert runtime.generate(["hello", np.array(IDS)], **LONG) == [
        runtime.generate(prompt, **LONG) for prompt in ("hello", IDS)
    ]


NO_PROMPTS: dict[str, Any] = {
    "None": None,
    "bytes": b"ab",
    "bytearray": bytearray(b"ab"),
    "memoryview": memoryview(b"ab"),
    "dict": {5: 6},
    "set": {5, 6},
    "callable": len,
    "class": list,
    "number": 5,
    "fraction": 1.5,
    "booleans": [True, False],
    "numpy booleans": np.array([True, False]),
    "fractions": np.array([1.5, 2.0]),
    "half a tensor": torch.tensor([5.0, 6.0]),
    "a None inside": [5, None],
    "bytes inside": [b"ab"],
    "a dict inside": [{"input_ids": [5]}],
    "rows of rows": [[[5, 6]]],
}


@every_way
@pytest.mark.parametrize("kind", NO_PROMPTS)
def test_what_is_no_prompt_is_refused_by_name(runtime: Runtime, take: Take, kind: str) -> None:
    with pytest.raises(PromptError, match="must be text or a list of"):
        take(runtime, NO_PROMPTS[kind], **LONG)


@pytest.mark.parametrize("wrong", [b"a", b"", {5}, {5: 5}, None, "a", [True], 5.0], ids=repr)
def test_a_driver_refuses_the_same(runtime: Runtime, wrong: Any) -> None:
    driver = runtime.driver()
    driver.append([IDS], runtime.options().loops)
    with pytest.raises(PromptError, match="whole numbers"):
        driver.append([wrong], runtime.options().loops)


@every_way
def test_a_tensor_without_values_is_refused(runtime: Runtime, take: Take) -> None:
    with pytest.raises(PromptError, match="cannot be read"):
        take(runtime, torch.zeros(2, dtype=torch.long, device="meta"), **LONG)


def test_a_request_of_text_is_told_to_encode_it(runtime: Runtime) -> None:
    with pytest.raises(PromptError, match=r"token ids, and this one is text; give Runtime\.encode"):
        Request("hello", runtime.options())  # type: ignore[arg-type]


def test_a_tokenizers_dict_is_told_what_to_give(runtime: Runtime) -> None:
    with pytest.raises(PromptError, match="of type dict; give its input_ids"):
        runtime.generate({"input_ids": IDS})  # type: ignore[call-overload]


def test_a_prompt_too_many_is_found_before_the_others_run(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runtime, "_together", lambda *_: pytest.fail("it ran"))
    with pytest.raises(PromptError, match="outside the vocabulary"):
        runtime.generate([IDS] * 20 + [[50]])


# Options


NO_STOPS = [
    *(b"ab", bytearray(b"a"), {"a": 1}, len, lambda text: True, 5, 1.5, True, [b"ab"], ["a", None], [5]),
    *(torch.tensor(2), np.array(2)),
]


@every_way
@pytest.mark.parametrize("stop", NO_STOPS, ids=lambda stop: type(stop).__name__)
def test_what_is_no_stop_string_is_refused_by_name(runtime: Runtime, take: Take, stop: Any) -> None:
    with pytest.raises(ArgumentError, match=r"(?i)stop.* must be"):
        take(runtime, IDS, stop=stop)


@every_way
@pytest.mark.parametrize("ids", [b"ab", {5: 6}, len, "ab", True, [True], [None], torch.tensor([1.5])], ids=str)
def test_what_are_no_stop_ids_is_refused_by_name(runtime: Runtime, take: Take, ids: Any) -> None:
    with pytest.raises(ArgumentError, match=r"stop_ids is .* must be whole numbers"):
        take(runtime, IDS, stop_ids=ids)


@pytest.mark.parametrize("stop", [["x", "y"], ("x", "y"), {"x", "y"}, iter(["x", "y"]), dict.fromkeys("xy").keys()])
def test_stop_strings_may_be_any_collection_of_texts(runtime: Runtime, stop: Any) -> None:
    assert set(runtime.options(stop=stop).stop) == {"x", "y"}


def test_stop_strings_of_an_iterator_hold_for_all_calls_of_a_session(runtime: Runtime) -> None:
    text = runtime.generate(IDS, **LONG).text
    session = runtime.session(stop=iter([text[2]]), **LONG)
    session.append(IDS)
    assert session.generate().finish_reason == "stop"


def test_stop_ids_may_be_a_tensor(runtime: Runtime) -> None:
    assert runtime.options(stop_ids=torch.tensor([7, 8]), ignore_eos=True).stop_ids == {7, 8}
    assert runtime.options(stop_ids=torch.tensor(7), ignore_eos=True).stop_ids == {7}


def test_numpys_numbers_are_numbers(runtime: Runtime, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "max_tokens": np.int64(4),
        "loops": np.int32(3),
        "exit_threshold": np.float32(0.5),
        "temperature": np.float64(0.5),
        "seed": np.uint8(3),
        "ignore_eos": np.True_,
    }
    plain = {name: value.item() for name, value in given.items()}
    assert runtime.options(**given) == runtime.options(**plain)
    session = runtime.session(**given)
    session.append(IDS)
    session.save(tmp_path / "file")
    assert runtime.load_session(tmp_path / "file").options == plain


@pytest.mark.parametrize("value", ["false", 0, None])
def test_ignore_eos_is_true_or_false(runtime: Runtime, value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"ignore_eos is .* True or False"):
        runtime.options(ignore_eos=value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokns", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("max_new_token", "max_tokens"),
        ("num_loops", "loops"),
        ("looops", "loops"),
        ("chunk_size", "chunk"),
        ("temprature", "temperature"),
        ("repeat_penalty", "repetition_penalty"),
        ("stop_token_ids", "stop_ids"),
        ("eos_token_id", "stop_ids"),
        ("stop_sequences", "stop"),
    ],
)
def test_an_unknown_option_suggests_the_one_that_is_meant(runtime: Runtime, name: str, meant: str) -> None:
    options: dict[str, Any] = {name: 5}
    for call in (runtime.generate, runtime.stream, lambda _, **given: runtime.session(**given)):
        with pytest.raises(ArgumentError, match=f"unknown option '{name}'; did you mean '{meant}'"):
            call(IDS, **options)  # type: ignore[operator]
    session = runtime.session()
    session.append(IDS)
    with pytest.raises(ArgumentError, match=f"did you mean '{meant}'"):
        session.generate(**options)


def test_an_option_like_no_other_is_told_all_there_are(runtime: Runtime) -> None:
    with pytest.raises(ArgumentError, match=r"unknown option 'zzz'; the options are max_tokens, loops, .*ignore_eos"):
        runtime.generate(IDS, zzz=1)  # type: ignore[call-overload]


SNIPPET = """
import numpy as np
from melt_runtime import GenerateOptions, Generation, Runtime

def f(runtime: Runtime) -> None:
    one: Generation = runtime.generate("a", max_tokens=5, stop=["x"], loops=None)
    several: list[Generation] = runtime.generate(["a", "b"], temperature=0.5)
    given: GenerateOptions = {"seed": 3}
    runtime.generate(np.array([1, 2]), **given)
    runtime.session(top_k=3).generate(max_tokens=2)
    runtime.generate("a", max_tokns=5)  # wrong
    runtime.stream("a", max_tokns=5)  # wrong
    runtime.session(max_tokns=5)  # wrong
    runtime.session().generate(max_tokns=5)  # wrong
    runtime.options(max_tokns=5)  # wrong
    runtime.generate("a", max_tokens="5")  # wrong
"""


def test_a_misspelt_option_fails_in_mypy(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET, encoding="utf-8")
    settings = tmp_path / "mypy.ini"
    settings.write_text(f"[mypy]\nmypy_path = {ROOT / 'runtime'}\nignore_missing_imports = true\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", "--config-file", settings, snippet],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    wrong = [number for number, line in enumerate(SNIPPET.split("\n"), 1) if line.endswith("# wrong")]
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert sorted(found) == wrong, done.stdout + done.stderr

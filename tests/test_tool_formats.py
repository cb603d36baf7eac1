"""Which way a package's model writes calls, as its chat template shows."""

from __future__ import annotations

from typing import Any

import chat_styles
import pytest
from melt_runtime.server.tool_formats import model_format
from melt_runtime.server.tool_prompts import rendered
from melt_runtime.server.tool_schema import Tool
from melt_runtime.text.tokenizer import TextTokenizer
from tokenizers import Tokenizer, models


def tokenizer(template: str | None, tool_template: str | None = None) -> TextTokenizer:
    return TextTokenizer(Tokenizer(models.WordLevel({"a": 0}, "a")), {}, template, tool_template)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (chat_styles.QWEN_3, ("hermes", True, True)),
        (chat_styles.LLAMA_3, ("llama", True, False)),
        (chat_styles.CHATML, ("hermes", False, False)),
        (chat_styles.LLAMA_2, ("hermes", False, False)),
        ("{{ tools }}[TOOL_CALLS]", ("mistral list", True, False)),
        ("{{ tools }}[TOOL_CALLS]f[ARGS]{}", ("mistral", True, False)),
        ("{{ tools }}[func_name1(params_name1=params_value1)]", ("pythonic", True, False)),
        ("{{ tools }}<tool_call><function=f><parameter=a>", ("hermes", False, False)),  # XML, which is not read
        ("{{ tools }}<｜tool▁calls▁begin｜></think>", ("hermes", False, True)),
        ("{{ messages }}<tool_call>", ("hermes", False, False)),
        (None, ("hermes", False, False)),
    ],
    ids=str,
)
def test_the_template_shows_how_calls_are_written(template: str | None, expected: tuple[str, bool, bool]) -> None:
    found = model_format(tokenizer(template))
    assert (found.tools.name, found.native, found.thinks) == expected


def test_a_template_for_tools_alone_counts() -> None:
    found: Any = model_format(tokenizer("{{ messages }}", "{{ tools }}<tool_call>"))
    assert (found.tools.name, found.native) == ("hermes", True)


CLOCK = Tool.model_validate({"type": "function", "function": {"name": "clock"}})
USER = "{% if m.role == 'user' %}[{{ m.content }}]{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}" + USER + "{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + USER
        + "{% endfor %}",
    ],
    ids=["left out", "refused"],
)
def test_tools_are_explained_to_the_user_where_a_template_takes_no_system_message(template: str) -> None:
    ours = tokenizer(template)
    text = rendered(ours, model_format(ours), [{"role": "user", "content": "What time is it?"}], [CLOCK], {})
    assert text.startswith("[You can call these functions")
    assert '"name": "clock"' in text
    assert text.endswith("What time is it?]")

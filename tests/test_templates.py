"""Chat templates see and say what they do in transformers, over a collection in the styles of today's models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_styles import STYLES
from melt_runtime.errors import PackageError, PromptError
from melt_runtime.text.tokenizer import TextTokenizer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

TOKENS = {"<s>": 0, "</s>": 1, "<p>": 2, "<unk>": 3, "<img>": 4, "<|im_start|>": 5, "<|im_end|>": 6}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather <now> & later",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Zürich, 東京"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}},
]
CALL = {"id": "call12345", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}
USER, ANSWER = {"role": "user", "content": "  Hi {{ you }} <b>\n"}, {"role": "assistant", "content": " hello "}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one question": [USER],
    "turns": [USER, ANSWER, USER],
    "system": [{"role": "system", "content": "Be kind."}, USER, ANSWER, {"role": "user", "content": "日本 😀"}],
    "ends with an answer": [USER, ANSWER],
    "thought": [USER, {"role": "assistant", "content": "<think>\nwell\n</think>\n\nyes"}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "yes", "reasoning": "because"}],
    "tools": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": 3}', "name": "get_weather", "tool_call_id": "call12345"},
    ],
    "two users": [USER, USER],
    "parts": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what is it? "}]}],
    "nothing more than a role": [USER, {"role": "assistant", "content": "", "tool_calls": None}],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"tools": TOOLS},
    "thinking": {"enable_thinking": True},
    "no thinking": {"enable_thinking": False, "custom": {"a": [1, None]}},
    "documents": {"documents": [{"title": "T", "text": "x"}]},
    "another token": {"bos_token": "<other>", "date_string": "1 May 2030"},
}


def checkpoint(directory: Path, config: dict[str, Any], tokens_map: dict[str, Any] | None = None) -> Path:
    """A tokenizer's files as a checkpoint has them."""
    Tokenizer(models.WordLevel(TOKENS, unk_token="<unk>")).save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if tokens_map is not None:
        (directory / "special_tokens_map.json").write_text(json.dumps(tokens_map), encoding="utf-8")
    return directory


def reference(tokenizer: Any, messages: Any, **options: Any) -> str | None:
    """What transformers renders; None where it refuses."""
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, **{"add_generation_prompt": True, **options})
        )
    except Exception:  # whatever Jinja, Python or the template raises
        return None


def rendered(ours: TextTokenizer, messages: Any, **options: Any) -> str | None:
    """What we render; None where we refuse."""
    try:
        return ours.render_chat(messages, **options)
    except (PackageError, PromptError):
        return None


@pytest.mark.parametrize("style", STYLES)
def test_a_template_renders_as_in_transformers(tmp_path: Path, style: str) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "image_token": "<img>"}
    directory = checkpoint(tmp_path, {**config, "chat_template": STYLES[style]})
    tokenizer, ours = AutoTokenizer.from_pretrained(directory), TextTokenizer.load(directory)
    compared = 0
    for chat, messages in CHATS.items():
        for name, options in OPTIONS.items():
            expected = reference(tokenizer, messages, **options)
            assert rendered(ours, messages, **options) == expected, (chat, name)
            compared += expected is not None
    assert compared >= len(OPTIONS)


@pytest.mark.parametrize(
    ("config", "tokens_map"),
    [
        ({}, {"bos_token": "<s>", "image_token": "<img>"}),
        ({"pad_token": "<p>"}, {"bos_token": {"content": "<s>", "lstrip": False}}),
        ({"bos_token": "<p>"}, {"bos_token": "<s>"}),
        (
            {"bos_token": "<p>", "added_tokens_decoder": {"0": {"content": "<s>"}}},
            {"bos_token": "<s>", "eos_token": "</s>"},
        ),
        ({"image_token": "<img>", "extra_special_tokens": {"audio_token": "<p>", "video": "<s>"}}, None),
        ({"model_specific_special_tokens": {"image_token": "<img>"}, "extra_special_tokens": ["<p>"]}, None),
        ({"image_token": {"__type": "AddedToken", "content": "<img>"}, "audio_token": {"content": "<img>"}}, None),
        ({"bos_token": None, "eos_token": "</s>", "additional_special_tokens": ["<p>"]}, {"pad_token": "<p>"}),
        *(
            ({"tokenizer_class": f"{name}Tokenizer{fast}", **given}, None)
            for name in ("GPT2", "Qwen2", "Llama", "Gemma")
            for fast, given in (("", {}), ("Fast", {"bos_token": None}))
        ),
    ],
    ids=str,
)
def test_special_tokens_are_those_of_transformers(
    tmp_path: Path, config: dict[str, Any], tokens_map: dict[str, Any] | None
) -> None:
    directory = checkpoint(tmp_path, {**config, "chat_template": STYLES["tokens"]}, tokens_map)
    tokenizer, ours = AutoTokenizer.from_pretrained(directory), TextTokenizer.load(directory)
    assert ours.special_tokens == tokenizer.special_tokens_map
    assert rendered(ours, [USER]) == reference(tokenizer, [USER]) is not None


def test_tools_have_a_template_of_their_own_where_there_is_one(tmp_path: Path) -> None:
    templates = [{"name": name, "template": name} for name in ("default", "tool_use")]
    ours = TextTokenizer.load(checkpoint(tmp_path, {"chat_template": templates}))
    assert ours.render_chat([USER]) == "default"
    assert ours.render_chat([USER], tools=TOOLS) == "tool_use"


@pytest.mark.parametrize("name", ["messages", "chat_template", "tokenize", "continue_final_message"])
def test_what_is_no_variable_cannot_be_given_as_one(name: str) -> None:
    with pytest.raises(PromptError, match=name):
        TextTokenizer(Tokenizer(models.WordLevel(TOKENS)), chat_template="x").render_chat([USER], **{name: "y"})


def test_a_variable_that_is_no_plain_value_is_refused() -> None:
    ours = TextTokenizer(Tokenizer(models.WordLevel(TOKENS)), chat_template="{{ x }}")
    with pytest.raises(PromptError, match="x has "):
        ours.render_chat([USER], x=[Path("y")])
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(PromptError, match="at most 100 levels"):
        ours.render_chat([USER], x=deep)


def test_a_variable_that_the_template_cannot_use_is_the_callers_fault() -> None:
    ours = TextTokenizer(Tokenizer(models.WordLevel(TOKENS)), chat_template="{{ level + 1 }}")
    assert ours.render_chat([USER], level=1) == "2"
    with pytest.raises(PromptError, match="'level' was given"):
        ours.render_chat([USER], level="high")

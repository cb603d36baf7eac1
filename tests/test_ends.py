"""What ends a text, and what a turn of a chat: whatever the configuration forgot, a chat stops where its template does."""

# ruff: noqa: E501 (templates have long lines)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_styles import STYLES
from conftest import MakeCheckpoint, MakePackage, write_tokenizer
from melt_runtime import Runtime
from melt_runtime.session.conversation import Conversation
from melt_runtime.text.end_tokens import EndToken, end_of_turn, end_tokens
from melt_runtime.text.tokenizer import TextTokenizer
from test_run_cli import run
from tokenizers import Tokenizer, models

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|User|>"]
# Ends only between two turns; with text of its own; with a blank that is a token; a turn that ends with the next one.
BETWEEN = "{% for m in messages %}{% if m.role == 'user' %}U {{ m.content }}{% else %}A {{ m.content }}{% if not loop.last %}</s>{% endif %}{% endif %}{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}!\n{% endfor %}"
BLANKS = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}"
NEXT = "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
SYSTEM_ONLY = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (STYLES["chatml"], "<|im_end|>"),
        (STYLES["chatml_masked"], "<|im_end|>"),
        (STYLES["qwen_3"], "<|im_end|>"),
        (STYLES["llama_2"], "</s>"),
        (STYLES["llama_3"], "<|eot_id|>"),
        (STYLES["mistral"], "</s>"),
        (STYLES["gemma"], "<end_of_turn>"),
        (STYLES["deepseek"], "</s>"),
        (BETWEEN, "</s>"),
        (PLAIN, None),
        (BLANKS, None),
        (NEXT, "<|User|>"),
        (SYSTEM_ONLY, None),
        (None, None),
    ],
)
def test_the_token_that_ends_a_turn_is_found_in_the_template(template: str | None, token: str | None) -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    tokenizer.add_special_tokens([*SPECIAL, "\n\n"])
    ours = TextTokenizer(tokenizer, {"bos_token": "<s>", "eos_token": "</s>"}, template)
    assert end_of_turn(ours) == token


@pytest.fixture(scope="module")
def package(make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path_factory: Any) -> Path:
    """A package like published ones derived from Ouro: the configuration ends with 0, the template with <|im_end|>."""
    checkpoint = tmp_path_factory.mktemp("forgotten") / "checkpoint"
    checkpoint.mkdir()
    for file in make_checkpoint(eos_token_id=0).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    write_tokenizer(checkpoint)
    content = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    for token_id, text in ((47, "<|im_start|>"), (48, "<|im_end|>"), (49, "<|endoftext|>")):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        content["added_tokens"].append({"id": token_id, "content": text, "special": True, **flags})
        content["model"]["vocab"][text] = token_id
    (checkpoint / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}), encoding="utf-8")
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}), encoding="utf-8")
    (checkpoint / "chat_template.jinja").write_text(STYLES["chatml"], encoding="utf-8")
    return make_package(checkpoint, max_seq_len=128)


@pytest.fixture(scope="module")
def runtime(package: Path) -> Runtime:
    return Runtime.load(package)


def test_it_is_said_which_tokens_stop_and_who_says_so(package: Path, runtime: Runtime) -> None:
    assert end_tokens(runtime.package, runtime.tokenizer) == (
        EndToken(0, "<pad>", False, ("generation_config.json",)),
        EndToken(49, "<|endoftext|>", True, ("the tokenizer's eos_token",)),
        EndToken(48, "<|im_end|>", True, ("the chat template",)),
    )
    assert (runtime.stop_ids, runtime.chat_stop_ids) == ({0}, {0, 48, 49})
    shown = " ".join(run("inspect", package).stdout.replace("│", " ").split())
    assert "0 '<pad>' (generation_config.json)" in shown
    assert "48 '<|im_end|>' (the chat template; in chats)" in shown
    facts = json.loads(run("inspect", package, "--json").stdout)
    assert facts["end_tokens"][2] == {
        "id": 48,
        "text": "<|im_end|>",
        "chats_only": True,
        "sources": ["the chat template"],
    }


@pytest.fixture
def certain(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What all models say from now on, whatever they are asked: two letters, the end of the turn, and on."""
    from melt_runtime.sampling.sampler import Sampler

    script = [10, 11, 48, 12, 13]
    monkeypatch.setattr(Sampler, "sample", lambda self, row, history: script[(len(history) - asked[0]) % 5])
    asked = [0]
    return asked


def test_a_chat_stops_with_the_templates_end_of_a_turn(package: Path, runtime: Runtime, certain: list[int]) -> None:
    question = [{"role": "user", "content": "hello"}]
    certain[0] = len(runtime.chat_prompt(question))
    conversation = Conversation(runtime.session(max_tokens=5, temperature=1, seed=1))
    assert "".join(conversation.answer("hello")) == runtime.tokenizer.decode([10, 11])  # type: ignore[union-attr]
    assert conversation.session.tokens[-1] == 48
    on = Conversation(runtime.session(max_tokens=5, temperature=1, seed=1, ignore_eos=True))
    assert "".join(on.answer("hello")) == runtime.tokenizer.decode([10, 11, 12, 13])  # type: ignore[union-attr]
    options = ["--max-tokens", 5, "--temperature", 1, "--seed", 1, "--json"]
    wrapped = json.loads(run("generate", package, "hello", "--chat", *options).stdout)
    assert (wrapped["token_ids"], wrapped["finish_reason"]) == ([10, 11, 48], "stop")
    ids = runtime.chat_prompt(question)
    plain = runtime.generate(ids, max_tokens=5, temperature=1, seed=1)
    assert (plain.token_ids, plain.finish_reason) == ((10, 11, 48, 12, 13), "length")
    ended = runtime.generate(ids, max_tokens=5, temperature=1, seed=1, stop_ids=runtime.chat_stop_ids)
    assert (ended.token_ids, ended.finish_reason) == ((10, 11, 48), "stop")


def test_the_server_stops_chats_there_and_completions_not(runtime: Runtime) -> None:
    from melt_runtime.scheduler.scheduler import Scheduler
    from melt_runtime.server.chat_schema import ChatBody
    from melt_runtime.server.schema import CompletionBody
    from melt_runtime.server.service import Service

    with Scheduler(runtime, slots=1) as scheduler:
        service = Service(runtime, scheduler, "m")
        chat = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
        (request,) = service.job(ChatBody.model_validate(chat)).requests
        assert request.options.stop_ids == {0, 48, 49}
        (request,) = service.job(ChatBody.model_validate({**chat, "ignore_eos": True})).requests
        assert request.options.stop_ids == set()
        (request,) = service.job(CompletionBody.model_validate({"model": "m", "prompt": "a"})).requests
        assert request.options.stop_ids == {0}


def test_a_template_is_given_variables_by_the_api_the_server_and_the_chat(package: Path, runtime: Runtime) -> None:
    from melt_runtime.scheduler.scheduler import Scheduler
    from melt_runtime.server.chat_schema import ChatBody
    from melt_runtime.server.service import Service

    ours, question = runtime.tokenizer, [{"role": "user", "content": "a"}]
    assert ours is not None
    thinking = TextTokenizer(
        ours.backend_tokenizer, ours.special_tokens, "{{ messages[0].content }}{{ 'xy' if think else 'z' }}"
    )
    with pytest.MonkeyPatch.context() as patch, Scheduler(runtime, slots=1) as scheduler:
        patch.setattr(runtime, "tokenizer", thinking)
        patch.setattr(TextTokenizer, "load", lambda *_, **__: thinking)
        expected = ours.encode("axy")
        assert runtime.chat_prompt(question, think=True) == expected
        ask = {"model": "m", "messages": question, "chat_template_kwargs": {"think": True}}
        assert Service(runtime, scheduler, "m").job(ChatBody.model_validate(ask)).requests[0].prompt == tuple(expected)
        conversation = Conversation(runtime.session(max_tokens=1), variables={"think": True})
        "".join(conversation.answer("a"))
        assert conversation.session.tokens[:3] == tuple(expected)
        options = ("--max-tokens", 1, "--chat-template-kwargs", '{"think": true}')
        wrapped = run("generate", package, "a", "--chat", "--json", *options)
        assert json.loads(wrapped.stdout)["prompt_tokens"] == 3
        assert run("chat", package, *options, stdin="a\n").exit_code == 0


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": 1}', "'messages'"),
    ],
)
def test_variables_that_are_none_are_refused_in_one_line(package: Path, given: str, what: str) -> None:
    result = run("generate", package, "a", "--chat", "--chat-template-kwargs", given)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert what in result.stderr
    assert "add --chat" in run("generate", package, "a", "--chat-template-kwargs", '{"a": 1}').stderr

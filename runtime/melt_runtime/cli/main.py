"""The ``melt-run`` command. Results go to standard output, everything else to standard error."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from ..decoding.generator import Generator
from ..errors import ArgumentError, PromptError
from ..package.reader import Package
from ..runtime import Runtime
from ..text.tokenizer import Message
from .bench import bench_command
from .build_engine import build_engine_command
from .chat import Chat, notice
from .config import config_read
from .demo import demo_command
from .errors import ReportedGroup, for_terminal, run_app
from .inspect import describe
from .options import (
    ChatTemplateKwargs,
    DeviceIndex,
    Expect,
    LoadOptions,
    PackageDirectory,
    RequestOptions,
    fetched,
    grouped,
    version_shown,
)
from .serve import serve_command
from .tables import generation_dict, hash_progress, print_facts, stats_lines

_EPILOG = "Errors are one line and exit code 2; with MELT_TRACEBACK=1 in the environment they show their traceback."
app = typer.Typer(
    name="melt-run",
    cls=ReportedGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    epilog=_EPILOG,
)


@app.callback()
def options(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=version_shown("melt-run"), is_eager=True, help="Show the version and exit."),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=config_read,
            is_eager=True,
            help="A TOML file of options: a section per command, such as [serve], and a key per option, such as port.",
        ),
    ] = None,
) -> None:
    """Run MELT packages: looped language models in constant memory, without PyTorch."""


@app.command(epilog=_EPILOG)
@grouped
def generate(
    *,
    package: PackageDirectory,
    prompt: Annotated[
        str, typer.Argument(help="The prompt; - or none reads standard input, less its last line break.")
    ] = "-",
    request: RequestOptions,
    ids: Annotated[bool, typer.Option("--ids", help="Prompt and output are comma-separated token ids.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt as one user message in a chat.")] = False,
    chat_template_kwargs: ChatTemplateKwargs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed, loops and state size afterwards.")] = False,
    loading: LoadOptions,
) -> None:
    """Continue a prompt, streaming the text as it comes."""
    options = request.checked()
    if ids and chat:
        raise ArgumentError("--ids and --chat exclude each other: a chat is wrapped around text")
    variables = _variables(chat_template_kwargs)
    if variables and not chat:
        raise ArgumentError("--chat-template-kwargs are for a chat; add --chat")
    text = _read_stdin() if prompt == "-" else prompt
    runtime = loading.load(package)
    prompt_ids = _prompt_ids(runtime, text, ids, variables if chat else None)
    if chat:
        options["stop_ids"] = runtime.chat_stop_ids
    driver = runtime.driver()
    resolved = runtime.options(**options)
    runtime.warn(resolved)
    generator = Generator(driver, [prompt_ids], resolved, runtime.tokenizer)
    started = perf_counter()
    arrivals = _stream(generator, ids=ids, silent=as_json)
    result = generator.results()[0]
    if as_json:
        print(json.dumps(generation_dict(result)), flush=True)
    if stats:
        notice(f"backend              {runtime.backend.name} ({runtime.backend_reason})")
        for line in stats_lines(result, started, arrivals, driver.state.state_bytes):
            notice(line)


@app.command(epilog=_EPILOG)
@grouped
def chat(
    *,
    package: PackageDirectory,
    system: Annotated[str | None, typer.Option(help="A system message that every conversation begins with.")] = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    request: RequestOptions,
    loading: LoadOptions,
) -> None:
    """Talk with a model in the terminal; /help lists the commands."""
    options = request.checked()
    variables = _variables(chat_template_kwargs)
    runtime = loading.load(package)
    if runtime.tokenizer is None or not runtime.tokenizer.has_chat_template:
        lacks = "tokenizer" if runtime.tokenizer is None else "chat template"
        raise ArgumentError(f"the package has no {lacks}, which a chat needs; use melt-run generate")
    Chat(runtime.session(**options), system, variables).run()


@app.command(epilog=_EPILOG)
def inspect(
    package: PackageDirectory,
    length: Annotated[
        int | None, typer.Option(help="Tokens per sequence, for the memory tables; default: the most that fit.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time, for the memory tables.")] = 1,
    device: DeviceIndex = 0,
    expect: Expect = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Show what is in a package, what memory it needs and what could run it here. Checks its files, loads no graph."""
    package = fetched(package)
    with hash_progress(package) as progress:
        opened = Package.open(package, expected_hash=expect, progress=progress)
    facts = describe(opened, length=length, batch=batch, device=device)
    if as_json:
        print(json.dumps(facts.to_dict(), indent=2), flush=True)
    else:
        print_facts(facts)


app.command("build-engine", epilog=_EPILOG)(build_engine_command)
app.command("bench", epilog=_EPILOG)(bench_command)
app.command("serve", epilog=_EPILOG)(serve_command)
app.command("demo", epilog=_EPILOG)(demo_command)


def _read_stdin() -> str:
    """Read the prompt from standard input, without one final line break. Raises PromptError unless it is UTF-8."""
    if sys.stdin.isatty():
        notice("type the prompt, then Ctrl-D")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt on standard input is not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _variables(text: str | None) -> dict[str, Any]:
    """Parse --chat-template-kwargs. Raises ArgumentError."""
    if text is None:
        return {}
    try:
        variables = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"--chat-template-kwargs is not JSON: {error}") from error
    if not isinstance(variables, dict):
        raise ArgumentError("--chat-template-kwargs must be a JSON object, such as '{\"enable_thinking\": false}'")
    return variables


def _prompt_ids(runtime: Runtime, text: str, ids: bool, chat: dict[str, Any] | None) -> list[int]:
    """Return the prompt's token ids. ``ids``: the text is token ids. ``chat``: wrap it as a message, with these
    variables."""
    if ids:
        words = text.replace(",", " ").split()
        wrong = next((word for word in words if not re.fullmatch(r"-?[0-9]{1,18}", word)), None)
        if wrong is not None:
            raise PromptError(f"{wrong!r} is not a token id; --ids takes whole numbers, such as 12,7,30")
        return [int(word) for word in words]
    if runtime.tokenizer is None:
        raise PromptError("the package has no tokenizer; give the prompt as token ids with --ids")
    return runtime.encode(text) if chat is None else runtime.chat_prompt([Message("user", text).plain()], **chat)


def _stream(generator: Generator, *, ids: bool, silent: bool) -> list[float]:
    """Write deltas as they come. Return each token's time of arrival (perf_counter seconds)."""
    arrivals: list[float] = []
    for delta in generator:
        if not silent:
            _write(f"{',' if arrivals else ''}{delta.token_id}" if ids else delta.text)
        arrivals.append(perf_counter())
    if not silent:
        _write("\n")
    return arrivals


def _write(text: str) -> None:
    sys.stdout.write(for_terminal(text, sys.stdout))
    sys.stdout.flush()


def main() -> None:
    """Run the ``melt-run`` command."""
    # Characters that the terminal lacks, and input that is not text, must not end a chat.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)
    run_app(app, "melt-run")

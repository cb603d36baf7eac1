"""The ``melt-run`` command. Text goes to standard output, all else to standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from .bench_cli import bench_command
from .command import one_line, reported_errors, run_app
from .describe import describe, untrained_warnings
from .driver import LoopSettings
from .engine_cli import build_engine_command
from .errors import ArgumentError, PromptError
from .generation import Generator
from .options import BackendName, DeviceIndex, PackageDirectory, Threads
from .package import Package
from .render import generation_dict, hash_progress, print_facts, stats_lines
from .runtime import Runtime
from .sampling import SamplingParams
from .server.cli import serve_command
from .stopping import stop_strings
from .track import GenerationOptions

_EPILOG = "Errors are one line and exit code 2; with MELT_TRACEBACK=1 in the environment they show their traceback."
_HELP = """\
  /loops N   think N loops a token from now on; without N: say how many
  /reset     forget the conversation
  /help      show this
  /quit      leave (so does Ctrl-D)
  Ctrl-C     stop the answer; what came of it stays in the conversation"""

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True, epilog=_EPILOG
)

MaxTokens = Annotated[int, typer.Option(help="Most new tokens in an answer.")]
Loops = Annotated[int | None, typer.Option(help="Most loops a token; default: the package's.")]
ExitThreshold = Annotated[
    float | None,
    typer.Option(
        help="A token leaves the loops once its cumulative exit probability reaches this, 0 to 1 (1: never); "
        "default: the package's."
    ),
]
MinLoops = Annotated[int, typer.Option(help="Loops that every token has at least.")]
ExitChange = Annotated[
    float,
    typer.Option(help="A token leaves, too, once a loop changes its hidden state by less than this share; 0: never."),
]
ChunkSize = Annotated[
    int | None,
    typer.Option(help="Prompt tokens that run their loops together; default: the package's. It changes the answer."),
]
Temperature = Annotated[float, typer.Option(help="Divides the logits before drawing; 0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Draw from the smallest set with this share of probability; 1: from all.")]
MinP = Annotated[
    float, typer.Option(help="Draw from tokens at least this fraction as likely as the likeliest; 0: off.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 makes tokens seen before less likely; 1: off.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same draws; default: new ones each time.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]


def _version(value: bool) -> None:
    if not value:
        return
    try:
        number = version("melt-export")
    except PackageNotFoundError:
        number = "(not installed)"
    print(f"melt-run {number}")
    raise typer.Exit()


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run MELT packages: looped language models in constant memory, without PyTorch."""


@app.command(epilog=_EPILOG)
def generate(
    package: PackageDirectory,
    prompt: Annotated[
        str, typer.Argument(help="The prompt; - or none reads standard input, less its last line break.")
    ] = "-",
    max_tokens: MaxTokens = 256,
    loops: Loops = None,
    exit_threshold: ExitThreshold = None,
    min_loops: MinLoops = 1,
    exit_change: ExitChange = 0.0,
    chunk: ChunkSize = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    ids: Annotated[bool, typer.Option("--ids", help="Prompt and output are comma-separated token ids.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt as one user message in a chat.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed, loops and state size afterwards.")] = False,
    threads: Threads = None,
    backend: BackendName = "auto",
    device: DeviceIndex = 0,
) -> None:
    """Continue a prompt, streaming the text as it comes."""
    with reported_errors():
        depth = _depth(loops, exit_threshold, min_loops, exit_change, chunk)
        request = _request(max_tokens, depth, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
        if ids and chat:
            raise ArgumentError("--ids and --chat exclude each other: a chat is wrapped around text")
        text = _read_stdin() if prompt == "-" else prompt
        runtime = _load(package, backend, device, threads)
        prompt_ids = _prompt_ids(runtime, text, ids, chat)
        driver = runtime.driver()
        generator = Generator(driver, [prompt_ids], runtime.options(**request), runtime.codec)
        started = perf_counter()
        arrivals = _stream(generator, ids=ids, silent=as_json)
        result = generator.results()[0]
        if as_json:
            print(json.dumps(generation_dict(result)), flush=True)
        if stats:
            _notice(f"backend              {runtime.backend.name} ({runtime.backend_reason})")
            for line in stats_lines(result, started, arrivals, driver.state.state_bytes):
                _notice(line)


@app.command(epilog=_EPILOG)
def chat(
    package: PackageDirectory,
    system: Annotated[str | None, typer.Option(help="A system message that every conversation begins with.")] = None,
    max_tokens: MaxTokens = 256,
    loops: Loops = None,
    exit_threshold: ExitThreshold = None,
    min_loops: MinLoops = 1,
    exit_change: ExitChange = 0.0,
    chunk: ChunkSize = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    threads: Threads = None,
    backend: BackendName = "auto",
    device: DeviceIndex = 0,
) -> None:
    """Talk with a model in the terminal; /help lists the commands."""
    with reported_errors():
        depth = _depth(loops, exit_threshold, min_loops, exit_change, chunk)
        request = _request(max_tokens, depth, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop)
        runtime = _load(package, backend, device, threads)
        if runtime.codec is None or not runtime.codec.has_chat_template:
            lacks = "tokenizer" if runtime.codec is None else "chat template"
            raise ArgumentError(f"the package has no {lacks}, which a chat needs; use melt-run generate")
        Chat(runtime, request, system).run()


@app.command(epilog=_EPILOG)
def inspect(
    package: PackageDirectory,
    length: Annotated[
        int | None, typer.Option(help="Tokens a sequence, for the memory tables; default: the most that fit.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time, for the memory tables.")] = 1,
    device: DeviceIndex = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same facts as JSON.")] = False,
) -> None:
    """Show what is in a package, what memory it needs and what could run it here. Checks its files, loads no graph."""
    with reported_errors():
        with hash_progress(package) as progress:
            opened = Package.open(package, progress=progress)
        facts = describe(opened, length=length, batch=batch, device=device)
        if as_json:
            print(json.dumps(facts.to_dict(), indent=2), flush=True)
        else:
            print_facts(facts)


app.command("build-engine", epilog=_EPILOG)(build_engine_command)
app.command("bench", epilog=_EPILOG)(bench_command)
app.command("serve", epilog=_EPILOG)(serve_command)


class Chat:
    """A conversation in the terminal: answers on standard output, notices on standard error.

    runtime: has a chat template. request: the options of ``Runtime.stream``. system: a first message, or None.
    """

    def __init__(self, runtime: Runtime, request: dict[str, Any], system: str | None = None):
        self.runtime, self.request = runtime, dict(request)
        self.opening = [] if system is None else [_message("system", system)]
        self.turns: list[dict[str, str]] = []  # user and assistant in turn

    def run(self) -> None:
        """Reads messages until the end of input or /quit. Raises MeltError where going on makes no sense."""
        interactive = sys.stdin.isatty() and sys.stdout.isatty()
        if interactive:
            with suppress(ImportError):  # line editing, where the platform has it
                import readline  # noqa: F401
            for warning in untrained_warnings(self.runtime.manifest.untrained):
                _notice(f"Warning: {warning}")
            _notice(f"{self._loops()}; /help lists the commands")
        while True:
            try:
                line = input("> " if interactive else "").strip()
                if line == "/quit":
                    return
                if re.fullmatch(r"/[a-z]+( .*)?", line):
                    self._command(line)
                elif line:
                    self._answer(line)
            except EOFError:
                if interactive:
                    print()
                return
            except KeyboardInterrupt:
                _notice("\n/quit or Ctrl-D leaves")
            except (PromptError, ArgumentError) as error:
                _notice(one_line(error))

    def _command(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if name == "/loops":
            if argument:
                loops = int(argument) if re.fullmatch(r"\s*-?[0-9]{1,9}\s*", argument) else argument
                LoopSettings(loops)  # type: ignore[arg-type]
                self.request["loops"] = loops
            _notice(self._loops())
        elif name == "/reset":
            self.turns.clear()
            _notice("the conversation is forgotten")
        else:
            _notice(_HELP if name == "/help" else f"there is no command {name}; /help lists them")

    def _loops(self) -> str:
        loops = self.request["loops"]
        return f"{self.runtime.manifest.loops if loops is None else loops} loops a token"

    def _answer(self, text: str) -> None:
        message = _message("user", text)
        pieces: list[str] = []
        stream = self.runtime.stream(self._fit(message), **self.request)
        try:
            for piece in stream:
                pieces.append(piece)
                _write(piece)
        except KeyboardInterrupt:
            if not pieces:
                _notice("\nstopped before the first word; the message is forgotten")
                return
            _write("\n")
            _notice("stopped")
        else:
            _write("\n")
        self.turns += [message, _message("assistant", "".join(pieces))]

    def _fit(self, message: dict[str, str]) -> list[int]:
        """Token ids of the conversation and a new message, less the oldest exchanges if there is no room to answer.

        A message that is too long by itself changes nothing here: generation refuses it.
        """
        capacity = self.runtime.manifest.max_seq_len
        # An answer of one token would be no answer; a quarter of the cache leaves most of it to the conversation.
        room = min(self.request["max_tokens"], capacity // 4)
        for start in range(0, len(self.turns) + 1, 2):
            ids = self.runtime.chat_prompt([*self.opening, *self.turns[start:], message])
            if len(ids) + room <= capacity:
                break
        if start and len(ids) <= capacity:
            del self.turns[:start]
            count = "exchange" if start == 2 else f"{start // 2} exchanges"
            _notice(f"the conversation no longer fits in {capacity:,} tokens: the oldest {count} dropped")
        return ids


def _depth(
    loops: int | None, exit_threshold: float | None, min_loops: int, exit_change: float, chunk: int | None
) -> dict[str, Any]:
    """How deep to think, checked now; None is the package's to say. Raises ArgumentError."""
    most = max(min_loops, 1) if loops is None else loops
    LoopSettings(most, 1.0 if exit_threshold is None else exit_threshold, chunk, min_loops, exit_change)
    given = {"loops": loops, "exit_threshold": exit_threshold, "chunk": chunk}
    return {**given, "min_loops": min_loops, "exit_change": exit_change}


def _request(
    max_tokens: int,
    depth: dict[str, Any],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
    stop: Sequence[str] | None,
) -> dict[str, Any]:
    """The options of a request, checked now: a large package takes a while to load. Raises ArgumentError."""
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    GenerationOptions(LoopSettings(1), max_tokens, SamplingParams(**sampling), stop_strings(stop))  # type: ignore[arg-type]
    return {"max_tokens": max_tokens, "stop": stop, **depth, **sampling}


def _load(package: Path, backend: str, device: int, threads: int | None) -> Runtime:
    with hash_progress(package) as progress:
        return Runtime.load(package, backend=backend, device=device, threads=threads, progress=progress)


def _read_stdin() -> str:
    """The prompt on standard input, less one line break at its end. Raises PromptError unless it is UTF-8."""
    if sys.stdin.isatty():
        _notice("type the prompt, then Ctrl-D")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"the prompt on standard input is not UTF-8 at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _prompt_ids(runtime: Runtime, text: str, ids: bool, chat: bool) -> list[int]:
    if ids:
        words = text.replace(",", " ").split()
        wrong = next((word for word in words if not re.fullmatch(r"-?[0-9]{1,18}", word)), None)
        if wrong is not None:
            raise PromptError(f"{wrong!r} is not a token id; --ids takes whole numbers, such as 12,7,30")
        return [int(word) for word in words]
    if runtime.codec is None:
        raise PromptError("the package has no tokenizer; give the prompt as token ids with --ids")
    return runtime.chat_prompt([_message("user", text)]) if chat else runtime.encode(text)


def _stream(generator: Generator, *, ids: bool, silent: bool) -> list[float]:
    """Writes what comes, as it comes, and returns when each token came (perf_counter seconds)."""
    arrivals: list[float] = []
    for piece in generator:
        if not silent:
            _write(f"{',' if arrivals else ''}{piece.token_id}" if ids else piece.text)
        arrivals.append(perf_counter())
    if not silent:
        _write("\n")
    return arrivals


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _notice(text: str) -> None:
    typer.secho(text, err=True, dim=True)


def main() -> None:
    """The ``melt-run`` command."""
    # A terminal that lacks a character, or input that is no text, must not end a conversation.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=errors)
    run_app(app, "melt-run")

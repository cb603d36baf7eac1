"""Options shared by several commands. A command takes a group of them as one dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from melt_hub import PACKAGE, local_directory, reference

from ..backends.choose import NAMES
from ..decoding.exit_criteria import AUTO, CRITERIA
from ..decoding.exit_options import with_criteria
from ..decoding.settings import GenerationOptions, LoopSettings
from ..progress import shown_progress
from ..runtime import Runtime
from ..sampling.sampler import SamplingParams
from ..text.stop_strings import stop_strings
from .tables import hash_progress

PackageDirectory = Annotated[
    Path, typer.Argument(help="The package directory that melt-export wrote, or org/name[@revision] on a hub.")
]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads on the CPU. Default: the physical cores that other processes leave free."),
]
BackendName = Annotated[
    str, typer.Option(help=f"What runs the package: {', '.join(NAMES)} (the CPU); auto takes the best that can here.")
]
PipelineMode = Annotated[
    str,
    typer.Option(
        help="Run several successive tokens at once, each in a loop of its own: on, off, or auto: where the tokens are "
        "the same and it is faster."
    ),
]
DeviceIndex = Annotated[int, typer.Option(help="The NVIDIA device to run on, by index.", min=0)]
Expect = Annotated[
    str | None, typer.Option(help="Refuse a package of another hash than this; melt-run inspect shows a package's.")
]


def fetched(package: Path) -> Path:
    """Return a package's directory. A name on a hub is fetched first, with progress shown. Raises HubError."""
    with shown_progress() as step:
        return local_directory(package, PACKAGE, step)


def short_name(package: Path) -> str:
    """Return a package's name as a person would say it: that on the hub, or its directory's."""
    on_hub = None if package.exists() else reference(package)
    return package.resolve().name if on_hub is None else on_hub.name


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take options as dataclasses: each field of such a parameter is an option of its own."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    found: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        members = inspect.signature(groups[name]).parameters if name in groups else {name: parameter}
        types = get_type_hints(groups[name], include_extras=True) if name in groups else hints
        for member, given in members.items():
            kind = inspect.Parameter.KEYWORD_ONLY
            found[member] = inspect.Parameter(member, kind, default=given.default, annotation=types[member])

    def run(**values: Any) -> None:
        made = {
            name: group(**{field.name: values.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        command(**values, **made)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(list(found.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in found.items()}
    return run


@dataclass(frozen=True)
class LoadOptions:
    """What runs a package, and which package is expected."""

    threads: Threads = None
    backend: BackendName = "auto"
    device: DeviceIndex = 0
    expect: Expect = None

    def load(self, package: Path) -> Runtime:
        """Load a package, with progress shown. Raises MeltError, HubError."""
        package = fetched(package)
        with hash_progress(package) as progress:
            return Runtime.load(
                package,
                backend=self.backend,
                device=self.device,
                threads=self.threads,
                expected_hash=self.expect,
                progress=progress,
            )


@dataclass(frozen=True)
class RequestOptions:
    """How an answer is generated. Of the loops, None takes the package's."""

    max_tokens: Annotated[int, typer.Option(help="Most new tokens in an answer.")] = 256
    loops: Annotated[
        int | None,
        typer.Option(help="Most loops per token; default: the package's, or with --exit auto as many as calibrated."),
    ] = None
    exit_threshold: Annotated[
        float | None,
        typer.Option(
            help="A token leaves the loops once its cumulative exit probability reaches this, 0 to 1 (1: never); "
            "default: the package's."
        ),
    ] = None
    min_loops: Annotated[int, typer.Option(help="Least loops per token.")] = 1
    exit_change: Annotated[
        float | None,
        typer.Option(
            help="A token also leaves once a loop changes its hidden state by less than this share; 0: never."
        ),
    ] = None
    exit_kl: Annotated[
        float | None,
        typer.Option(
            help="A generated token also leaves once the head's words of successive loops differ by a KL divergence "
            "below this, in nats; 0: never."
        ),
    ] = None
    exit_same: Annotated[
        int | None,
        typer.Option(help="Or once the likeliest token has been the same in so many loops more; 0: never."),
    ] = None
    exit_entropy: Annotated[
        float | None,
        typer.Option(help="Or once the entropy of the head's words is below this, in nats; 0: never."),
    ] = None
    exit_margin: Annotated[
        float | None,
        typer.Option(help="Or once the likeliest token leads the second by at least this probability; 0: never."),
    ] = None
    exit: Annotated[
        str | None,
        typer.Option(
            help=f"When tokens leave the loops, in one option: NAME:VALUE with {', '.join(CRITERIA)}, several with "
            "commas; never; or auto: as calibrated when the package was exported."
        ),
    ] = None
    exit_at_step: Annotated[
        int | None, typer.Option(help="Every token leaves after this loop, counted from 0; default: after the last.")
    ] = None
    start_seed: Annotated[int, typer.Option(help="Of the noise that the loops of some models start from.")] = 0
    start_state: Annotated[str | None, typer.Option(help="What replaces that noise: zeros; default: nothing does.")] = (
        None
    )
    chunk: Annotated[
        int | None,
        typer.Option(
            help="Prompt tokens that run their loops together; default: the package's. It changes the answer."
        ),
    ] = None
    temperature: Annotated[
        float, typer.Option(help="Divides the logits before sampling; 0 takes the likeliest token.")
    ] = 0.0
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest tokens; 0: from all.")] = 0
    top_p: Annotated[
        float, typer.Option(help="Sample from the smallest set with this share of probability; 1: from all.")
    ] = 1.0
    min_p: Annotated[
        float, typer.Option(help="Sample from tokens at least this fraction as likely as the likeliest; 0: off.")
    ] = 0.0
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 makes tokens seen before less likely; 1: off.")] = (
        1.0
    )
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same answer; default: a new one each time.")
    ] = None
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None
    pipeline: PipelineMode = "auto"

    def checked(self) -> dict[str, Any]:
        """Return the options for ``Runtime.options``, checked before the package is loaded, which takes a while. Raises
        ArgumentError."""
        most = max(self.min_loops, 1) if self.loops is None else self.loops
        given = asdict(self)
        criteria = {one.option: given[one.option] for one in CRITERIA.values() if given[one.option] is not None}
        depth = LoopSettings(
            most,
            chunk=self.chunk,
            min_loops=self.min_loops,
            start_seed=self.start_seed,
            start_state=self.start_state,
            **criteria,
        )
        if self.exit is not None and self.exit.strip() != AUTO:
            with_criteria(self.exit, criteria)
        sampling = SamplingParams(
            self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed
        )
        GenerationOptions(depth, self.max_tokens, sampling, stop_strings(self.stop), pipeline=self.pipeline)
        unused = {one.option for one in CRITERIA.values()} - criteria.keys()
        return {name: value for name, value in given.items() if name not in unused}


ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(help="Further variables for the chat template, as JSON: '{\"enable_thinking\": false}'."),
]


def version_shown(command: str) -> Callable[[bool], None]:
    """Return the callback of a command's --version."""

    def show(wanted: bool) -> None:
        if not wanted:
            return
        try:
            number = version("melt-export")
        except PackageNotFoundError:
            number = "(not installed)"
        print(f"{command} {number}")
        raise typer.Exit()

    return show

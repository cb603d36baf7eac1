"""The commands ``melt-export`` and ``melt-verify``.

Arguments are checked before PyTorch, which takes seconds, is imported.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from melt_models.atomic import TargetExistsError, check_target
from melt_models.directory import check_directory, without_tokenizer
from melt_models.errors import CheckpointError
from melt_runtime.cli.build_engine import CapabilityOption, Flavour, Weights, built_line
from melt_runtime.cli.errors import run_app
from melt_runtime.cli.options import BackendName, DeviceIndex, PackageDirectory, fetched, version_shown
from melt_runtime.engines.build import EngineOptions, build_engine, check_options
from melt_runtime.engines.library import open_library
from melt_runtime.errors import ArgumentError, MeltError
from melt_runtime.package.reader import Package
from melt_runtime.package.specs import DIALECTS, PRECISIONS
from melt_runtime.progress import Step, shown_progress
from rich.console import Console

from melt_hub import CHECKPOINT, local_directory

from .options import SHARED, ExitOptions, ExportOptions
from .quantization.options import ACTIVATIONS, BITS, BLOCKS, METHODS, CacheOptions, WeightOptions
from .tables import package_table, parity_table, plan_tables

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

Precision = StrEnum("Precision", {name: name for name in PRECISIONS})  # type: ignore[misc]
ActivationKind = StrEnum("ActivationKind", {name: name for name in ACTIVATIONS})  # type: ignore[misc]
Method = StrEnum("Method", {name: name for name in METHODS})  # type: ignore[misc]
StoredWeights = StrEnum("StoredWeights", {name: name for name in BITS})  # type: ignore[misc]
Sharing = StrEnum("Sharing", {name: name for name in SHARED})  # type: ignore[misc]
DialectName = StrEnum("DialectName", {name: name for name in DIALECTS})  # type: ignore[misc]
_EPILOG = "Errors are one line on stderr and exit code 2; set MELT_TRACEBACK=1 to see where one was raised."
_REFUSED = (CheckpointError, TargetExistsError)
_TEXT = Console(soft_wrap=True, highlight=False)

export_app = typer.Typer(add_completion=False, rich_markup_mode=None)
verify_app = typer.Typer(add_completion=False, rich_markup_mode=None)


Version = Annotated[
    bool, typer.Option("--version", callback=version_shown("melt-export"), is_eager=True, help="Print the version.")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(
        help="Checkpoint of a looped model (MELT, Ouro, Nanbeige, Huginn and its kind): a directory with config.json "
        "and safetensors, or org/name[@revision] on a hub. May also be given without --checkpoint."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(help="Greedy tokens to compare for each prompt. Default: 256; 16 for over 1 GB of weights.", min=1),
]
EvalText = Annotated[
    Path | None,
    typer.Option(
        help="UTF-8 text to measure quantization and staggered decoding on. Default: a built-in one.",
        exists=True,
        dir_okay=False,
    ),
]

EvalAnswers = Annotated[
    Path | None,
    typer.Option(
        help="Problems to count exact answers on, of a quantized package and of staggered decoding: JSON lines with "
        '"prompt" and "answer".',
        exists=True,
        dir_okay=False,
    ),
]


@export_app.command(epilog=_EPILOG)
def export(
    places: Annotated[
        list[Path] | None, typer.Argument(metavar="CHECKPOINT OUTPUT", help="As --checkpoint and --output.")
    ] = None,
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the package goes: a directory that does not exist or is empty.")
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Of weights, state and arithmetic.")] = Precision.fp32,  # type: ignore[attr-defined]
    max_seq_len: Annotated[
        int | None,
        typer.Option(help="Tokens that a cache holds. Default: the checkpoint's positions, up to 4096.", min=1),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest number of sequences that run together.", min=1)] = 8,
    chunk: Annotated[
        int | None,
        typer.Option(help="Prompt tokens that run their loops together. Default: the checkpoint's chunk_size.", min=1),
    ] = None,
    dialect: Annotated[
        DialectName | None,
        typer.Option(
            help="How cache and attention are written: onnxruntime (fused, in place), standard (opset 24, for "
            "TensorRT), portable (opset 18, for everything else). Default: onnxruntime; standard with --engine."
        ),
    ] = None,
    weights: Annotated[
        StoredWeights | None,
        typer.Option(help="Quantize weights (dialects onnxruntime and standard)."),
    ] = None,
    head: Annotated[
        StoredWeights | None,
        typer.Option(help="Of the output head, read once per token. Default: int8; int4 is faster and loses more."),
    ] = None,
    embedding: Annotated[
        StoredWeights | None,
        typer.Option(
            help="Quantize the embedding (dialect onnxruntime); a tied head in the same kind shares it. Default: "
            "float16."
        ),
    ] = None,
    cache: Annotated[
        StoredWeights | None,
        typer.Option(help="Quantize the key/value cache (dialect onnxruntime)."),
    ] = None,
    share_caches: Annotated[
        Sharing | None,
        typer.Option(
            help="Let the loops of a model that was trained with caches per loop share one cache per layer: last, the "
            "last loop's keys and values count. Memory no longer grows with the loops; answers may get worse, and the "
            "loss is measured on a text (--eval-text)."
        ),
    ] = None,
    block: Annotated[int, typer.Option(help=f"Inputs that share a scale: {', '.join(map(str, BLOCKS))}.")] = 32,
    method: Annotated[
        Method | None,
        typer.Option(help="gptq: calibrated on a text; rtn: rounded to nearest, in seconds."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="UTF-8 text for calibration. Default: Python's own documentation.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Weights not to quantize: a name in the checkpoint, * for any part of it.")
    ] = None,
    int8: Annotated[
        list[str] | None, typer.Option(help="With int4: weights to store in int8, named as in --keep.")
    ] = None,
    int8_share: Annotated[
        float | None,
        typer.Option(
            help="With int4: the share by which the loop's weights may grow to store in int8 those that lose most in "
            "int4 on the calibration text. Default: 0.1; 0 with --int8 or rtn.",
            min=0,
            max=1,
        ),
    ] = None,
    asymmetric: Annotated[
        bool,
        typer.Option("--asymmetric", help="With int4: a zero point per block; more accurate, and slower."),
    ] = False,
    activations: Annotated[
        ActivationKind | None,
        typer.Option(
            help="Activations that quantized weights are multiplied with on the CPU: int8, rounded in blocks, is fast; "
            "float is closer to the checkpoint. Default: int8."
        ),
    ] = None,
    engine: Annotated[
        Flavour | None,
        typer.Option(help="Build an engine into the package afterwards; melt-run build-engine has more options."),
    ] = None,
    engine_weights: Annotated[
        Weights | None,
        typer.Option(help="Quantize the engine's weights; default: as in the package."),
    ] = None,
    compute_capability: CapabilityOption = None,
    exit: Annotated[
        str | None,
        typer.Option(
            help="Calibrate when tokens leave the loops early, and how many they have at most, for --exit auto of "
            "melt-run: auto:N% lets the perplexity grow by N percent, auto:Npt lets N of 100 answers or next tokens "
            "differ from those of all loops."
        ),
    ] = None,
    exit_text: Annotated[
        Path | None,
        typer.Option(
            help='UTF-8 text to calibrate the exit on, or problems: a .jsonl file with lines of "prompt" and "answer". '
            "Default: Python's own documentation.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Skip the comparison with PyTorch.")] = False,
    verify_tokens: Tokens = None,
    eval_text: EvalText = None,
    eval_answers: EvalAnswers = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output directory that is not empty.")] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Write nothing, and say what would be written, needed and compared. Exit code 1 if it lacks room.",
        ),
    ] = False,
    show_version: Version = False,
) -> None:
    """Export a looped model's checkpoint to a verified ONNX package.

    The package is built beside OUTPUT and gets that name only after everything has succeeded, the comparison with
    PyTorch at every loop included. An engine is built into it last; if that fails, the package stays.
    """
    checkpoint, output = _placed(places, {"--checkpoint": checkpoint, "--output": output})
    spelled = str(dialect) if dialect else "standard" if engine else "onnxruntime"
    chosen_how = (keep, int8, method, asymmetric, activations, head, embedding)
    if weights is None and (any(chosen_how) or block != 32 or int8_share is not None):
        raise ArgumentError(
            "--block, --head, --embedding, --method, --keep, --int8, --int8-share, --asymmetric and --activations need "
            "quantized weights: add --weights"
        )
    if weights is None and cache is None and calibration:
        raise ArgumentError("--calibration needs quantization: add --weights or --cache")
    stored = None
    if weights is not None:
        kept, wide, chosen = tuple(keep or ()), tuple(int8 or ()), str(method or "gptq")
        read = calibration if chosen == "gptq" or cache is None else None
        how = {"keep": kept, "int8": wide, "int8_share": int8_share, "asymmetric": asymmetric}
        with_what = str(activations or "int8")
        stored = WeightOptions(
            str(weights),
            block,
            head=str(head or "int8"),
            embedding=None if embedding is None else str(embedding),
            method=chosen,
            calibration=read,
            activations=with_what,
            **how,  # type: ignore[arg-type]
        )
    caches = None if cache is None else CacheOptions(str(cache), calibration)
    shared = None if share_caches is None else str(share_caches)
    text = eval_text if shared else None
    if exit_text is not None and exit is None:
        raise ArgumentError("--exit-text needs --exit, such as --exit auto:1pt")
    leaving = None if exit is None else ExitOptions(exit, exit_text)
    options = ExportOptions(
        str(precision), spelled, max_seq_len, max_batch, chunk, stored, caches, shared, text, leaving
    )
    if weights is not None and engine_weights is not None:
        raise ArgumentError("--weights and --engine-weights quantize the same weights; give one of them")
    build = _engine_options(options, engine, engine_weights, compute_capability)
    check_target(output, force=force)
    checkpoint = _fetched(checkpoint)

    from .checkpoint import Checkpoint

    if plan:
        _plan(Checkpoint(checkpoint), output, options, verified=not no_verify, tokens=verify_tokens)
        return

    from .export import building
    from .graph.trace import staggers
    from .parity.verify import require_parity, verify

    report = None
    with shown_progress() as step:
        opened = Checkpoint(checkpoint)
        if eval_text is not None and weights is None and cache is None and not (shared or staggers(opened.config)):
            raise ArgumentError(
                "--eval-text needs quantization, or a MELT of several loops, whose staggered decoding is measured"
            )
        if eval_answers is not None and weights is None and cache is None and not staggers(opened.config):
            raise ArgumentError(
                "--eval-answers needs quantization, or a MELT of several loops, whose staggered answers are counted"
            )
        with building(opened, output, options, force=force, progress=step) as directory:
            if not no_verify:
                report = verify(
                    directory,
                    opened,
                    tokens=verify_tokens,
                    eval_text=eval_text,
                    eval_answers=eval_answers,
                    progress=step,
                )
                require_parity(report)
        package = Package.open(output, check_hashes=False)
        built = None if build is None else _build(package, build, step)
    _TEXT.print(package_table(output, package.manifest, report))
    if (missing := without_tokenizer(checkpoint)) is not None:
        print(f"melt-export: {missing}", file=sys.stderr)
    if built:
        _TEXT.print(built)


def _plan(checkpoint: Checkpoint, output: Path, options: ExportOptions, *, verified: bool, tokens: int | None) -> None:
    """Print what an export would do. Exits with 1 if this machine lacks something for it."""
    from .plan import plan_export

    with shown_progress() as step:
        plan = plan_export(checkpoint, output, options, verified=verified, tokens=tokens, progress=step)
    for table in plan_tables(plan, output):
        _TEXT.print(table)
    for lack in (lacking := plan.lacking()):
        print(f"melt-export: {lack}", file=sys.stderr)
    if lacking:
        raise typer.Exit(1)


def _fetched(checkpoint: Path) -> Path:
    """Return a checkpoint's directory, fetched from a hub if it is a name there. Raises HubError, CheckpointError."""
    with shown_progress() as step:
        found = local_directory(checkpoint, CHECKPOINT, step)
    check_directory(found)
    return found


def _placed(places: list[Path] | None, options: dict[str, Path | None]) -> list[Path]:
    """Return the values of options of which those that are missing were given by position, in this order. Raises
    ArgumentError for one too few or too many."""
    rest = list(places or ())
    found = []
    for name, value in options.items():
        if value is None and not rest:
            raise ArgumentError(f"{name} is missing; give it, or its value alone, in the order {', '.join(options)}")
        found.append(rest.pop(0) if value is None else value)
    if rest:
        raise ArgumentError(f"{str(rest[0])!r} is one argument too many; {' and '.join(options)} are given already")
    return found


def _engine_options(
    options: ExportOptions, engine: Flavour | None, weights: Weights | None, capabilities: list[str] | None
) -> EngineOptions | None:
    """Return what engine to build, checked now because an export takes minutes. Raises ArgumentError, BackendError."""
    if engine is None:
        if weights is not None or capabilities:
            raise ArgumentError("--engine-weights and --compute-capability need an engine: add --engine")
        return None
    build = EngineOptions(
        str(engine), None if weights is None else str(weights), compute_capabilities=tuple(capabilities or ())
    )
    check_options(options.dialect, options.precision, options.max_batch, build, open_library(build.flavour))
    return build


def _build(package: Package, options: EngineOptions, progress: Step) -> str:
    """Build an engine into a finished package and describe it. Raises BackendError, PackageError."""
    try:
        return built_line(package.manifest, options, build_engine(package, options, progress))
    except MeltError as error:
        raise type(error)(f"{package.directory} is complete, but has no engine: {error}") from error


@verify_app.command(epilog=_EPILOG)
def verify_command(
    package: PackageDirectory,
    places: Annotated[list[Path] | None, typer.Argument(metavar="[CHECKPOINT]", help="As --checkpoint.")] = None,
    checkpoint: CheckpointOption = None,
    backend: BackendName = "onnxruntime",
    device: DeviceIndex = 0,
    tokens: Tokens = None,
    eval_text: EvalText = None,
    eval_answers: EvalAnswers = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Largest mean KL divergence from fp32, in nats. Default: 0.01 for int8, 0.5 for int4.", min=0
        ),
    ] = None,
    max_perplexity_change: Annotated[
        float | None, typer.Option(help="Largest growth of the perplexity over fp32, in percent. Default: any.", min=0)
    ] = None,
    show_version: Version = False,
) -> None:
    """Compare a package with its checkpoint at every loop, and write parity.json. Exit code 1 if they differ.

    PyTorch computes on the CPU, and the package runs where --backend says. For tensorrt, build an engine into it first:
    melt-run build-engine.

    A quantized package is also measured against the checkpoint in fp32 on held-out text, and staggered decoding of a
    MELT against its plain decoding.
    """
    [checkpoint] = _placed(places, {"--checkpoint": checkpoint})
    package = fetched(package)
    with shown_progress() as step:
        manifest = Package.open(package).manifest
        if eval_text is not None and not (manifest.quantized or manifest.staggers):
            raise ArgumentError(
                "--eval-text needs a quantized package, or one of a MELT of several loops, whose staggered decoding is "
                "measured"
            )
        if eval_answers is not None and not (manifest.quantized or manifest.staggers):
            raise ArgumentError(
                "--eval-answers needs a quantized package, or one of a MELT of several loops, whose staggered answers "
                "are counted"
            )
        if (max_kl, max_perplexity_change) != (None, None) and not manifest.quantized:
            raise ArgumentError("the limits need a quantized package; this one is not quantized")
        checkpoint = _fetched(checkpoint)

        from .parity.quality import limits_of
        from .parity.verify import verify

        limits = limits_of(manifest, max_kl, max_perplexity_change)
        report = verify(
            package,
            checkpoint,
            backend=backend,
            device=device,
            tokens=tokens,
            eval_text=eval_text,
            eval_answers=eval_answers,
            limits=limits,
            progress=step,
        )
    _TEXT.print(parity_table(report))
    if report.quality is not None:
        _TEXT.print(f"quality: {report.quality.summary()}")
    if report.staggered is not None:
        _TEXT.print(f"staggered decoding: {report.staggered.summary()}")
    _TEXT.print(f"compared: {report.arithmetic}")
    _TEXT.print(f"{'passed' if report.passed else 'FAILED'}: {report.summary()}")
    for failure in report.failures():
        print(f"melt-verify: {failure}", file=sys.stderr)
    if not report.passed:
        raise typer.Exit(1)


def export_main() -> None:
    """Run ``melt-export``."""
    run_app(export_app, "melt-export", _REFUSED)


def verify_main() -> None:
    """Run ``melt-verify``."""
    run_app(verify_app, "melt-verify", _REFUSED)

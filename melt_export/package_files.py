"""Files of a package other than its weights: copies of the checkpoint's, checked graphs, the manifest."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from melt_models.convert import COMPANIONS, TOKENIZER, check_companions
from melt_runtime.errors import PackageError
from melt_runtime.package.example_prompt import EXAMPLE_PROMPT, read_example_prompt
from melt_runtime.package.files import FileSpec, file_hash
from melt_runtime.package.manifest import MANIFEST, Manifest
from melt_runtime.package.manifest_schema import read_manifest
from melt_runtime.package.specs import GraphSpec
from melt_runtime.progress import Step as Progress
from melt_runtime.text.end_tokens import GENERATION, configured_ends
from melt_runtime.text.tokenizer import TextTokenizer

from .checkpoint import Checkpoint
from .errors import ExportError
from .graph.trace import TracedGraph


def copy_companions(checkpoint: Checkpoint, directory: Path) -> None:
    """Copy the tokenizer and the other files of ``COMPANIONS``.

    Raises CheckpointError for files that ``check_companions`` refuses, ExportError for files that no runtime reads.
    """
    source, config = checkpoint.directory, checkpoint.config
    check_companions(source, config)
    copied = [name for name in COMPANIONS if (source / name).is_file()]
    try:
        if TOKENIZER in copied:
            TextTokenizer.load(source)
        configured_ends(source / GENERATION if GENERATION in copied else None, config.to_dict())
        if EXAMPLE_PROMPT in copied:
            read_example_prompt(source / EXAMPLE_PROMPT)
    except PackageError as error:
        raise ExportError(str(error).removesuffix("; export the package again.")) from error
    for name in copied:
        shutil.copyfile(source / name, directory / name)


def save_graph(name: str, graph: TracedGraph, directory: Path) -> GraphSpec:
    """Write an ONNX file and check it. Raises ExportError."""
    file = f"{name}.onnx"
    graph.model.graph.name = name
    graph.model.producer_name, graph.model.producer_version = "melt-export", version("melt-export")
    ir.save(graph.model, directory / file)
    check_graph(directory / file)
    return GraphSpec(file, graph.inputs, graph.outputs)


def check_graph(path: Path) -> None:
    """Check a graph with onnx.checker, shapes included. Raises ExportError."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} does not pass onnx.checker: {error}") from error


def hash_files(directory: Path, progress: Progress) -> dict[str, FileSpec]:
    """Return size and hash of every file in a package."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    return {
        path.relative_to(directory).as_posix(): FileSpec(
            file_hash(path, lambda done: progress("hashing files", total, done)), path.stat().st_size
        )
        for path in files
    }


def plain(value: Any) -> Any:
    """Convert a configuration to plain JSON values. Raises ExportError."""
    try:
        text = json.dumps(value, allow_nan=False, default=str)
    except ValueError as error:
        raise ExportError(f"the configuration cannot be written as JSON: {error}") from error
    return json.loads(text)


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write a manifest that runtimes read. Raises ExportError for one that they would refuse."""
    text = manifest.to_json()
    try:
        read_manifest(text)
    except PackageError as error:
        raise ExportError(f"no runtime would open this package: {error}") from error
    (directory / MANIFEST).write_text(text, encoding="utf-8")

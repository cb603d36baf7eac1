"""Statistics of the inputs of each matmul, for calibrated quantization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from melt_runtime.progress import Step, no_progress
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import ExportError
from ..reference.float32_matmul import Float32Matmul
from ..reference.pytorch import every_loop, linear_layers
from ..reference.texts import encode_text

_SEQUENCE = 256
_SEQUENCES = 32
_AT_ONCE = 4
_RANDOM_SEQUENCES = 4  # of random tokens; more would not add information
_LARGEST_TEXT = 1 << 22  # most characters read from a file
_HEAD = "lm_head"  # its input is counted; its output is not needed


def calibration_tokens(checkpoint: Checkpoint, path: Path | None) -> list[list[int]]:
    """Return sequences of token ids, spread over a text: the file at ``path`` (UTF-8), or Python's own documentation.

    Returns random tokens if the vocabulary is too small for the latter. Raises ExportError for a file that cannot be
    used.
    """
    config, directory = checkpoint.config, checkpoint.directory
    room = min(_SEQUENCE, config.max_position_embeddings)
    ids = encode_text(directory, path, documentation, option="--calibration", refused=ExportError, most=_LARGEST_TEXT)
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (_RANDOM_SEQUENCES, room), generator=generator).tolist()  # type: ignore[no-any-return]
    step = max(room, (len(ids) - room) // max(_SEQUENCES - 1, 1))
    return [ids[at : at + room] for at in range(0, len(ids), step)][:_SEQUENCES]


def documentation() -> str:
    from pydoc_data.topics import topics

    return "\n".join(str(topics[name]) for name in sorted(topics))


def hessians(
    model: nn.Module, sequences: list[list[int]], loops: int, chunk: int, progress: Step = no_progress
) -> dict[str, Tensor]:
    """Return the sum of x x^T over all tokens and loops, (inputs, inputs), for each matmul, by its weight's checkpoint
    name.

    Matmuls that read the same input share one.
    """
    layers: dict[str, nn.Module] = dict(linear_layers(model))
    head = model.get_submodule(_HEAD)
    model.lm_head = layers[f"{_HEAD}.weight"] = nn.Identity()
    found: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []  # the latest inputs, and the first matmul that read each

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            owner = next((owner for seen, owner in last if seen is x), name)
            if owner != name:
                shared[name] = owner
                return
            rows = x.flatten(0, -2).float()
            if name not in found:
                found[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            found[name].addmm_(rows.t(), rows)
            last[:] = [(x, name), *last[:1]]

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    options = every_loop(model, loops, chunk)
    with torch.inference_mode(), Float32Matmul():
        for batch in _batches(sequences):
            model(torch.tensor(batch), use_cache=False, **options)
            last.clear()
            progress("calibrating", len(sequences), len(batch))
    for handle in handles:
        handle.remove()
    model.lm_head = head
    return found | {name: found[owner] for name, owner in shared.items()}


def _batches(sequences: list[list[int]]) -> Iterator[list[list[int]]]:
    """Group sequences of one length, a few at a time, so that a weight is read and widened once for all of them."""
    for _, neighbours in groupby(sequences, key=len):
        alike = list(neighbours)
        yield from (alike[at : at + _AT_ONCE] for at in range(0, len(alike), _AT_ONCE))

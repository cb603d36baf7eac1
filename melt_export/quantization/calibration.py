"""What goes into each product of a model: the statistics that a calibrated quantization needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from melt_models.configuration import LoopedConfig
from melt_runtime.progress import Step, no_progress
from torch import Tensor, nn

from ..errors import ExportError
from ..reference.pytorch import open_reference
from ..reference.texts import encode_text

_SEQUENCE = 256
_SEQUENCES = 32
_RANDOM_SEQUENCES = 4  # of random tokens, of which more would not say more
_LARGEST_TEXT = 1 << 22  # characters that are read of a file


def calibration_tokens(checkpoint: Path, config: LoopedConfig, path: Path | None) -> list[list[int]]:
    """Sequences of token ids, spread over a text: the file at ``path`` (UTF-8), or else Python's own documentation.

    Random tokens where the vocabulary cannot write the latter. Raises ExportError for a file that cannot be used.
    """
    room = min(_SEQUENCE, config.max_position_embeddings)
    ids = encode_text(checkpoint, path, _documentation, option="--calibration", refused=ExportError, most=_LARGEST_TEXT)
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (_RANDOM_SEQUENCES, room), generator=generator).tolist()  # type: ignore[no-any-return]
    step = max(room, (len(ids) - room) // max(_SEQUENCES - 1, 1))
    return [ids[at : at + room] for at in range(0, len(ids), step)][:_SEQUENCES]


def _documentation() -> str:
    from pydoc_data.topics import topics

    return "\n".join(str(topics[name]) for name in sorted(topics))


def hessians(
    checkpoint: Path, sequences: list[list[int]], loops: int, chunk: int, progress: Step = no_progress
) -> dict[str, Tensor]:
    """Of every product, by its weight's checkpoint name, the sum of x x^T over all tokens and loops: (inputs, inputs).

    Products that read the same input share one.
    """
    reference = open_reference(checkpoint)
    model: nn.Module = reference.model  # type: ignore[attr-defined]
    found: dict[str, Tensor] = {}
    last: list[tuple[Tensor, str]] = []  # the input that came in last, and the product it came into first
    shared: dict[str, str] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0]
            for seen, owner in last:
                if seen is x and owner != name:
                    shared[name] = owner
                    return
            rows = x.detach().flatten(0, -2).float()
            found[name] = rows.t() @ rows + found.get(name, 0)
            last[:] = [(x, name), *last[:1]]

        return hook

    handles = [
        module.register_forward_pre_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    for ids in sequences:
        reference.logits(ids, loops, chunk)
        last.clear()
        progress("calibrating", len(sequences), 1)
    for handle in handles:
        handle.remove()
    return found | {name: found[owner] for name, owner in shared.items()}

"""Hidden states and logits of a sequence after every loop, for logit lenses and probes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ArgumentError
from ..machine import available_memory
from ..results import LoopStates
from .loop_driver import LoopDriver
from .settings import LoopSettings


def loop_states(driver: LoopDriver, ids: Sequence[int], settings: LoopSettings, *, logits: bool) -> LoopStates:
    """Run a sequence in an empty driver of one and return the states after every loop.

    Raises ArgumentError where the machine has no memory for them.
    """
    manifest, loops = driver.manifest, settings.loops
    hidden_size = int(manifest.states[0].shape[-1])
    per_token = hidden_size + (manifest.vocab_size if logits else 0) + manifest.has_exit_gate
    needed, free = 4 * loops * len(ids) * per_token, available_memory()
    if free is not None and needed > free:
        advice = "fewer tokens or loops, or logits=False" if logits else "fewer tokens or loops"
        raise ArgumentError(
            f"the states of {loops} loops over {len(ids):,} tokens need {needed:,} bytes, {free:,} are available; "
            f"give {advice}"
        )
    hidden = np.empty((loops, len(ids), hidden_size), np.float32)
    said = np.empty((loops, len(ids), manifest.vocab_size), np.float32) if logits else None
    exits = np.empty((loops, len(ids)), np.float32) if manifest.has_exit_gate else None
    at, state = 0, driver.state
    for chunk in driver.chunks([ids], settings.chunk):
        count = int(chunk.counts[0])
        here = slice(at, at + count)
        for loop, control in enumerate(driver.loops(chunk, settings)):
            hidden[loop, here] = state.read("hidden", (0, slice(count)))
            found = state.exit_probability()
            if exits is not None and found is not None:
                exits[loop, here] = found[0, :count]
            if said is not None:
                state.coda(control)
                said[loop, here] = state.logits(np.arange(count)[None])[0]
        at += count
    return LoopStates(tuple(ids), hidden, said, exits)

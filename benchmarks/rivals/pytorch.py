"""The checkpoint in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import numpy as np

from rivals.turns import Sample


def run(checkpoint: Path, precision: str, threads: int, loops: int, context: int, tokens: int) -> Iterator[Sample]:
    """Run the checkpoint in PyTorch, operator by operator, over a cache of ``context`` tokens."""
    import torch
    from melt_models.cache import MeltCache
    from melt_models.checkpoint import load_model

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = load_model(checkpoint, dtype)
    config = model.config
    rows = torch.zeros(1, config.num_key_value_heads, context, config.head_dim, dtype=dtype)
    one = torch.zeros(1, 1, dtype=torch.long)
    while True:
        cache = MeltCache(config.num_hidden_layers)
        if context:
            for layer in range(config.num_hidden_layers):
                cache.write(layer, rows, rows)
            cache.commit(torch.ones(1, context, dtype=torch.bool))
            cache.columns = context
        times = []
        with torch.inference_mode():
            for _ in range(tokens + 1):
                started = perf_counter()
                output = model(one, past_key_values=cache, num_loops=loops, exit_threshold=1.0, logits_to_keep=1)
                output.logits.argmax(-1)
                times.append(perf_counter() - started)
        token = float(np.median(times[1:]))
        yield {"token_s": token, "loop_s": token / loops}

"""Resident memory of a process that does nothing but load one package and decode, to the last token that fits:
``python -m`` this, with JSON."""

from __future__ import annotations

import json
import sys

from .bench import Driver
from .machine import resident
from .runtime import Runtime

_TOKENS = 4


def main() -> None:
    """Loads, decodes a few tokens and prints the bytes as JSON."""
    order = json.loads(sys.argv[1])
    runtime = Runtime.load(order["package"], threads=order["threads"], check_hashes=False)
    loaded = resident("VmRSS")
    state = runtime.driver(order["batch"]).state
    driver = Driver(state, runtime.manifest)
    longest = runtime.manifest.max_seq_len
    for position in {*range(min(_TOKENS, longest)), longest - 1}:
        driver.chunk(1, position, order["loops"], head=True)
    print(json.dumps({"loaded_bytes": loaded, "peak_bytes": resident("VmHWM")}))


if __name__ == "__main__":
    main()

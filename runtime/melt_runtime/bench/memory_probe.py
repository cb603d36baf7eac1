"""Measure the resident memory of a process that loads one package and decodes, up to the last token that fits.

Run it with ``python -m`` and JSON arguments.
"""

from __future__ import annotations

import json
import sys

from ..machine import resident
from ..runtime import Runtime
from .sweep import Stopwatch

_TOKENS = 4


def main() -> None:
    """Load, decode a few tokens, and print the bytes as JSON."""
    order = json.loads(sys.argv[1])
    runtime = Runtime.load(order["package"], threads=order["threads"], check_hashes=False)
    loaded = resident("VmRSS")
    watch = Stopwatch(runtime.driver(order["batch"]))
    longest = runtime.manifest.max_seq_len
    watch.decode(0, order["loops"], _TOKENS)
    watch.decode(longest - 1, order["loops"], 1)
    print(json.dumps({"loaded_bytes": loaded, "peak_bytes": resident("VmHWM")}))


if __name__ == "__main__":
    main()

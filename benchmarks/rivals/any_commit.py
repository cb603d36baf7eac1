"""Runs a package with the runtime of any commit: a program that takes turns over its standard streams.

    python -P benchmarks/rivals/any_commit.py '{"package": ..., "threads": 2, "loops": 4, "context": 10, "tokens": 8}'

It takes a turn per line that it reads, and writes a sample as a line of JSON: "token_s", the median seconds from one
token to the next. Uses only what every commit's runtime has. PYTHONPATH says which runtime.
"""

from __future__ import annotations

import json
import sys
from statistics import median
from time import perf_counter


def main() -> None:
    order = json.loads(sys.argv[1])
    from melt_runtime import Generator, Runtime

    runtime = Runtime.load(order["package"], threads=order["threads"], check_hashes=False)
    prompt = list(range(1, order["context"] + 1))
    options = runtime.options(max_tokens=order["tokens"] + 2, loops=order["loops"], exit_threshold=1.0, ignore_eos=True)
    for _ in sys.stdin:
        times, last = [], None
        for _delta in Generator(runtime.driver(), [prompt], options, None):
            now = perf_counter()
            times += [] if last is None else [now - last]
            last = now
        sample = {"token_s": median(times[1:])}  # the first is a warm-up
        print(json.dumps(sample), flush=True)


if __name__ == "__main__":
    main()

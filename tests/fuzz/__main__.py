"""``make fuzz``: tries inputs for some minutes, prints the results, and fails if there is a finding."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .campaign import Tally, Worker, hunt
from .targets import TARGETS

_EXAMPLES = 200  # inputs per turn of a target


def main() -> int:
    """Return 1 if there are findings, else 0."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("package", type=Path, help="A sound package with a tokenizer, small.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0, help="Where to begin; the same seed tries the same inputs.")
    parser.add_argument("--findings", type=Path, default=Path("build/fuzz"), help="Where findings are written.")
    arguments = parser.parse_args()
    end, start = time.monotonic() + 60 * arguments.minutes, arguments.seed
    tallies = {name: Tally(name) for name in arguments.targets}
    workers = {name: Worker(name, arguments.package.resolve()) for name in arguments.targets}
    try:
        while time.monotonic() < end:
            for name, worker in workers.items():
                if time.monotonic() < end:
                    hunt(worker, tallies[name], _EXAMPLES, start)
            start += 1
            print("; ".join(f"{name} {tally.tried}" for name, tally in tallies.items()), file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.__exit__()
    found = [finding for tally in tallies.values() for finding in tally.findings.values()]
    for tally in tallies.values():
        print(tally.line())
    total = sum(tally.tried for tally in tallies.values())
    kinds = ", ".join(f"{sum(t.outcomes[kind] for t in tallies.values())} {kind}" for kind in ("accepted", "refused"))
    print(f"in all: {total} tried, {kinds}, {len(found)} kinds of findings")
    for number, finding in enumerate(found):
        arguments.findings.mkdir(parents=True, exist_ok=True)
        file = arguments.findings / f"{finding.target.replace(' ', '-')}-{number}"
        file.write_bytes(finding.content)
        print(f"\n{finding.target}: {finding.what} ({file})\n{finding.details}")
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())

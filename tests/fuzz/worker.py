"""The process that tries inputs one after the other: ``python -m fuzz.worker TARGET PACKAGE WORK``.

It reads inputs with their length in front and answers each with a line of JSON; the first line holds the good inputs.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import struct
import sys
import traceback
from pathlib import Path

from melt_runtime.machine import resident

from .targets import prepared

MOST_MEMORY = 8 << 30  # address space; beyond it a MemoryError is raised, which is a finding


def main(name: str, package: Path, work: Path) -> None:
    """Try inputs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    said = work / "stderr"
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 2)
    target = prepared(name, package, work)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    seeds = target.seeds()
    for seed in seeds:
        target.attempt(seed)  # good inputs must be accepted, or refusals prove nothing
    print(json.dumps([base64.b64encode(seed).decode() for seed in seeds]), file=answers, flush=True)
    while header := sys.stdin.buffer.read(4):
        content = sys.stdin.buffer.read(*struct.unpack("<I", header))
        before, spoken = _fresh_peak(), said.stat().st_size
        outcome, error = "accepted", ""
        try:
            target.attempt(content)
        except target.refused as refusal:
            outcome, error = "refused", str(refusal)
            if not error or len(error.splitlines()) != 1 or len(error) > 2000:
                outcome = "unclear"
        except BaseException:
            outcome, error = "failed", traceback.format_exc()
        answer = {
            "outcome": outcome,
            "error": error[-4000:],
            "grown": max((resident("VmHWM") or 0) - before, 0),
            "spoke": said.read_bytes()[spoken:][:1000].decode("utf-8", "replace"),
        }
        print(json.dumps(answer), file=answers, flush=True)


def _fresh_peak() -> int:
    """Reset the peak of this process's memory and return its present size."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return resident("VmHWM") or 0
    return resident("VmRSS") or 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

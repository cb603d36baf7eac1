"""Facts about the machine: processor, memory bandwidth, memory use of a process."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The distributions that provide the onnxruntime module.
ONNX_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")

# Far above any cache's size, so that every byte is read from memory.
READ_BYTES = 1 << 28


def describe_machine() -> dict[str, Any]:
    """Describe the hardware and system that measurements ran on, without identifying the machine. Unknown facts are
    None."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    affinity = getattr(os, "sched_getaffinity", None)
    pages = getattr(os, "sysconf_names", {})
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in pages else None
    load = getattr(os, "getloadavg", None)
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.release()}",
        "load_at_start": round(load()[0], 2) if load else None,
    }


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of those distributions that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def resident(field: str, process: int | None = None) -> int | None:
    """Return a process's resident memory in bytes (process None: this one), or None where it is unknown or has ended.

    ``field``: "VmRSS" for the present, "VmHWM" for the peak. getrusage does not serve: a child's peak starts at its
    parent's.
    """
    status = Path(f"/proc/{process or 'self'}/status")
    if not status.is_file():
        return None
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def available_memory() -> int | None:
    """Return the bytes that can be allocated without swapping (MemAvailable), or None where unknown."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    lines = info.read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


class ReadBandwidth:
    """A measurement of memory read bandwidth: several threads over one large buffer.

    Of a few ways to read, the fastest is used. Each depends on every byte, so none can be skipped, and NumPy releases
    the interpreter lock meanwhile. ``threads``: as many as the measured package uses.
    """

    def __init__(self, threads: int, total: int = READ_BYTES):
        self.threads = threads
        words = max(total // threads // 8, 1)
        self._parts = [np.ones(words, np.uint64) for _ in range(threads)]
        self._pool = ThreadPoolExecutor(threads)
        self._way = max(_WAYS, key=lambda way: max(self._rate(way) for _ in range(3)))

    def measure(self) -> float:
        """Return the bandwidth in bytes per second, the better of two readings."""
        return max(self._rate(self._way) for _ in range(2))

    def _rate(self, way: str) -> float:
        started = perf_counter()
        list(self._pool.map(_WAYS[way], self._parts))
        return sum(part.nbytes for part in self._parts) / (perf_counter() - started)

    def close(self) -> None:
        """Stop the threads and free the buffer."""
        self._pool.shutdown()
        self._parts.clear()


def _largest(part: NDArray[np.uint64]) -> object:
    return part.view(np.float32).max()


def _all_bits(part: NDArray[np.uint64]) -> object:
    return np.bitwise_or.reduce(part)


def _largest_byte(part: NDArray[np.uint64]) -> object:
    return part.view(np.int8).max()


_WAYS = {"largest": _largest, "all bits": _all_bits, "largest byte": _largest_byte}


def physical_cores() -> int:
    """Return the number of physical cores that this process may use: the default number of threads."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else (os.cpu_count() or 1)
    return max(1, min(cores, _listed_cores() or cores))


def _listed_cores() -> int | None:
    """Count the physical cores in /proc/cpuinfo. None where it cannot be read."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return None
    pairs: set[tuple[str, str]] = set()
    socket = ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "physical id":
            socket = value.strip()
        elif name.strip() == "core id":
            pairs.add((socket, value.strip()))
    return len(pairs) or None

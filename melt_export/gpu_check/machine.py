"""What lies under the backends: a card (or, for trying the checks without one, the host), its memory and bandwidth."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from melt_runtime.backends.cuda import open_device
from melt_runtime.machine import describe_machine, resident

_COPIES = 20


class Machine(Protocol):
    """Where the states of the targets lie."""

    def facts(self) -> dict[str, Any]:
        """What it is: card, driver, memory."""

    def memory_used(self) -> int:
        """Bytes of its memory that are in use now, by everything on it."""

    def bandwidth(self, size: int) -> dict[str, Any]:
        """``bytes_per_second`` of copying ``size`` bytes within its memory, each byte read and written, and ``how``."""


class HostMachine:
    """The host's CPU and memory."""

    def facts(self) -> dict[str, Any]:
        """Processor, cores and memory."""
        about = describe_machine()
        return {"host": about["cpu"], "cores": about["cores"], "memory_bytes": about["memory_bytes"]}

    def memory_used(self) -> int:
        """Resident memory of this process."""
        return resident("VmRSS") or 0

    def bandwidth(self, size: int) -> dict[str, Any]:
        """Of one thread's copies in host memory."""
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        times = []
        for _ in range(_COPIES):
            began = time.perf_counter()
            np.copyto(target, source)
            times.append(time.perf_counter() - began)
        return described(size, times, "copies in host memory, one thread")


def described(size: int, seconds: list[float], how: str) -> dict[str, Any]:
    """The bandwidth of copies of one size: the median's."""
    rate = 2 * size / float(np.median(seconds))
    return {"bytes_per_second": rate, "how": f"median of {len(seconds)} {how}, {size / 1e6:,.0f} MB each"}


class CudaMachine:
    """An NVIDIA device. Raises BackendError where there is none, or no cuda-bindings to reach it."""

    def __init__(self, index: int):
        self.device = open_device(index)

    def facts(self) -> dict[str, Any]:
        """Card, compute capability, driver and memory."""
        free, total = self.device.memory()
        driver = Path("/proc/driver/nvidia/version")
        text = driver.read_text(encoding="utf-8", errors="replace") if driver.is_file() else ""
        found = re.search(r"Kernel Module\s.*?(\d+\.\d+(?:\.\d+)?)", text)
        return {
            "card": self.device.name,
            "compute_capability": self.device.capability,
            "driver": found[1] if found else "unknown",
            "driver_cuda": self.device.driver,
            "memory_bytes": total,
            "free_bytes": free,
        }

    def memory_used(self) -> int:
        """Bytes in use on the device, as CUDA reports them: other processes' too."""
        free, total = self.device.memory()
        return total - free

    def bandwidth(self, size: int) -> dict[str, Any]:
        """Of copies from device to device, timed with CUDA events."""
        stream, blocks = self.device.stream(), [self.device.allocate(size) for _ in range(2)]
        source, target = (block.address for block in blocks)
        times = []
        for index in range(_COPIES + 2):
            first = stream.record()
            stream.copy(target, source, size)
            last = stream.record()
            last.wait()
            if index > 1:
                times.append(last.since(first) / 1e3)
        return described(size, times, "copies on the device, CUDA events")

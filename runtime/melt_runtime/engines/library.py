"""The TensorRT or TensorRT-RTX library: one Python API under two module names."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from threading import RLock
from typing import Any

from ..errors import ArgumentError, BackendError
from ..package.engine_spec import FLAVOURS

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_TITLES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass
class Messages:
    """The messages that the library logged."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Drop all messages."""
        self.errors.clear()
        self.warnings.clear()

    def reason(self) -> str:
        """Return the first error on one line."""
        return " ".join(self.errors[0].split())[:400] if self.errors else "the library gave no reason"


class Library:
    """An imported flavour, with a logger that collects messages."""

    def __init__(self, flavour: str, module: Any):
        self.flavour, self.module = flavour, module
        self.title = _TITLES[flavour]
        self.version = str(module.__version__)
        self.messages = Messages()
        self.lock = RLock()  # held from a call until its messages are read, because threads share both
        self.logger = self._make_logger()

    def _make_logger(self) -> Any:
        base, messages = self.module.ILogger, self.messages

        class Logger(base):  # type: ignore[misc, valid-type]
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity in (base.INTERNAL_ERROR, base.ERROR):
                    messages.errors.append(message)
                elif severity == base.WARNING:
                    messages.warnings.append(message)

        return Logger()

    def builder(self) -> Any:
        """Make a builder. Raises BackendError, for example without a driver."""
        self.messages.clear()
        try:
            builder = self.module.Builder(self.logger)
        except Exception as error:
            raise BackendError(f"{self.title} {self.version} cannot start: {self._why(error)}") from error
        if not builder:
            raise BackendError(f"{self.title} {self.version} cannot start: {self.messages.reason()}")
        return builder

    def _why(self, error: Exception) -> str:
        return self.messages.reason() if self.messages.errors else " ".join(str(error).split())[:400]

    @property
    def capabilities(self) -> dict[str, Any]:
        """The compute capabilities that can be built for, by number ("8.9"); empty for TensorRT."""
        kinds = getattr(self.module, "ComputeCapability", None)
        if self.flavour != "tensorrt-rtx" or kinds is None:
            return {}
        names = [name for name in dir(kinds) if name.startswith("SM") and name[2:].isdigit()]
        found = {f"{name[2:-1]}.{name[-1]}": getattr(kinds, name) for name in names}
        return dict(sorted(found.items(), key=lambda item: float(item[0])))

    @property
    def updates_caches(self) -> bool:
        """Whether it has KV_CACHE_UPDATE, needed by the standard dialect: TensorRT 10.15 and newer, and every
        TensorRT-RTX."""
        return hasattr(self.module.LayerType, "KV_CACHE_UPDATE")


def open_library(flavour: str) -> Library:
    """Import a flavour. Raises ArgumentError; BackendError that names the extra to install."""
    if flavour not in FLAVOURS:
        raise ArgumentError(f"engine {flavour!r} is not one of {', '.join(FLAVOURS)}")
    try:
        module = import_module(_MODULES[flavour])
        return Library(flavour, module)
    except (ImportError, AttributeError, OSError) as error:
        raise BackendError(
            f"{_TITLES[flavour]} is not installed ({' '.join(str(error).split())}); "
            f"install it with: pip install 'melt-export[{flavour}]'"
        ) from error


def open_libraries(flavours: Iterable[str]) -> dict[str, Library]:
    """Import those flavours that are installed."""
    found: dict[str, Library] = {}
    for flavour in dict.fromkeys(flavours):
        with suppress(BackendError):
            found[flavour] = open_library(flavour)
    return found


def current_capability(device: int = 0) -> str | None:
    """Return the compute capability of a CUDA device ("8.9"), or None without driver or device."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        handle, value, parts = ctypes.c_int(), ctypes.c_int(), []
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(handle), device):
            return None
        for attribute in (_MAJOR, _MINOR):
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle):
                return None
            parts.append(str(value.value))
        return ".".join(parts)
    return None

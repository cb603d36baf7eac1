"""Runs MELT packages in constant memory, without PyTorch.

from melt_runtime import Runtime
runtime = Runtime.load("package")
print(runtime.generate("2+2=").text)
"""

from .driver import LoopDriver, LoopSettings
from .errors import (
    ArgumentError,
    BackendError,
    BusyError,
    CancelledError,
    ClosedError,
    DeadlineError,
    MeltError,
    PackageError,
    PromptError,
)
from .generation import Generator
from .package import Manifest, Package
from .runtime import Runtime
from .sampling import Sampler, SamplingParams
from .scheduler import Request, Scheduler, SchedulerMetrics, Ticket
from .track import Constraint, Generation, GenerationOptions, Logprobs, Piece

__all__ = [
    "ArgumentError",
    "BackendError",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "Constraint",
    "DeadlineError",
    "Generation",
    "GenerationOptions",
    "Generator",
    "Logprobs",
    "LoopDriver",
    "LoopSettings",
    "Manifest",
    "MeltError",
    "Package",
    "PackageError",
    "Piece",
    "PromptError",
    "Request",
    "Runtime",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerMetrics",
    "Ticket",
]

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
    MeltWarning,
    OvertakenError,
    PackageError,
    PromptError,
    SessionError,
)
from .generation import Generator
from .memory import Memory
from .package import Manifest, Package
from .prefixes import PrefixStore
from .request_options import GenerateOptions
from .runtime import Runtime
from .sampling import Sampler, SamplingParams
from .scheduler import Request, Scheduler, SchedulerMetrics, Ticket
from .session import Session
from .track import Constraint, Generation, GenerationOptions, Logprobs, Piece

__all__ = [
    "ArgumentError",
    "BackendError",
    "BusyError",
    "CancelledError",
    "ClosedError",
    "Constraint",
    "DeadlineError",
    "GenerateOptions",
    "Generation",
    "GenerationOptions",
    "Generator",
    "Logprobs",
    "LoopDriver",
    "LoopSettings",
    "Manifest",
    "MeltError",
    "MeltWarning",
    "Memory",
    "OvertakenError",
    "Package",
    "PackageError",
    "Piece",
    "PrefixStore",
    "PromptError",
    "Request",
    "Runtime",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerMetrics",
    "Session",
    "SessionError",
    "Ticket",
]

"""Run MELT packages in constant memory, without PyTorch.

from melt_runtime import Runtime
runtime = Runtime.load("package")
print(runtime.generate("2+2=").text)
"""

from .decoding.generator import Generator
from .decoding.loop_driver import LoopDriver
from .decoding.prefix_cache import PrefixCache
from .decoding.prompt_reading import MeanHidden, PromptLogprobs
from .decoding.request_options import GenerateOptions
from .decoding.settings import GenerationOptions, LoopSettings
from .decoding.state_memory import Memory
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
    PromptTooLongError,
    SessionError,
)
from .package.manifest import Manifest
from .package.reader import Package
from .results import Generation, Logprobs, LoopStates, TextDelta
from .runtime import Runtime
from .sampling.constraint import Constraint
from .sampling.sampler import Sampler, SamplingParams
from .scheduler.metrics import SchedulerMetrics
from .scheduler.request import Request, RequestHandle
from .scheduler.scheduler import Scheduler
from .session.session import Session

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
    "LoopStates",
    "Manifest",
    "MeanHidden",
    "MeltError",
    "MeltWarning",
    "Memory",
    "OvertakenError",
    "Package",
    "PackageError",
    "PrefixCache",
    "PromptError",
    "PromptLogprobs",
    "PromptTooLongError",
    "Request",
    "RequestHandle",
    "Runtime",
    "Sampler",
    "SamplingParams",
    "Scheduler",
    "SchedulerMetrics",
    "Session",
    "SessionError",
    "TextDelta",
]

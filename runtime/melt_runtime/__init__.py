"""Runs MELT packages in constant memory, without PyTorch.

from melt_runtime import Runtime
runtime = Runtime.load("package")
print(runtime.generate("2+2=").text)
"""

from .errors import ArgumentError, BackendError, MeltError, PackageError, PromptError
from .generation import Generation, GenerationOptions, Generator, Piece
from .package import Manifest, Package
from .runtime import Runtime
from .sampling import Sampler, SamplingParams
from .session import LoopSettings, Session

__all__ = [
    "ArgumentError",
    "BackendError",
    "Generation",
    "GenerationOptions",
    "Generator",
    "LoopSettings",
    "Manifest",
    "MeltError",
    "Package",
    "PackageError",
    "Piece",
    "PromptError",
    "Runtime",
    "Sampler",
    "SamplingParams",
    "Session",
]

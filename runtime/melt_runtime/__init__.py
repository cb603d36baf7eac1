"""Runs MELT packages in constant memory, without PyTorch.

from melt_runtime import Runtime
runtime = Runtime.load("package")
print(runtime.generate("2+2=").text)
"""

from .driver import LoopDriver, LoopSettings
from .errors import ArgumentError, BackendError, MeltError, PackageError, PromptError
from .generation import Generator
from .package import Manifest, Package
from .runtime import Runtime
from .sampling import Sampler, SamplingParams
from .track import Generation, GenerationOptions, Piece

__all__ = [
    "ArgumentError",
    "BackendError",
    "Generation",
    "GenerationOptions",
    "Generator",
    "LoopDriver",
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
]

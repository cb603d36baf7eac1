"""Registration with transformers' Auto classes at their first use, and not before.

``import melt_models`` must stay quick for commands that only check their arguments, and still be all that
``AutoModelForCausalLM.from_pretrained`` needs, in whichever order the two are imported. The models cannot be imported
while transformers is being imported, of which they need parts. So the first call of ``AutoConfig``, which every Auto
class makes, imports them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_AWAITED = "transformers.models.auto.configuration_auto"
_CALLS = ("from_pretrained", "for_model")


def before_auto_classes(register: Callable[[], None]) -> None:
    """Call ``register`` once, before the first call of transformers' ``AutoConfig``."""
    if _AWAITED in sys.modules:
        _precede(sys.modules[_AWAITED], register)
    else:
        sys.meta_path.insert(0, _Awaiting(register))


def _precede(module: ModuleType, register: Callable[[], None]) -> None:
    """Replace AutoConfig's methods by some that put the real ones back, register and go on."""
    auto: Any = module.AutoConfig
    real = {name: auto.__dict__[name] for name in _CALLS}

    def preceded(name: str) -> Any:
        @functools.wraps(real[name].__func__)
        def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
            for other, method in real.items():
                setattr(auto, other, method)
            register()
            return getattr(cls, name)(*args, **kwargs)

        return classmethod(call)

    for name in _CALLS:
        setattr(auto, name, preceded(name))


class _Awaiting(MetaPathFinder):
    """A finder that finds nothing itself, and lets one module be prepared once its own loader has run it."""

    def __init__(self, register: Callable[[], None]):
        self._register = register

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self._register)
        return spec


class _Followed(Loader):
    """A module's own loader, after which ``AutoConfig`` is prepared."""

    def __init__(self, loader: Loader, register: Callable[[], None]):
        self._loader, self._register = loader, register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _precede(module, self._register)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # such as the module's source

"""Form and sections of a run's YAML file, checked before PyTorch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError

STAGES = ("teacher", "phase1", "phase2", "gate")
_SECTIONS = ("output", "seed", "precision", "threads", "data", "model", "melt", *STAGES)


def read_sections(file: Path) -> dict[str, Any]:
    """Read a run's file as plain values. Raises ConfigError."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds no sections; it must be a mapping with {', '.join(_SECTIONS)}")
    check_keys(content, _SECTIONS, f"{file}")
    return content


def check_keys(section: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for an unknown key."""
    known = sorted(known)
    for key in section:
        if key not in known:
            raise ConfigError(f"{where} has the unknown key {key!r}; known are {', '.join(known)}")

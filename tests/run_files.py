"""The YAML files of small trainings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def write_run(directory: Path, run: Mapping[str, Any], **sections: Any) -> Path:
    """Write ``run`` with other ``sections``, whose output is beside the file; a section of None is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {"output": str(directory / "out"), **run, **sections}
    file = directory / "run.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return file

"""The Python in the README and on the runtime's page runs as it is written, on the shipped checkpoint's package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import MakePackage

ROOT = Path(__file__).parent.parent
SNIPPETS = [
    (page, number, code)
    for page in ("README.md", "docs/runtime.md")
    for number, code in enumerate(
        re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    )
    if "melt_runtime" in code
]


@pytest.mark.parametrize(("page", "number", "code"), SNIPPETS, ids=[f"{page}-{number}" for page, number, _ in SNIPPETS])
def test_a_snippet_runs_as_written_on_the_demo(
    page: str, number: int, code: str, make_package: MakePackage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "PACKAGE").symlink_to(make_package(ROOT / "examples" / "addition-melt", max_batch=32))
    monkeypatch.chdir(tmp_path)
    exec(code, {})


def test_there_are_snippets() -> None:
    assert {page for page, _, _ in SNIPPETS} == {"README.md", "docs/runtime.md"}

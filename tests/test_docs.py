"""The documents name what there is. Building them as a site is `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

import melt_runtime

DOCS = Path(__file__).resolve().parent.parent / "docs"


def test_the_api_reference_names_all_that_the_package_exports_and_nothing_else() -> None:
    named = re.findall(
        r"^\.\. auto\w+:: melt_runtime\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(named) == sorted(melt_runtime.__all__)


def test_the_readme_is_short_and_every_page_is_reached_from_the_index() -> None:
    assert len((DOCS.parent / "README.md").read_text(encoding="utf-8").splitlines()) < 175
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    tree = {line for block in re.findall(r"```\{toctree\}(.*?)```", index, re.DOTALL) for line in block.split()}
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages <= tree

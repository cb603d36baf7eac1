"""The benchmarks' common part, and what docs/benchmarks.md says of recorded figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import batching  # noqa: E402
import common  # noqa: E402
import engine_build  # noqa: E402
import write_docs  # noqa: E402
from templating import render  # noqa: E402


def build(name: str, seconds: float, plan: int) -> engine_build.Build:
    """A build that never was."""
    plans = {"embed": 200_000_000, "loop_step": plan, "lm_head": 201_000_000}
    return engine_build.Build(name, seconds, 9_000_000_000, 300_000_000, plans, "1.7.1.17")


def engines(layers: int) -> dict[str, Any]:
    """A section of two builds."""
    builds = [build("fp16", 63.4, 2_890_000_000), build("fp16-int4", 125.0, 850_000_000)]
    return engine_build.report("ouro-1.4b", layers, 4096, common.loaded_machine(), builds)


@pytest.fixture
def recorded() -> dict[str, Any]:
    """The figures in docs, without engines."""
    content = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    content.pop("engines", None)
    return content


def test_the_document_says_what_was_recorded() -> None:
    content = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    assert write_docs.markdown(content) == (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def test_a_section_without_a_figure_is_refused_and_not_written_with_a_gap() -> None:
    section = engines(0)
    del section["builds"][0]["peak_bytes"]
    with pytest.raises(jinja2.UndefinedError, match="peak_bytes"):
        render("engines.md.j2", section=section)


def test_engines_are_in_the_document_only_when_they_were_recorded(recorded: dict[str, Any]) -> None:
    assert "## Engines" not in write_docs.markdown(recorded)
    assert "## Engines" in write_docs.markdown({**recorded, "engines": engines(0)})


def test_the_engines_section_says_time_peak_size_and_precision_of_every_build() -> None:
    text = render("engines.md.j2", section=engines(0))
    rows = [line for line in text.splitlines() if line.startswith("| fp16")]
    assert rows == [
        "| fp16 | 1:03 | 9.00 GB | 200.0 MB | 2.89 GB | 201.0 MB | 3.29 GB |",
        "| fp16, int4 weights | 2:05 | 9.00 GB | 200.0 MB | 850.0 MB | 201.0 MB | 1.25 GB |",
    ]


def test_the_engines_section_names_shape_machine_and_versions() -> None:
    text = render("engines.md.j2", section=engines(0))
    assert "all 24 layers of the ouro-1.4b shape" in text
    assert "tensorrt-rtx 1.7.1.17" in text
    assert common.machine()["cpu"] in text
    assert "a cache for 4,096 tokens" in text


def test_a_slice_of_the_shape_is_not_called_all_of_it() -> None:
    text = render("engines.md.j2", section=engines(2))
    assert " 2 layers of the ouro-1.4b shape" in text
    assert "all 2 layers" not in text


def test_a_section_is_saved_beside_the_others(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    common.save(file, "loop_step", {"a": 1})
    common.save(file, "engines", {"b": 2})
    common.save(file, "loop_step", {"a": 3})
    assert json.loads(file.read_text()) == {"loop_step": {"a": 3}, "engines": {"b": 2}}


def test_a_recorded_command_names_no_place_of_the_machine() -> None:
    line = common.command_line("loop_step.py", ["--json", "/home/someone/docs/b.json", "--keep=/tmp/x", "--quick"])
    assert line == "python benchmarks/loop_step.py --json b.json --keep=x --quick"


def test_batching_measures_streams_and_the_rhythm_beside_a_prompt(tiny_package: Path) -> None:
    settings = batching.Settings(tokens=6, rounds=1, loops=2, threads=1)
    section = batching.run(settings, tiny_package, Console(quiet=True)) | {"command": "python benchmarks/batching.py"}
    assert [row["slots"] for row in section["throughput"]] == [1, 2, 4, 8]
    assert section["prompt"] == 8 * section["chunk"] == 64
    assert section["delay"]["alone"]["count"] >= 4
    assert section["delay"]["beside"]["count"] >= 7  # a token between any two chunks
    text = render("batching.md.j2", section=section)
    assert "while 64 tokens are prefilled" in text
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == 2 + 4 + 2 + 2

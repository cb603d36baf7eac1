"""docs/serving.md says what was measured, and all that the server can be told."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from melt_runtime.cli.serve import serve_command

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import serving_docs  # noqa: E402

DOCUMENT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
BASE: dict[str, Any] = {"date": "a day", "machine": common.loaded_machine(), "versions": {"python": "3"}}
SOAK: dict[str, Any] = {
    **BASE,
    "command": "python benchmarks/soak.py",
    "settings": {"clients": 6, "slots": 4, "threads": 1, "longest": 200},
    "seconds": 601.0,
    "requests": {"stream": 4000, "whole": 2345},
    "errors": 0,
    "tokens": 123_456,
    "first_token": {"p50": 0.0123, "p99": 0.0456, "count": 4000},
    "stream": {"p50": 0.3, "p99": 0.9, "count": 4000},
    "whole": {"p50": 0.2, "p99": 0.8, "count": 2345},
    "state_bytes": 4_194_304,
    "memory": {"settled_bytes": 130e6, "last_bytes": 130.5e6, "grown_bytes": 0.5e6},
}
SPREAD = {"low": 9.0, "high": 11.0, "p99": 12.0, "count": 20}
BATCHING: dict[str, Any] = {
    **BASE,
    "command": "python benchmarks/batching.py",
    "settings": {"layers": 2, "shape": "ouro-1.4b", "loops": 4, "threads": 2, "rounds": 20},
    "package": None,
    "chunk": 128,
    "prompt": 1024,
    "throughput": [{"slots": slots, "median": 10.0 * slots, **SPREAD} for slots in (1, 2, 4, 8)],
    "delay": {name: {"median": 0.01, **SPREAD} for name in ("alone", "beside")},
}


def test_the_document_says_what_was_recorded() -> None:
    recorded = json.loads((ROOT / "docs" / "benchmarks.json").read_text(encoding="utf-8"))
    assert serving_docs.filled(DOCUMENT, recorded) == DOCUMENT


def test_without_figures_it_names_the_commands_that_make_them() -> None:
    text = serving_docs.filled(DOCUMENT, {})
    for script in ("batching", "soak"):
        assert f"$ python benchmarks/{script}.py --json docs/benchmarks.json" in text


def test_with_figures_it_has_tables_and_writing_them_again_changes_nothing() -> None:
    text = serving_docs.filled(DOCUMENT, {"batching": BATCHING, "soak": SOAK})
    for row in (
        "| 8 | 80.0 | 9.0 to 11.0 | 10.0 |",
        "| while 1,024 tokens are prefilled | 10.0 |",
        "| requests | 6,345 |",
        "| failed | 0 |",
        "| time | 10:01 |",
        "| resident memory, last quarter | 130.5 MB (+0.50 MB) |",
        "| first token of a stream | 12.3 | 45.6 | 4,000 |",
    ):
        assert row in text
    assert "2 clients at a time wait for a slot" in text
    assert "Not measured yet" not in text
    assert serving_docs.filled(text, {"batching": BATCHING, "soak": SOAK}) == text
    assert serving_docs.filled(text, {}) == serving_docs.filled(DOCUMENT, {})


def test_a_soak_with_attacks_shows_their_kinds_and_what_honest_clients_waited() -> None:
    waits = {name: {"attacked": 0.5} for name in ("first_token", "stream", "whole")}
    soak = {**SOAK, "attacks": {"bad bodies": 1200, "absurd loops": 3}, "honest": waits}
    text = serving_docs.filled(DOCUMENT, {"soak": soak})
    assert "Attacks: 1,200 bad bodies, 3 absurd loops." in text
    for name in ("first token", "whole stream", "in one piece"):
        assert f"| {name}, while 1,203 attacks came |  | 500.0 |  |" in text


def test_a_document_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="<!-- soak -->"):
        serving_docs.filled(DOCUMENT.replace("<!-- soak -->", ""), {})


def test_every_option_of_the_server_is_in_the_document() -> None:
    names = [name.replace("_", "-") for name in inspect.signature(serve_command).parameters if name != "package"]
    assert [name for name in names if f"`--{name}`" not in DOCUMENT] == []


def test_its_yaml_is_yaml_and_gives_the_pod_longer_than_the_drain() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    pod = yaml.safe_load(block)["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > inspect.signature(serve_command).parameters["drain"].default
    assert pod["containers"][0]["args"][:2] == ["melt-run", "serve"]


def test_files_that_it_links_to_are_there() -> None:
    links = re.findall(r"\]\(([^):#]+)\)", DOCUMENT)
    assert len(links) > 5
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []

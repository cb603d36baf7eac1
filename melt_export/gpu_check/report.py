"""What came out: rows for a person, a JSON file for everything else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PASSED, FAILED, MEASURED, NOT_RUN = "passed", "failed", "measured", "not run"
_STYLES = {PASSED: "green", FAILED: "bold red", MEASURED: "", NOT_RUN: "yellow"}


@dataclass(frozen=True)
class Result:
    """One row: what was looked at on which model and target, what came of it (``state``), and the figures behind."""

    model: str
    target: str
    check: str
    state: str
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """A whole run. machine: card, driver and memory; versions: of all libraries there are."""

    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    bandwidth: dict[str, Any]
    quick: bool
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Result]:
        """What could run and did not do what it must."""
        return [result for result in self.results if result.state == FAILED]

    @property
    def passed(self) -> bool:
        """Whether something could be checked, and all of it holds."""
        return not self.failed and any(result.state == PASSED for result in self.results)

    def write(self, path: Path) -> None:
        """The JSON file."""
        content = {"passed": self.passed, **asdict(self)}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """The machine, a table of all rows, and the verdict."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        console.print(Text(machine))
        console.print(Text(", ".join(f"{name} {number}" for name, number in self.versions.items())))
        console.print(Text(f"bandwidth {self.bandwidth['bytes_per_second'] / 1e9:,.0f} GB/s ({self.bandwidth['how']})"))
        table = Table(box=box.SIMPLE_HEAD, header_style="cyan")
        for heading in ("model", "run by", "check", "", ""):
            table.add_column(heading, overflow="fold")
        previous: tuple[str, str] | None = None
        for row in self.results:
            if previous is not None and previous[0] != row.model:
                table.add_section()
            here = (row.model, row.target)
            shown = (
                ("", "")
                if previous == here
                else ("" if previous and previous[0] == row.model else row.model, row.target)
            )
            table.add_row(*map(Text, (*shown, row.check)), Text(row.state, style=_STYLES[row.state]), Text(row.detail))
            previous = here
        console.print(table)
        console.print(Text(self.verdict(), style="bold"))

    def verdict(self) -> str:
        """One sentence."""
        count = {state: sum(r.state == state for r in self.results) for state in (PASSED, FAILED, NOT_RUN)}
        tail = f"{count[PASSED]} passed, {count[FAILED]} failed, {count[NOT_RUN]} not run, {self.seconds:.0f} s"
        if self.failed:
            return f"FAILED: {tail}"
        return f"passed: {tail}" if self.passed else f"nothing could be checked: {tail}"

"""Half a minute of mixed requests, and clients that mean harm among them: none fails, and the server's memory stays
where it is. Nothing here asserts on time."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx
import pytest
from serving import WAIT, Server

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import soak


def test_mixed_requests_and_attacks_fail_none_and_leaves_memory_where_it_was(served_package: Path) -> None:
    report = soak.run(soak.Settings(seconds=30, longest=100), served_package)
    assert report["first_errors"] == []
    assert report["errors"] == report["left_running"] == 0
    assert len(report["requests"]) == 5, "every kind of request was among them"
    assert len(report["attacks"]) >= 6, "and most kinds of attacks"
    assert all(row["attacked"] > 0 < row["alone"] for row in report["honest"].values())
    assert report["tokens"] > 0
    grown, settled = report["memory"]["grown_bytes"], report["memory"]["settled_bytes"]
    assert grown < 0.15 * settled, f"resident memory grew from {settled:,.0f} by {grown:,.0f} bytes"


def test_a_soak_ends_by_itself_after_so_many_requests(served_package: Path) -> None:
    report = soak.run(soak.Settings(seconds=600, most=20, longest=5), served_package)
    assert sum(report["requests"].values()) == 20
    assert report["errors"] == 0


BODY = {"model": "tiny", "prompt": [5], "max_tokens": 3, "ignore_eos": True}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (soak.Kind("a status", {**BODY, "loops": 0}), "status 400"),
        (soak.Kind("a stream's status", {**BODY, "loops": 0}, stream=True), "status 400"),
        (soak.Kind("a refusal that did not come", BODY, refused=400), "status 200"),
    ],
)
def test_an_answer_that_is_not_what_it_must_be_is_a_failure(server: Server, kind: soak.Kind, message: str) -> None:
    with httpx.Client(base_url=server.url, timeout=WAIT) as client, pytest.raises(ValueError, match=message):
        soak.ask(client, kind, soak.Tally())


def test_memory_that_grows_is_seen_and_its_start_is_not_counted() -> None:
    samples = [(float(at), 100 if at < 20 else 200 + (at >= 70) * 50) for at in range(100)]
    found = soak.memory(samples, 100.0)
    assert (found["settled_bytes"], found["last_bytes"], found["grown_bytes"]) == (200, 250, 50)
    assert found["peak_bytes"] == 250
    assert len(found["resident"]) <= 60

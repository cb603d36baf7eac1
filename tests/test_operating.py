"""What an operator has: options from a file and from the environment, logs, probes, metrics, the files of deploy/."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
from melt_runtime import ArgumentError
from melt_runtime.cli.config import read_config
from melt_runtime.cli.main import app
from serving import WAIT, Server, eventually
from test_run_cli import process, refused, run
from typer.main import get_command

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
ASKED: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "extra_body": {"ignore_eos": True}}


def options(command: str) -> set[str]:
    """The names of a command's options, as in variables."""
    return {one.name.upper() for one in get_command(app).commands[command].params if one.name}  # type: ignore[attr-defined]


def requests(server: Server) -> list[str]:
    return [line["path"] for line in server.log() if line["event"] == "request"]


# Options


def test_the_command_line_wins_then_the_environment_then_the_file(served_package: Path, tmp_path: Path) -> None:
    file = tmp_path / "melt.toml"
    file.write_text("[serve]\nmax-tokens = 5\nmax_loops = 6\nmax-seconds = 70.5\nthreads = 1\n[generate]\nloops = 2\n")
    environment = {"MELT_RUN_CONFIG": str(file), "MELT_RUN_SERVE_MAX_LOOPS": "7", "MELT_RUN_SERVE_MAX_TOKENS": "8"}
    with Server(served_package, "--max-tokens", 9, **environment) as server:
        model = httpx.get(f"{server.url}/v1/models/tiny", timeout=WAIT).json()
    assert (model["max_tokens"], model["max_loops"], model["max_seconds"]) == (9, 7, 70.5)


def test_a_file_may_be_named_behind_the_command(tmp_path: Path) -> None:
    file = tmp_path / "melt.toml"
    file.write_text(f'[serve]\npackage = "{tmp_path / "absent"}"\nport = 0\n')
    for arguments in (["--config", file, "serve"], ["serve", "--config", file]):
        assert "absent does not exist" in refused(run(*arguments))


def test_a_file_has_options_of_every_command_the_package_among_them(tiny_package: Path, tmp_path: Path) -> None:
    file = tmp_path / "melt.toml"
    file.write_text(
        f'[generate]\npackage = "{tiny_package}"\nprompt = "abc"\nmax-tokens = 4\njson = true\nstop = ["~"]\n'
    )
    said = json.loads(run("--config", file, "generate").stdout)
    assert len(said["token_ids"]) <= 4
    assert run("--config", file, "generate", tiny_package, "abc", "--max-tokens", 4).stdout.startswith("{")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("MELT_RUN_SERVE_MAX_SECOND", "MELT_RUN_SERVE_MAX_SECONDS"),
        ("MELT_RUN_SERV_PORT", "MELT_RUN_SERVE_PORT"),
        ("MELT_SERVE_PORT", "MELT_RUN_SERVE_PORT"),
        ("MELT_API_KEY", "MELT_API_KEYS"),
        ("MELT_RUN_GENERATE_LOPS", "MELT_RUN_GENERATE_LOOPS"),
        ("MELT_RUN_CONFG", "MELT_RUN_CONFIG"),
    ],
)
def test_a_variable_that_no_option_reads_is_named_with_the_nearest_that_is(
    tmp_path: Path, name: str, near: str
) -> None:
    result = process("inspect", tmp_path / "none", env={**os.environ, name: "3"})
    first, second = result.stderr.splitlines()
    assert first == f"Warning: no option reads the variable {name}; did you mean {near}?"
    assert "does not exist" in second


def test_variables_that_are_read_or_are_for_others_are_not_named(tmp_path: Path) -> None:
    names = [
        "MELT_RUN_SERVE_MAX_SECONDS",
        "MELT_API_KEYS",
        "MELT_PACKAGE",
        "MELT_EXPORT_WEIGHTS",
        "MELTING",
        "MELT_DIR",
    ]
    result = process("inspect", tmp_path / "none", env={**os.environ, **dict.fromkeys(names, "3")})
    assert len(result.stderr.splitlines()) == 1


def test_a_variable_of_every_command_that_takes_options_from_them_is_named() -> None:
    for command in ("convert", "export", "verify", "train"):
        script = f"import sys; sys.argv[1:] = ['--help']; from melt_export.entry_points import {command}; {command}()"
        name = f"MELT_{command.upper()}_CHECKPOIN"
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, name: "3"}, timeout=WAIT
        )
        assert result.returncode == 0, result.stderr
        assert f"Warning: no option reads the variable {name}" in result.stderr


@pytest.mark.parametrize("how", ["variable", "file", "flag"])
def test_a_wrong_value_is_refused_without_the_name_of_a_librarys_error(tmp_path: Path, how: str) -> None:
    file = tmp_path / "melt.toml"
    file.write_text('[serve]\nlog-level = "loud"\n')
    flags: dict[str, list[object]] = {"file": ["--config", file], "flag": ["--log-level", "loud"]}
    given = flags.get(how, [])
    more = {"MELT_RUN_SERVE_LOG_LEVEL": "loud"} if how == "variable" else {}
    result = process("serve", tmp_path / "none", *given, env={**os.environ, **more})
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("melt-run: Invalid value for '--log-level': 'loud' is not one of 'debug'")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 1", "port is outside a section"),
        ("[serv]\nport = 1", "did you mean serve?"),
        ("[serve]\nprot = 1", "unknown option 'prot'; did you mean port?"),
        ("[serve]\nport = true", "port is True; it must be a text or a number"),
        ("[serve]\nport = [1]", "it must be a text or a number"),
        ("[serve]\nlog-prompts = 1", "it must be true or false"),
        ("[serve]\nport = 8000.5", "'--port'"),
        ("[serve\n", "is no TOML"),
        ("[generate]\nmax_tokens = 1\nmax-tokens = 2", "the option max-tokens twice"),
        ("a" * (1 << 20) + "=1", "no file of options is that large"),
        ("[serve]\nname = 2020-01-01", "it must be a text or a number"),
    ],
)
def test_a_wrong_file_is_refused_by_the_name_of_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "melt.toml"
    file.write_text(text)
    result = run("--config", file, "serve", tmp_path / "none")
    assert result.exit_code == 2
    assert said in result.output


def test_a_device_without_an_end_is_not_read_as_a_file() -> None:
    assert "no file of options is that large" in refused(run("--config", "/dev/zero", "serve", "package"))


def test_no_slots_are_refused_by_the_options_name(tiny_package: Path) -> None:
    result = run("serve", tiny_package, "--slots", 0)
    assert result.exit_code == 2
    assert "'--slots'" in result.output


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(run("--config", tmp_path / "none.toml", "serve", "package"))
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_config(tmp_path, get_command(app))


# Logs and probes


def test_probes_that_succeed_are_not_logged_unless_debugging(served_package: Path) -> None:
    probes = ("/health", "/ready", "/metrics")
    with Server(served_package, MELT_API_KEYS="secret") as server:
        for path in probes:
            httpx.get(server.url + path, timeout=WAIT, headers={"Authorization": "Bearer secret"})
        assert httpx.get(f"{server.url}/metrics", timeout=WAIT).status_code == 401
        httpx.get(f"{server.url}/v1/models", timeout=WAIT)
        eventually(lambda: "/v1/models" in requests(server))
        assert requests(server) == ["/metrics", "/v1/models"]
    with Server(served_package, "--log-level", "debug") as server:
        for path in probes:
            server.answers(path)
        eventually(lambda: set(probes) <= set(requests(server)))


def test_a_log_as_text_is_one_printable_line_per_event() -> None:
    program = (
        "import logging\nfrom melt_runtime.server.logs import configure, log\nconfigure('warning', 'text')\n"
        "log('quiet')\nlog('told', logging.ERROR, path='/a\\n b', status=500, word='one', prompt=['x'])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60).stderr
    assert re.fullmatch(r"[0-9T:.+-]+ ERROR told path=\"/a\\n b\" status=500 word=one prompt=\[\"x\"\]\n", said)


def test_an_unknown_level_or_format_is_refused(tiny_package: Path) -> None:
    assert "--log-level" in run("serve", tiny_package, "--log-level", "loud").output
    assert "--log-format" in run("serve", tiny_package, "--log-format", "xml").output


# Metrics


def test_metrics_have_waiting_whole_times_the_process_and_what_runs(served_package: Path) -> None:
    with Server(served_package, "--slots", 1) as server:
        for _ in range(3):
            server.client().completions.create(**ASKED)
        found = server.metrics()
        page = httpx.get(f"{server.url}/metrics", timeout=WAIT).text
    assert found["melt_queue_seconds_count"] == found["melt_request_seconds_count"] == 3
    assert 0 <= found["melt_queue_seconds_sum"] <= found["melt_request_seconds_sum"]
    assert found["melt_first_token_seconds_sum"] <= found["melt_request_seconds_sum"]
    assert found['melt_request_seconds_bucket{le="600"}'] == 3
    assert found["process_resident_memory_bytes"] > 10_000_000
    built = next(line for line in page.splitlines() if line.startswith("melt_build_info"))
    assert built.endswith("} 1.0")
    for label in ('model="tiny"', 'backend="onnxruntime"', 'dialect="onnxruntime"', 'precision="fp32"', "version="):
        assert label in built


def test_every_metric_of_the_dashboard_exists(server: Server) -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for expr in shown for name in re.findall(r"\b(?:melt|process)_\w+", expr)}
    named |= set(re.findall(r"\bmelt_\w+", dashboard["templating"]["list"][1]["query"]["query"]))
    there = {name.partition("{")[0] for name in server.metrics()}
    assert named - there == set()
    assert len(named) > 15
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


# The files of deploy/


def dockerfile() -> list[list[str]]:
    """The instructions of the Dockerfile, split into words."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_image_has_no_pytorch_no_root_and_only_what_exists() -> None:
    lines = dockerfile()
    copied = [name for line in lines if line[0] == "COPY" and "--from=build" not in line for name in line[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "packages"
    ]
    assert {name.split("/")[0] for name in packages} <= set(copied)
    install = next(" ".join(line) for line in lines if line[0] == "RUN" and "pip" in " ".join(line))
    assert ".[cpu,serve]" in install
    assert "--no-cache-dir" in install
    stages = [index for index, line in enumerate(lines) if line[0] == "FROM"]
    assert all(":" in lines[index][1] and not lines[index][1].endswith(":latest") for index in stages)
    last = lines[stages[-1] :]
    user = [line[1] for line in last if line[0] == "USER"]
    assert user[-1].isdigit()
    assert user[-1] != "0"
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(" ".join(last[-2][1:]))[0] in scripts
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {name.split("/")[0] for name in copied} & set(ignored)


def test_variables_that_the_files_set_are_options() -> None:
    text = (DEPLOY / "Dockerfile").read_text() + (DEPLOY / "melt-run.service").read_text()
    named = set(re.findall(r"MELT_RUN_SERVE_([A-Z_]+)=", text))
    assert named
    assert named <= options("serve")


def test_the_sample_of_options_starts_a_server(served_package: Path, tmp_path: Path) -> None:
    text = (DEPLOY / "melt.toml").read_text()
    assert read_config(DEPLOY / "melt.toml", get_command(app)).keys() == {"serve"}
    file = tmp_path / "melt.toml"
    file.write_text(text.replace("/var/lib/melt/package", str(served_package)).replace("8000", "0"))
    with Server(served_package, MELT_RUN_CONFIG=str(file)) as server:
        assert server.metrics()["melt_slots"] == 4


def test_the_unit_waits_longer_than_the_server_drains(tmp_path: Path) -> None:
    unit = dict(
        line.split("=", 1) for line in (DEPLOY / "melt-run.service").read_text().splitlines() if re.match(r"\w+=", line)
    )
    drain = tomllib.loads((DEPLOY / "melt.toml").read_text())["serve"]["drain"]
    assert int(unit["TimeoutStopSec"]) > drain + 1
    program, config, file, command = shlex.split(unit["ExecStart"])
    assert (Path(program).name, config, command) == ("melt-run", "--config", "serve")
    assert Path(file).name == "melt.toml"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    here = tmp_path / "melt-run.service"
    here.write_text((DEPLOY / "melt-run.service").read_text().replace(program, sys.executable))
    checked = subprocess.run(["systemd-analyze", "verify", here], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stderr) == (0, "")

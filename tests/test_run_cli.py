"""The ``melt-run`` command, as a person or a script uses it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from melt_runtime import Package, Runtime
from melt_runtime.cli.inspect import describe
from melt_runtime.cli.main import app
from melt_runtime.package.manifest_facts import untrained_warnings
from melt_runtime.text.tokenizer import TextTokenizer
from typer.testing import CliRunner, Result

HEAVY = ("torch", "transformers", "onnx", "onnxscript", "safetensors", "fastapi", "uvicorn", "llguidance")


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def process(*arguments: object, program: str = "from melt_runtime.cli.main import main; main()", **options: Any) -> Any:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, text=True, timeout=300, **{"capture_output": True, **options})


def refused(result: Result) -> str:
    """The one line on standard error of a refusal."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("melt-run: ")
    return lines[0]


def letters(package: Path) -> str:
    """The letters and digits that the tokenizer has a token of their own for."""
    known = [character for character in map(chr, range(33, 127)) if character.isalnum()]
    tokenizer = TextTokenizer.load(package)
    return "".join(character for character in known if tokenizer.token_id(character) is not None)


@pytest.fixture
def prompt(tiny_package: Path) -> str:
    return letters(tiny_package)[:5]


@pytest.fixture
def copy(tiny_package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_package, tmp_path / "copy"))


def edit_manifest(package: Path, **values: Any) -> None:
    path = package / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


class TestGenerate:
    def test_token_ids_in_and_out(self, tiny_package_without_tokenizer: Path) -> None:
        result = run("generate", tiny_package_without_tokenizer, "3, 1,4", "--ids", "--max-tokens", 7, "--loops", 2)
        assert result.exit_code == 0, result.output
        expected = Runtime.load(tiny_package_without_tokenizer).generate([3, 1, 4], max_tokens=7, loops=2)
        assert result.stdout == ",".join(map(str, expected.token_ids)) + "\n"

    def test_streamed_text_is_what_the_api_gives(self, tiny_package: Path, prompt: str) -> None:
        settings = ["--temperature", 0.8, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01, "--seed", 5, "--loops", 3]
        result = run("generate", tiny_package, prompt, "--max-tokens", 20, "--repetition-penalty", 1.2, *settings)
        assert result.exit_code == 0, result.output
        options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5, "loops": 3}
        expected = Runtime.load(tiny_package).generate(prompt, max_tokens=20, repetition_penalty=1.2, **options)
        assert (result.stdout, result.stderr) == (expected.text + "\n", "")

    def test_json(self, tiny_package: Path, prompt: str) -> None:
        result = run("generate", tiny_package, prompt, "--json", "--max-tokens", 6, "--loops", 3, "--exit-threshold", 1)
        answer = json.loads(result.stdout)
        expected = Runtime.load(tiny_package).generate(prompt, max_tokens=6, loops=3, exit_threshold=1.0)
        assert answer["text"] == expected.text
        assert answer["token_ids"] == list(expected.token_ids)
        assert answer["finish_reason"] == expected.finish_reason
        assert answer["prompt_tokens"] == expected.prompt_tokens
        count = len(expected.depth)
        assert answer["depth"] == {"tokens": count, "mean": 3.0, "min": 3, "max": 3, "each": [3] * count}

    def test_depth_and_chunk_are_what_the_api_makes_of_them(self, tiny_package: Path, prompt: str) -> None:
        depth = ["--exit-threshold", 0.1, "--min-loops", 2, "--exit-change", 0.5, "--chunk", 3]
        result = run("generate", tiny_package, prompt, "--json", "--max-tokens", 6, *depth)
        options = {"exit_threshold": 0.1, "min_loops": 2, "exit_change": 0.5, "chunk": 3}
        expected = Runtime.load(tiny_package).generate(prompt, max_tokens=6, **options)
        answer = json.loads(result.stdout)
        assert answer["token_ids"] == list(expected.token_ids)
        assert answer["depth"]["min"] >= 2
        assert answer["depth"]["each"] == list(expected.depth)
        assert answer["saved"] == expected.saved > 0

    @pytest.mark.parametrize("dash", [["-"], []])
    @pytest.mark.parametrize("end", ["", "\n", "\r\n"])
    def test_prompt_from_standard_input(self, tiny_package: Path, prompt: str, dash: list[str], end: str) -> None:
        expected = run("generate", tiny_package, prompt, "--max-tokens", 5)
        result = run("generate", tiny_package, *dash, "--max-tokens", 5, stdin=(prompt + end).encode())
        assert (result.exit_code, result.stdout) == (0, expected.stdout)

    def test_chat_wraps_the_prompt(self, tiny_package: Path, prompt: str) -> None:
        runtime = Runtime.load(tiny_package)
        ids = runtime.chat_prompt([{"role": "user", "content": prompt}])
        result = run("generate", tiny_package, prompt, "--chat", "--json", "--max-tokens", 5)
        answer = json.loads(result.stdout)
        assert answer["prompt_tokens"] == len(ids)
        assert answer["token_ids"] == list(runtime.generate(ids, max_tokens=5).token_ids)

    def test_stop_strings(self, tiny_package: Path, prompt: str) -> None:
        settings = ["--temperature", 1, "--seed", 3]
        stops = [word for letter in letters(tiny_package)[:20] for word in ("--stop", letter)]
        result = run("generate", tiny_package, prompt, "--json", *settings, *stops)
        answer = json.loads(result.stdout)
        assert answer["finish_reason"] == "stop"
        assert not set(letters(tiny_package)[:20]) & set(answer["text"])

    def test_stats_go_to_standard_error(self, tiny_package: Path, prompt: str) -> None:
        request = ["generate", tiny_package, prompt, "--max-tokens", 6, "--loops", 2, "--exit-threshold", 1]
        plain, result = run(*request), run(*request, "--stats", "--threads", 1)
        assert result.stdout == plain.stdout
        assert "time to first token" in result.stderr
        assert "2.00 per token" in result.stderr
        assert f"{Package.open(tiny_package).manifest.state_bytes():,} bytes" in result.stderr

    def test_stats_of_one_token(self, tiny_package: Path, prompt: str) -> None:
        assert "no rate" in run("generate", tiny_package, prompt, "--max-tokens", 1, "--stats").stderr


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["--loops", 0], "loops is 0"),
            (["--loops", -3], "loops is -3"),
            (["--max-tokens", 0], "max_tokens is 0"),
            (["--exit-threshold", 1.5], "exit_threshold"),
            (["--min-loops", 0], "min_loops is 0"),
            (["--min-loops", 3, "--loops", 2], "min_loops is 3, above the 2 loops"),
            (["--exit-change", -1], "exit_change is -1"),
            (["--chunk", 0], "chunk is 0"),
            (["--temperature", -1], "temperature"),
            (["--top-p", "nan"], "top_p"),
            (["--seed", -1], "seed"),
            (["--stop", ""], "stop string is empty"),
            (["--start-seed", 5, "--start-state", "zeros"], "start_seed is 5 and start_state is 'zeros'"),
            (["--threads", 0], "threads is 0"),
            (["--backend", "abacus"], "abacus"),
            (["--ids"], "not a token id"),
            (["--ids", "--chat"], "exclude"),
        ],
    )
    def test_options(self, tiny_package: Path, arguments: list[object], what: str) -> None:
        assert what in refused(run("generate", tiny_package, "x", *arguments))

    def test_options_are_refused_before_the_package_is_opened(self, tmp_path: Path) -> None:
        assert "loops is 0" in refused(run("generate", tmp_path / "none", "x", "--loops", 0))
        seeded = ("--start-seed", 5, "--start-state", "zeros")
        assert "start_seed is 5" in refused(run("generate", tmp_path / "none", "x", *seeded))

    @pytest.mark.parametrize("command", ["generate", "chat", "inspect"])
    def test_missing_package(self, tmp_path: Path, command: str) -> None:
        assert "does not exist" in refused(run(command, tmp_path / "none", stdin="x"))

    @pytest.mark.parametrize("command", ["generate", "chat", "inspect"])
    def test_changed_byte(self, copy: Path, command: str) -> None:
        path = copy / Package.open(copy).manifest.graphs["embed"].file
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert "was changed" in refused(run(command, copy, stdin="x"))

    def test_prompt_too_long(self, tiny_package: Path, prompt: str) -> None:
        text = prompt * Package.open(tiny_package).manifest.max_seq_len
        assert "do not fit" in refused(run("generate", tiny_package, text))

    def test_empty_prompt(self, tiny_package_without_tokenizer: Path) -> None:
        assert "empty" in refused(run("generate", tiny_package_without_tokenizer, "", "--ids"))

    @pytest.mark.parametrize("ids", ["1,99999", "1,9999999999999999999999"])
    def test_ids_outside_the_vocabulary(self, tiny_package: Path, ids: str) -> None:
        refused(run("generate", tiny_package, ids, "--ids"))

    def test_text_without_a_tokenizer(self, tiny_package_without_tokenizer: Path) -> None:
        assert "--ids" in refused(run("generate", tiny_package_without_tokenizer, "1"))
        assert "tokenizer" in refused(run("chat", tiny_package_without_tokenizer, stdin=""))

    def test_chat_without_a_template(self, copy: Path) -> None:
        settings = {"chat_template.jinja", "tokenizer_config.json"}
        files = json.loads((copy / "manifest.json").read_text())["files"]
        edit_manifest(copy, files={name: spec for name, spec in files.items() if name not in settings})
        for name in settings:
            (copy / name).unlink(missing_ok=True)
        assert "no chat template" in refused(run("chat", copy, stdin=""))

    def test_standard_input_that_is_no_text(self, tiny_package: Path) -> None:
        assert "UTF-8" in refused(run("generate", tiny_package, stdin=b"\xff\xfe"))

    def test_errors_of_the_system(self, tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", "weights.data")

        monkeypatch.setattr(Runtime, "load", load)
        line = refused(run("generate", tiny_package, "x"))
        assert line == "melt-run: weights.data: Permission denied"

    def test_traceback_on_request(self, tmp_path: Path) -> None:
        result = process("inspect", tmp_path / "none", env={**os.environ, "MELT_TRACEBACK": "1"})
        assert result.returncode != 0
        assert "Traceback" in result.stderr
        assert "MELT_TRACEBACK=1" in run("--help").stdout

    def test_interrupt_is_quiet(self, tiny_package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Runtime, "load", load)
        result = run("generate", tiny_package, "x")
        assert (result.exit_code, result.output) == (130, "")

    @pytest.mark.skipif(os.name != "posix", reason="needs a pipe that breaks as in POSIX")
    @pytest.mark.parametrize("arguments", [["generate", "PACKAGE", "1,2", "--ids"], ["inspect", "PACKAGE"]])
    def test_broken_pipe_is_quiet(self, tiny_package: Path, arguments: list[str]) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        words = [str(tiny_package) if word == "PACKAGE" else word for word in arguments]
        result = process(*words, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert result.stderr == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("threshold", [0, 200_000_000])
def test_opening_a_large_package_shows_progress(tiny_package: Path, threshold: int) -> None:
    terminal, stderr = os.openpty()
    program = (
        f"import melt_runtime.cli.tables as render; render._PROGRESS_FROM_BYTES = {threshold};"
        "from melt_runtime.cli.main import main; main()"
    )
    streams = {"capture_output": False, "stdout": subprocess.PIPE, "stderr": stderr}
    result = process("inspect", tiny_package, "--json", program=program, **streams)
    os.write(stderr, b".")  # so that there is something to read
    shown = os.read(terminal, 100_000)
    os.close(stderr)
    os.close(terminal)
    assert json.loads(result.stdout)["directory"] == str(tiny_package)
    assert (b"checking the package" in shown) == (threshold == 0)


class TestInspect:
    def test_shows_states_and_memory(self, tiny_package: Path) -> None:
        manifest = Package.open(tiny_package).manifest
        result = run("inspect", tiny_package, "--length", 10)
        for word in ("hidden", "latent", "key_cache", manifest.dialect, "any number of loops", "LoopLM"):
            assert word in result.stdout
        for count in (manifest.state_bytes(), manifest.cache_bytes(10)):
            assert f"{count:,}" in result.stdout
        assert not any(line.startswith("Warning") for line in result.stdout.splitlines())

    def test_json(self, tiny_package: Path) -> None:
        manifest = Package.open(tiny_package).manifest
        facts = json.loads(run("inspect", tiny_package, "--json", "--length", 10, "--batch", 1).stdout)
        assert facts == json.loads(json.dumps(describe(Package.open(tiny_package), length=10).to_dict()))
        assert facts["loops"] == manifest.loops
        assert facts["tokenizer"]
        assert facts["chat_template"]
        assert sum(state["bytes"] for state in facts["states"]) == manifest.state_bytes()
        memory = facts["memory"]
        assert memory["state_bytes"] == manifest.state_bytes()
        assert memory["weights_bytes"] > 0
        used = memory["cache_bytes"]
        assert memory["looplm_cache_bytes"] == {str(loops): loops * used for loops in (1, 2, 4, 8, 16)}

    def test_memory_does_not_depend_on_the_packages_loops(self, copy: Path) -> None:
        before = json.loads(run("inspect", copy, "--json").stdout)
        edit_manifest(copy, loops=before["loops"] * 8)
        after = json.loads(run("inspect", copy, "--json").stdout)
        assert after["loops"] == 8 * before["loops"]
        assert after["memory"] == before["memory"]

    def test_untrained_parts_are_a_warning(self, copy: Path) -> None:
        edit_manifest(copy, untrained=["latent_gate", "early_exit_gate"])
        shown = " ".join(run("inspect", copy).stdout.split())
        assert "the latent gate is untrained: answers will be poor until it is trained" in shown
        assert "the early exit gate is untrained" in shown
        assert len(json.loads(run("inspect", copy, "--json").stdout)["warnings"]) == 2

    def test_a_gate_that_one_loop_does_not_read_is_no_warning(self, copy: Path) -> None:
        edit_manifest(copy, untrained=["latent_gate", "early_exit_gate"], loops=1)
        assert "untrained" not in run("inspect", copy).stdout
        assert json.loads(run("inspect", copy, "--json").stdout)["warnings"] == []
        manifest = Package.open(copy).manifest
        assert len(untrained_warnings(manifest, loops=3)) == 2
        started_at_zero = replace(manifest, model={**manifest.model, "latent_init": "zeros"})
        assert untrained_warnings(started_at_zero) == (
            "the latent gate is untrained: answers will be poor until it is trained",
        )

    def test_what_it_computes_in(self, copy: Path) -> None:
        assert json.loads(run("inspect", copy, "--json").stdout)["arithmetic"] == "fp32"
        assert re.search(r"arithmetic +fp32", run("inspect", copy).stdout)

    def test_parity(self, copy: Path) -> None:
        path = copy / "parity.json"
        path.unlink(missing_ok=True)
        assert "not verified" in run("inspect", copy).stdout
        path.write_text(json.dumps({"passed": True, "failures": []}))
        assert json.loads(run("inspect", copy, "--json").stdout)["parity"]["passed"] is True
        path.write_text(json.dumps({"passed": False, "failures": ["hidden of loop 3 differs"]}))
        assert "failed: hidden of loop 3 differs" in run("inspect", copy).stdout
        path.write_text(json.dumps({"passed": True, "failures": [], "manifest_sha256": "0" * 64}))
        assert "of another export" in run("inspect", copy).stdout
        for broken in ("[]", "{", '{"passed": 1}', "[" * 10**5, '{"passed": true, "failures": 3}'):
            path.write_text(broken)
            result = run("inspect", copy)
            assert result.exit_code == 0, result.output
            assert "verify the package again" in " ".join(result.stdout.replace("│", "").split())

    def test_sizes_beyond_the_package(self, tiny_package: Path) -> None:
        manifest = Package.open(tiny_package).manifest
        assert "length" in refused(run("inspect", tiny_package, "--length", manifest.max_seq_len + 1))
        assert "batch" in refused(run("inspect", tiny_package, "--batch", 0))

    def test_needs_no_onnx_runtime(self, tiny_package: Path) -> None:
        program = "import sys; sys.modules['onnxruntime'] = None; from melt_runtime.cli.main import main; main()"
        assert process("inspect", tiny_package, program=program).returncode == 0


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("melt-run ")


@pytest.mark.parametrize("command", ["generate", "chat", "inspect"])
def test_every_option_is_explained(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "MELT_TRACEBACK=1" in result.stdout


def test_nothing_heavy_is_imported(tiny_package: Path) -> None:
    program = (
        "import sys; from melt_runtime.cli.main import app; app(standalone_mode=False);"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = process("generate", tiny_package, "1,2", "--ids", "--max-tokens", 3, program=program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"

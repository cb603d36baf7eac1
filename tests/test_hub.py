"""Checkpoints and packages by their name on a hub, from a stand-in on loopback and from the cache that it fills."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_double import COMMIT, Hub
from melt_runtime import PackageError, Runtime
from melt_runtime.cli.options import short_name
from processes import started
from serving import eventually

from melt_hub import CHECKPOINT, HubError, Reference, local_directory, reference

PROMPT = "abc"
COMMANDS = "from melt_export.entry_points import convert, export, train, verify\nfrom melt_runtime.cli.main import main"


def run(
    command: str, *arguments: object, env: dict[str, str], cwd: Path | None = None, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, because huggingface_hub reads its environment once."""
    script = f"{before}\nimport sys\nsys.argv[1:] = {[str(one) for one in arguments]!r}\n{COMMANDS}\n{command}()"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=env, cwd=cwd)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def repository(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as hubs have them: with code, pickles and other people's exports beside it."""
    made = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("hub") / "repository"))
    for name in ("modeling_melt.py", "pytorch_model.bin", "training_args.pt", "README.md"):
        (made / name).write_text("never fetched")
    (made / "onnx").mkdir()
    (made / "onnx" / "config.json").write_text("{}")
    return made


@pytest.fixture
def hub(repository: Path, tiny_package: Path) -> Iterator[Hub]:
    with Hub({"melt/tiny": repository, "melt/package": tiny_package}, gated=("melt/gated",)) as hub:
        yield hub


def answer(package: Path) -> str:
    return Runtime.load(package).generate(PROMPT, max_tokens=5).text + "\n"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://hf.example.org/org/name/tree/v2/", "org/name@v2"),
        ("http://127.0.0.1:8000/org/name?library=x", "org/name"),
        ("huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/", "ORGANISATION/NAME"),
    ],
)
def test_a_web_address_is_refused_with_the_name_to_write(written: str, meant: str) -> None:
    for given in (written, Path(written)):
        with pytest.raises(HubError) as error:
            local_directory(given, CHECKPOINT)
        assert f"is a web address, which is not fetched; write {meant} or hf://{meant} for" in str(error.value)
    if "://" in written:
        assert str(error.value).startswith(written.removesuffix("/"))


@pytest.mark.parametrize("written", ["org/name@", "hf://org/name@"])
def test_an_empty_revision_is_refused_with_what_to_write(written: str) -> None:
    with pytest.raises(HubError, match="names no revision behind the @; write org/name or org/name@REVISION"):
        local_directory(written, CHECKPOINT)


def test_a_directory_that_looks_like_an_address_or_an_empty_revision_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("org/name@", "hf.co/org/name", "https:/host/org/name"):
        Path(name).mkdir(parents=True)
        assert local_directory(Path(name), CHECKPOINT) == Path(name)


def test_every_command_says_what_to_write_instead_of_an_address(tmp_path: Path) -> None:
    address = "https://huggingface.co/org/name"
    for command, arguments in (
        ("main", ["inspect", address]),
        ("main", ["generate", address, "a"]),
        ("export", [address, tmp_path / "package"]),
        ("verify", [address, address]),
        ("convert", [address, tmp_path / "melt"]),
    ):
        assert "write org/name or hf://org/name for a model" in refusal(run(command, *arguments, env={**os.environ}))


def test_a_checkpoint_on_a_hub_is_exported_and_only_its_own_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path / "cache")
    made = run("export", "melt/tiny", tmp_path / "package", "--no-verify", env=env)
    assert made.returncode == 0, made.stderr
    assert sorted(hub.read) == ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                                "tokenizer.json"]  # fmt: skip
    hub.read.clear()
    checked = run("verify", tmp_path / "package", "melt/tiny@v2", "--tokens", 4, env=env)
    assert checked.returncode == 0, checked.stderr
    assert hub.read == []  # the same commit, from the cache


def test_a_package_on_a_hub_answers_and_later_does_so_without_a_connection(
    hub: Hub, tiny_package: Path, tmp_path: Path
) -> None:
    env = hub.environment(tmp_path / "cache")
    said = answer(tiny_package)
    generate = ("main", "generate", "hf://melt/package", PROMPT, "--max-tokens", 5)
    assert run(*generate, env=env).stdout == said
    assert run(*generate, env={**env, "HF_HUB_OFFLINE": "1"}).stdout == said
    away = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run("main", "generate", "melt/package", PROMPT, "--max-tokens", 5, env=away).stdout == said


def test_of_a_package_no_code_and_no_engine_is_fetched(tiny_package: Path, tmp_path: Path) -> None:
    made = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    (made / "engines" / "rtx").mkdir(parents=True)
    for name in ("engines/rtx/loop_step.plan", "engines/rtx/facts.json", "run.py", "extra.bin", "custom.so", "x.pkl"):
        (made / name).write_text("never fetched")
    with Hub({"melt/package": made}) as hub:
        env = hub.environment(tmp_path / "cache")
        assert run("main", "inspect", "melt/package", env=env).returncode == 0
    assert sorted(hub.read) == sorted(file.name for file in tiny_package.iterdir())


def test_a_cache_that_another_program_filled_is_read(tiny_package: Path, tmp_path: Path) -> None:
    store = tmp_path / "models--melt--package"
    for part in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (store / part).mkdir(parents=True)
    (store / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(tiny_package.iterdir())):
        shutil.copyfile(file, store / "blobs" / str(number))
        (store / "snapshots" / COMMIT / file.name).symlink_to(Path("../..") / "blobs" / str(number))
    with Hub({}) as empty:
        env = empty.environment(tmp_path, HF_HUB_OFFLINE="1")
    found = run("main", "generate", "melt/package", PROMPT, "--max-tokens", 5, env=env)
    assert found.stdout == answer(tiny_package), found.stderr


def test_a_directory_here_wins_over_a_name_on_a_hub(hub: Hub, tiny_package: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_package, tmp_path / "melt" / "package")
    env = hub.environment(tmp_path / "cache")
    found = run("main", "generate", "melt/package", PROMPT, "--max-tokens", 5, env=env, cwd=tmp_path)
    assert found.stdout == answer(tiny_package)
    assert hub.read == []
    (tmp_path / "melt" / "package" / "manifest.json").unlink()
    broken = run("main", "generate", "melt/package", PROMPT, env=env, cwd=tmp_path)
    assert "has no manifest.json" in refusal(broken)
    asked = run("main", "generate", "hf://melt/package", PROMPT, "--max-tokens", 5, env=env, cwd=tmp_path)
    assert asked.stdout == answer(tiny_package)  # only a hub has that name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("melt/tiny@nowhere", "no such revision"),
        ("melt/none", "no such model, or a private one"),
        ("melt/gated", "its owner asks for consent"),
        ("hf://melt", "is no name on a hub"),
        ("hf://melt/tiny@", "names no revision behind the @"),
        ("melt/package", "has no config.json"),
    ],
)
def test_a_name_that_a_hub_does_not_give_is_refused_in_a_sentence(
    hub: Hub, tmp_path: Path, name: str, said: str
) -> None:
    result = run("convert", name, tmp_path / "melt", env=hub.environment(tmp_path / "cache"))
    assert said in refusal(result)


def test_a_repository_without_a_package_is_named(hub: Hub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path / "cache")
    assert "has no manifest.json" in refusal(run("main", "generate", "melt/tiny", PROMPT, env=env))


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_connection_it_says_how_to_bring_the_files(tmp_path: Path, offline: bool) -> None:
    with Hub({}) as gone:
        env = gone.environment(tmp_path, HF_HUB_OFFLINE=str(int(offline)))
    said = refusal(run("main", "generate", "melt/none", PROMPT, env=env))
    assert ("HF_HUB_OFFLINE" if offline else "cannot be reached") in said
    assert "hf download melt/none" in said


def test_what_the_disk_cannot_hold_is_refused_before_anything_is_fetched(repository: Path, tmp_path: Path) -> None:
    with Hub({"melt/tiny": repository}, claimed={"model.safetensors": 10**15}) as hub:
        result = run("convert", "melt/tiny", tmp_path / "melt", env=hub.environment(tmp_path / "cache"))
        assert "takes 1,000,000,0" in refusal(result)
        assert hub.read == []


def test_a_connection_that_ends_halfway_is_one_line(tiny_package: Path, tmp_path: Path) -> None:
    with Hub({"melt/package": tiny_package}, cut="weights.data") as hub:
        result = run("main", "generate", "melt/package", PROMPT, env=hub.environment(tmp_path / "cache"))
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if not line.startswith("fetching melt/package")]
    assert len(lines) == 1, lines
    assert "cannot be fetched from the hub" in lines[0]


def test_ctrl_c_ends_a_download_with_its_process(tiny_package: Path, tmp_path: Path) -> None:
    program = "import sys; sys.argv[1:] = ['generate', 'melt/package', 'a']\n" + COMMANDS + "\nmain()"
    with Hub({"melt/package": tiny_package}, stalled="weights.data") as hub:
        env = hub.environment(tmp_path / "cache")
        with started([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=env) as process:
            eventually(lambda: "weights.data" in hub.read)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=30)  # the library alone would wait for a minute
            assert not hub.ended.is_set()
    assert process.returncode == 130
    assert error.splitlines()[-1] == "melt-run: interrupted"


def test_without_huggingface_hub_the_extra_is_named(tmp_path: Path) -> None:
    with Hub({}) as hub:
        env = hub.environment(tmp_path)
    lacking = run(
        "main", "generate", "melt/none", PROMPT, env=env, before="import sys; sys.modules['huggingface_hub'] = None"
    )
    assert "pip install 'melt-export[hub]'" in refusal(lacking)


def test_a_program_loads_a_package_from_a_hub_only_when_it_says_so(
    hub: Hub, tiny_package: Path, tmp_path: Path
) -> None:
    program = (
        "from melt_runtime import PackageError, Runtime\n"
        f"print(Runtime.load('hf://melt/package').generate({PROMPT!r}, max_tokens=5).text)\n"
        "try: Runtime.load('hf://melt/none')\n"
        "except PackageError as error: print(error)"
    )
    env = hub.environment(tmp_path / "cache")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=env)
    assert said.stdout.startswith(answer(tiny_package) + "melt/none cannot be fetched"), said.stderr
    with pytest.raises(PackageError, match="melt/package does not exist"):
        Runtime.load("melt/package")


def test_the_teacher_of_a_training_may_be_on_a_hub(hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "output: out\ndata: {task: addition}\nteacher: {checkpoint: melt/tiny}\nphase1: {steps: 1}\n", encoding="utf-8"
    )
    program = "import sys; from pathlib import Path; from melt_models.training.config import read_run\n"
    program += f"print(read_run(Path({str(file)!r})).teacher)"
    env = hub.environment(tmp_path / "cache")
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=env)
    assert said.stdout.strip().endswith(COMMIT), said.stderr


def test_names_on_a_hub_are_told_from_paths(tmp_path: Path) -> None:
    assert reference("org/name") == Reference("org/name")
    assert reference("hf://org/na.me-1@refs/pr/3") == Reference("org/na.me-1", "refs/pr/3")
    assert reference(Path("hf://org/name@v1")) == Reference("org/name", "v1")
    for path in ("name", "/org/name", "./name", "../name", "~/name", "a/b/c", "org/", "org/na me", "https://org/name"):
        assert reference(path) is None
    assert local_directory(tmp_path / "none", CHECKPOINT) == tmp_path / "none"
    assert short_name(Path("hf://org/name@v1")) == "org/name"
    assert short_name(tmp_path) == tmp_path.name

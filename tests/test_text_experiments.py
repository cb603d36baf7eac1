"""Looped models on text: documents are split first, rows differ in one thing, a run ends with its time."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from melt_models.checkpoint import load_model, read_config
from melt_models.training.config import read_run

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "experiments"
sys.path.insert(0, str(FOLDER))

import sources  # noqa: E402
import text_data  # noqa: E402
import text_runs  # noqa: E402
from sources import SOURCES, Source  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of two small made-up sources, as text_data.py packs them."""
    out = tmp_path_factory.mktemp("text") / "data"
    out.mkdir()
    split = {
        name: {
            False: [(f"{number}", f"{word} said that {number} is a number. " * 40) for number in range(30)],
            True: [("apart", f"{word} kept a secret word: zyzzyva. " * 60)],
        }
        for name, word in (("austen", "Emma"), ("wordnet", "noun"))
    }
    text_data.pack(out, split)
    return out


def vocabulary(data: Path) -> dict[str, int]:
    content = json.loads((data / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    return dict(content["model"]["vocab"])


def test_a_held_out_document_trains_neither_the_tokenizer_nor_a_model(data: Path) -> None:
    assert not any("zyz" in token for token in vocabulary(data))
    assert any("number" in token for token in vocabulary(data))
    about = json.loads((data / "data.json").read_text(encoding="utf-8"))["sources"]["austen"]
    assert about["held_out"] == ["apart"]
    assert about["training"]["documents"] == 30
    assert about["licence"] == "public domain"


def test_every_document_ends_with_the_end_token(data: Path) -> None:
    tokens = np.fromfile(data / "austen.bin", dtype=np.uint16)
    end = json.loads((data / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"][
        text_data.END
    ]
    assert (tokens == end).sum() == 30
    assert tokens[-1] == end


def test_every_source_holds_documents_out_and_names_a_licence() -> None:
    for source in SOURCES:
        assert source.licence
        assert bool(source.held_out) != bool(source.every), source.name


def test_strings_of_an_r_object_are_read() -> None:
    strings = [b"EMMA", b"", b"by Jane Austen"]
    body = b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(text)) + text for text in strings)
    whole = b"X\n\x00\x00\x00\x03" + b"\x00\x00\x00\x10" + struct.pack(">i", len(strings)) + body
    assert sources._r_strings(whole) == ["EMMA", "", "by Jane Austen"]


def test_a_sword_module_gives_the_prose_of_each_block(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/sword/modules/comments/zcom/made"
    folder.mkdir(parents=True)
    prose = "The <w lemma='x'>beginning</w> of the story.<note>1:2 not this</note> " * 60
    blocks = [f'<title type="main">Mark</title><chapter osisID="Mark.1"/> {prose}', "short"]
    packed = [zlib.compress(block.encode()) for block in blocks]
    index = b"".join(
        struct.pack("<III", sum(map(len, packed[:at])), len(one), len(blocks[at])) for at, one in enumerate(packed)
    )
    for part, (rows, body) in {"ot": (index, b"".join(packed)), "nt": (b"", b"")}.items():
        (folder / f"{part}.bzs").write_bytes(rows)
        (folder / f"{part}.bzz").write_bytes(body)
    ((name, text),) = sources.sword("comments/zcom/made", "b")(tmp_path)
    assert name == "Mark.1"
    assert text.startswith("The beginning of the story. The beginning")
    assert "not this" not in text
    assert "<" not in text


def test_markup_of_documentation_is_removed_and_code_dropped() -> None:
    page = (
        "Title\n=====\n\n.. module:: json\n\nThe :mod:`json` module reads *text* with ``loads`` and is described in "
        "full at `this page <https://x.org>`_.\n\n   >>> json.loads('1')\n   1\n"
    )
    assert sources.without_markup(page) == (
        "The json module reads text with loads and is described in full at this page."
    )


def test_rows_of_the_ablation_differ_from_everything_in_one_section(data: Path, tmp_path: Path) -> None:
    size = text_runs.SIZES["tiny"]
    rows = {row.name: text_runs.content(row, 0, size, data, tmp_path, teacher=tmp_path) for row in text_runs.ROWS}
    everything = rows.pop("gate")
    changes = {
        "last": {("melt", "aggregation")},
        "no-interpolation": {("phase1", "interpolation")},
        "no-chunk-wise": {("phase1", "chunk_wise"), ("phase2", "chunk_wise")},
        "no-alignment": {("phase2", "attention_weight")},
    }
    assert {name: _differing(row, everything) for name, row in rows.items()} == changes


def _differing(row: dict[str, Any], other: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (section, key)
        for section in ("melt", "data", "teacher", "phase1", "phase2")
        for key in {**row[section], **other[section]}
        if row[section].get(key) != other[section].get(key)
    }


def test_the_example_file_is_the_recipe_of_the_experiments_at_the_size_for_two_cores() -> None:
    written = yaml.safe_load((ROOT / "examples" / "text.yaml").read_text(encoding="utf-8"))
    folder = Path("build/text/data")
    size = text_runs.SIZES["cpu"]
    names = {"sources": {source.name: {} for source in SOURCES}}
    recipe = json.loads(json.dumps(text_runs.content(text_runs.MAIN, 0, size, folder, Path("x"), names=names)))
    assert written["data"] == recipe["data"]
    for section in ("model", "melt"):
        assert written[section] == recipe[section]
    for section in ("teacher", "phase1", "phase2", "gate"):
        free = {"steps", "save_every"}
        assert {k: v for k, v in written[section].items() if k not in free} == {
            k: v for k, v in recipe[section].items() if k not in free
        }


def test_training_on_text_ends_with_its_time_and_leaves_checkpoints_and_figures(data: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "runs", tmp_path / "out"
    for jobs in ("main", "ablations"):
        command = [
            sys.executable,
            str(FOLDER / "text_train.py"),
            "--size",
            "tiny",
            "--budget",
            "12",
            "--data",
            str(data),
        ]
        command += ["--root", str(root), "--out", str(out), "--held-out", "2", "--threads", "1", "--jobs", jobs]
        done = subprocess.run([*command, "--grace", "120"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    main = json.loads((root / "main-1" / "result.json").read_text(encoding="utf-8"))
    assert set(main["stages"]) == {"teacher", "phase1", "phase2", "gate"}
    assert set(main["stages"]["phase2"]["loops"]) == {str(loops) for loops in range(1, 9)}
    assert set(main["stages"]["phase2"]["decoded"]) == {"1", "2", "3", "4"}
    rows = [json.loads((root / f"{row.name}-0" / "result.json").read_text()) for row in text_runs.ROWS]
    assert len({row["stages"]["phase2"]["steps"] for row in rows}) == 1
    assert load_model(root / "main-0" / "gate").dtype == torch.bfloat16
    assert read_config(root / "last-0" / "phase2").aggregation == "last"
    assert {path.name for path in out.iterdir()} >= {"results.tar.gz", "main-0-phase1.safetensors"}


def test_a_source_reads_what_it_says() -> None:
    source = Source("x", "x", ("x",), "free", lambda root: iter(()), held_out=("b",))
    assert [source.is_held_out(name, at) for at, name in enumerate("abc")] == [False, True, False]
    spread = Source("x", "x", ("x",), "free", lambda root: iter(()), every=3)
    assert [spread.is_held_out(name, at) for at, name in enumerate("abc")] == [False, False, True]


def test_a_recipe_for_text_is_readable_by_the_trainer(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    content = text_runs.content(text_runs.MAIN, 0, text_runs.SIZES["tiny"], data, tmp_path)
    file.write_text(yaml.safe_dump(json.loads(json.dumps(content))), encoding="utf-8")
    assert read_run(file).stages() == ["teacher", "phase1", "phase2", "gate"]


def test_a_run_that_goes_on_by_decoding_is_readable_by_the_trainer(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in text_runs.SEEDS:
        for stage in ("teacher", "gate"):
            Path(f"runs/main-{seed}/{stage}").mkdir(parents=True)
    command = [sys.executable, str(FOLDER / "text_decoding.py"), "--size", "tiny", "--data", str(data)]
    done = subprocess.run([*command, "--root", "runs"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for seed in text_runs.SEEDS:
        run = read_run(Path(f"runs/decoding-{seed}/run.yaml"))
        assert run.stages() == ["phase2", "gate"]
        assert run.phase2 is not None
        assert run.phase2.checkpoint == Path(f"runs/main-{seed}/gate")

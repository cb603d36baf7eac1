"""What packages of the looped families refuse, and the sizes of the published shapes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FAMILY_SIZES
from family_checkpoints import CONFIGS
from melt_models.checkpoint import CONFIGS as CONFIG_CLASSES
from melt_models.checkpoint import expected_shapes, meta_model
from melt_runtime import ArgumentError, PackageError, Runtime
from melt_runtime.package.manifest import STAGES
from melt_runtime.package.manifest_schema import read_manifest

from melt_export.errors import ExportError
from melt_export.export import building
from melt_export.options import ExportOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import random_checkpoint
import state_bytes

RAVENS = ["huginn", "llama", "olmo"]
SMALL = {"nanbeige4.2-3b": "nanbeige", "huginn-0125": "huginn"}
IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
MOST_ERROR = 1e-4


def test_an_exit_threshold_without_an_exit_gate_is_refused_in_a_sentence(make_runtime: Callable[..., Runtime]) -> None:
    for options in ({}, {"share_caches": "last"}):
        with pytest.raises(ArgumentError, match=r"exit_threshold is 0\.5, but the model has no exit gate"):
            make_runtime("nanbeige", **options).generate(IDS, exit_threshold=0.5)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("nanbeige", {"start_state": "zeros"}, "start from the embedding"),
        ("huginn", {"start_state": "embedding"}, "this model starts from 'noise' or 'zeros'"),
        ("huginn", {"start_state": "ones"}, "it must be one of"),
        ("huginn", {"start_seed": -1}, "whole number from 0"),
        ("huginn", {"start_seed": 2**64}, "whole number from 0"),
        ("huginn", {"start_seed": True}, "whole number from 0"),
        ("huginn", {"start_seed": 5, "start_state": "zeros"}, "start_seed is 5 and start_state is 'zeros'"),
        ("huginn", {"loops": 4}, "caches for 3"),
        ("huginn", {"exit_kl": 1e-3}, "exit_kl is 0.001; a token of a LoopLM that left early"),
        ("huginn", {"exit_same": 2}, "exit_same is 2; a token of a LoopLM that left early"),
        ("huginn", {"exit_kl": -1.0}, "finite number of at least 0"),
        ("huginn", {"exit_same": 1.5}, "whole number from 0"),
    ],
)
def test_what_a_package_cannot_do_is_refused(
    kind: str, options: dict[str, Any], said: str, make_runtime: Callable[..., Runtime]
) -> None:
    with pytest.raises(ArgumentError, match=said):
        make_runtime(kind).generate(IDS, **options)


def test_a_melt_checkpoint_shares_its_caches_already(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="share their caches already"),
        building(tiny_checkpoint, tmp_path / "out", ExportOptions(share_caches="last")),
    ):
        pass


def change(manifest: dict[str, Any], how: str) -> None:
    graphs = manifest["graphs"]
    if how == "coda":
        del graphs["coda"]
    elif how == "cache":
        manifest["states"] = [one for one in manifest["states"] if one["input"] != "coda_value_cache.0"]
    elif how == "start":
        manifest["start"]["std"] = "much"
    elif how == "generator":
        manifest["start"]["generator"] = "mt19937"
    elif how == "injected":
        graphs["loop_step"]["inputs"] = [one for one in graphs["loop_step"]["inputs"] if one["name"] != "injected"]
    elif how == "version":
        manifest["format_version"] = 3
    elif how == "layers":
        manifest["model"]["num_prelude_layers"] = 2


@pytest.mark.parametrize("how", ["coda", "cache", "start", "generator", "injected", "version", "layers"])
def test_a_manifest_whose_stages_contradict_each_other_is_refused(
    how: str, make_runtime: Callable[..., Runtime]
) -> None:
    content = json.loads(make_runtime("huginn").manifest.to_json())
    assert content["format_version"] == STAGES
    read_manifest(json.dumps(content))
    change(content, how)
    with pytest.raises(PackageError):
        read_manifest(json.dumps(content))


def test_packages_without_stages_keep_their_format(tiny_package: Path) -> None:
    content = json.loads((tiny_package / "manifest.json").read_text())
    assert content["format_version"] < STAGES
    assert not {"start", "shared_caches"} & content.keys()


# States after every loop


def test_the_published_shapes_have_the_published_numbers_of_weights() -> None:
    counts = {}
    for name, content in random_checkpoint.PUBLISHED.items():
        config = CONFIG_CLASSES[content["model_type"]].from_dict(content)
        shapes = config.published_shapes(expected_shapes(meta_model(config)))
        counts[name] = (len(shapes), sum(math.prod(shape) for shape in shapes.values()))
    assert counts["nanbeige4.2-3b"] == (201, 4_169_800_704)
    assert counts["huginn-0125"][1] == pytest.approx(3.56e9, rel=0.02)


def test_a_random_checkpoint_in_a_published_layout_is_read_and_exported(tmp_path: Path) -> None:
    for name, content in random_checkpoint.PUBLISHED.items():
        small = {**content, **{key: value for key, value in CONFIGS[SMALL[name]].items() if key in content}}
        random_checkpoint.make_published(tmp_path / name, small)
        with building(tmp_path / name, tmp_path / f"{name}-package", ExportOptions(**FAMILY_SIZES)):
            pass
        assert Runtime.load(tmp_path / f"{name}-package").generate(IDS, max_tokens=2, ignore_eos=True).text == ""


def test_state_of_shared_caches_stays_the_same_at_any_number_of_loops() -> None:
    for own, shared in state_bytes.rows(4096, "fp16").values():
        assert own[-1] > 6 * own[1]
        assert len(set(shared[1:])) == 1
        assert shared[-1] < own[0] * 1.1

"""A manifest decides what memory a graph may touch, so one that lies is refused before any is allocated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Package, PackageError, Runtime
from melt_runtime.backends.execution import GraphEngine
from melt_runtime.cli.main import app
from melt_runtime.package.manifest_schema import read_manifest
from melt_runtime.package.specs import GRAPHS
from onnx import TensorProto, helper, numpy_helper
from test_package import edit
from typer.testing import CliRunner

Content = dict[str, Any]
Lie = Callable[[Content], object]


def tensor(content: Content, graph: str, name: str) -> Content:
    """A graph's input or output in the manifest."""
    spec = content["graphs"][graph]
    return next(one for one in (*spec["inputs"], *spec["outputs"]) if one["name"] == name)


LIES: dict[str, Lie] = {
    "a narrower hidden": lambda m: m["states"][0]["shape"].__setitem__(2, 2),
    "a narrower latent": lambda m: m["states"][1]["shape"].__setitem__(2, 2),
    "fewer latents than layers": lambda m: m["states"].pop(2),
    "latents in another order": lambda m: m["states"].insert(1, m["states"].pop(2)),
    "all latents in one": lambda m: m["states"][1].update(input="latent", output="next_latent"),
    "fewer rows": lambda m: m["states"][3]["shape"].__setitem__(2, 8),
    "fewer heads": lambda m: m["states"][4]["shape"].__setitem__(1, 1),
    "rows for fewer tokens": lambda m: m.update(cache_rows=9),
    "more tokens than rows": lambda m: m.update(max_seq_len=100_000),
    "a longer chunk": lambda m: m.update(chunk=256),
    "no room for padding": lambda m: m.update(cache_rows=256),
    "half the type": lambda m: m["states"][0].update(dtype="float16"),
    "a cache of another type": lambda m: m["states"][3].update(dtype="int64"),
    "another precision": lambda m: m.update(precision="fp16"),
    "another dialect": lambda m: m.update(dialect="portable"),
    "another kind": lambda m: m["states"][3].update(kind="read_only"),
    "a swapped cache": lambda m: m["states"][3].update(kind="swap"),
    "two states behind one output": lambda m: m["states"][3].update(output="next_value_cache.0"),
    "a state called like a mask": lambda m: m["states"][3].update(input="active"),
    "a cache too few": lambda m: m["states"].pop(),
    "a cache twice": lambda m: m["states"].append(m["states"][-1]),
    "a batch in another place": lambda m: m["states"][3].update(shape=[2, "batch", 264, 16]),
    "a chunk for a batch": lambda m: m["states"][0].update(shape=["chunk", "batch", 64]),
    "a context in a state": lambda m: m["states"][3]["shape"].__setitem__(2, "context"),
    "a wider graph": lambda m: tensor(m, "loop_step", "hidden")["shape"].__setitem__(2, 128),
    "a wider embedding": lambda m: tensor(m, "embed", "hidden")["shape"].__setitem__(2, 128),
    "narrower logits": lambda m: tensor(m, "lm_head", "logits")["shape"].__setitem__(2, 4),
    "logits of another type": lambda m: tensor(m, "lm_head", "logits").update(dtype="float16"),
    "a smaller vocabulary": lambda m: m.update(vocab_size=4),
    "an exit of another type": lambda m: tensor(m, "loop_step", "exit_probability").update(dtype="float16"),
    "an input less": lambda m: m["graphs"]["loop_step"]["inputs"].pop(2),
    "an output less": lambda m: m["graphs"]["loop_step"]["outputs"].pop(),
    "an input twice": lambda m: m["graphs"]["loop_step"]["inputs"].append(m["graphs"]["loop_step"]["inputs"][0]),
    "an input more": lambda m: m["graphs"]["embed"]["inputs"].append(
        {"name": "x", "dtype": "bool", "shape": ["batch"]}
    ),
    "another graph's file": lambda m: m["graphs"]["embed"].update(file="lm_head.onnx"),
    "a graph that nobody hashed": lambda m: m["files"].pop("embed.onnx"),
    "graphs that changed places": lambda m: m["graphs"].update(
        embed=m["graphs"]["lm_head"], lm_head=m["graphs"]["embed"]
    ),
    "a model of another size": lambda m: m["model"].update(hidden_size=128),
    "a model of more layers": lambda m: m["model"].update(num_hidden_layers=10**9),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_whose_parts_disagree_is_refused_in_one_sentence(package_copy: Path, lie: str) -> None:
    edit(package_copy, LIES[lie])
    with pytest.raises(PackageError) as refusal:
        Runtime.load(package_copy, backend="onnxruntime", check_hashes=False)
    assert "\n" not in str(refusal.value)


def narrower(m: Content) -> None:
    """Hidden is 2 wide wherever the manifest speaks of it."""
    m["model"].pop("hidden_size")
    m["states"][0]["shape"][2] = 2
    for graph, name in (
        ("embed", "hidden"),
        ("loop_step", "hidden"),
        ("loop_step", "next_hidden"),
        ("lm_head", "hidden"),
    ):
        tensor(m, graph, name)["shape"][2] = 2


def half(m: Content) -> None:
    """Everything is said to be float16."""
    m["precision"] = "fp16"
    tensors = [t for graph in m["graphs"].values() for t in (*graph["inputs"], *graph["outputs"])]
    for one in (*m["states"], *tensors):
        if one["dtype"] == "float32" and one.get("name") not in ("logits", "exit_probability"):
            one["dtype"] = "float16"


def shorter(m: Content) -> None:
    """The caches have room for 8 tokens wherever the manifest speaks of them."""
    m.update(max_seq_len=8, cache_rows=16)
    tensors = [t for graph in m["graphs"].values() for t in (*graph["inputs"], *graph["outputs"])]
    for one in (*m["states"], *tensors):
        one["shape"] = [16 if dim == 264 else dim for dim in one["shape"]]


def fewer_words(m: Content) -> None:
    """The vocabulary has 8 tokens."""
    m["vocab_size"] = m["model"]["vocab_size"] = 8
    tensor(m, "lm_head", "logits")["shape"][2] = 8


@pytest.mark.parametrize("lie", [narrower, half, shorter, fewer_words])
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard", "portable"])
def test_a_manifest_that_lies_throughout_is_refused_by_what_is_loaded(
    make_checkpoint: MakeCheckpoint, make_package: MakePackage, tmp_path: Path, dialect: str, lie: Lie
) -> None:
    source = make_package(make_checkpoint(), dialect=dialect)
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    edit(copy, lie)
    Package.open(copy)  # its parts agree
    with pytest.raises(PackageError, match=r"\.onnx is not the graph that its manifest describes"):
        Runtime.load(copy, backend="onnxruntime")


def test_a_lying_manifest_ends_the_command_with_one_line_and_exit_code_2(package_copy: Path) -> None:
    edit(package_copy, LIES["a narrower hidden"])
    program = "from melt_runtime.cli.main import main; main()"
    for arguments in (["generate", str(package_copy), "hello"], ["inspect", str(package_copy)]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 2, done
        assert len(done.stderr.splitlines()) == 1
        assert "hidden" in done.stderr


class _Engine:
    """An engine of the embedding, as TensorRT describes it."""

    device_memory_size_v2, num_io_tensors = 0, 2
    tensors = {
        "input_ids": ("TensorIOMode.INPUT", "DataType.INT64", (-1, -1)),
        "hidden": ("TensorIOMode.OUTPUT", "DataType.FLOAT", (-1, -1, 64)),
    }

    def __init__(self, **changes: Any):
        self.tensors = {**self.tensors, **changes}

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name][1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][2]


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        ("hidden", ("TensorIOMode.OUTPUT", "DataType.FLOAT", (-1, -1, 128))),
        ("hidden", ("TensorIOMode.OUTPUT", "DataType.HALF", (-1, -1, 64))),
        ("hidden", ("TensorIOMode.INPUT", "DataType.FLOAT", (-1, -1, 64))),
        ("hidden", ("TensorIOMode.OUTPUT", "DataType.FLOAT", (-1, 64))),
        ("input_ids", ("TensorIOMode.INPUT", "DataType.INT32", (-1, -1))),
        ("input_ids", ("TensorIOMode.INPUT", "DataType.INT64", (4, -1))),
        ("input_ids", ("TensorIOMode.INPUT", "DataType.INT64", (-1, 1))),
    ],
)
def test_an_engine_of_another_graph_is_refused(tiny_package: Path, tensor: str, found: Any) -> None:
    spec = Package.open(tiny_package).manifest.graphs["embed"]
    graph_engine = object.__new__(GraphEngine)
    graph_engine.graph, graph_engine.fixed = "embed", {"batch": 1}
    graph_engine.engine = _Engine()
    assert graph_engine._check(spec, Path("embed.plan")) == 0
    graph_engine.engine = _Engine(hidden=("TensorIOMode.OUTPUT", "DataType.FLOAT", (1, -1, 64)))
    assert graph_engine._check(spec, Path("embed.plan")) == 0
    graph_engine.engine = _Engine(**{tensor: found})
    with pytest.raises(PackageError, match=r"embed\.plan is not of the graph that the manifest describes"):
        graph_engine._check(spec, Path("embed.plan"))


OUT_OF_BOUNDS: dict[str, Lie] = {
    "an absurd number of loops": lambda m: m.update(loops=10**9),
    "an absurd batch": lambda m: m.update(max_batch=10**18),
    "an absurd length": lambda m: m.update(max_seq_len=2**62, cache_rows=2**62 + 8),
    "an absurd state": lambda m: m["states"][0].update(shape=["batch", "chunk", 2**62]),
    "a threshold that is no number": lambda m: m.update(exit_threshold=float("nan")),
    "an infinite threshold": lambda m: m.update(exit_threshold=float("inf")),
    "a large whole number for a threshold": lambda m: m.update(exit_threshold=10**39),
    "a very long name": lambda m: m["states"][0].update(input="h" * 10**6),
    "an escape character in a name": lambda m: m["untrained"].append("\x1b[2J"),
    "half a surrogate": lambda m: m["libraries"].update(torch="\ud800"),
    "a line break in a version": lambda m: m["libraries"].update(torch="2\n3"),
    "a stop id that is none": lambda m: m["model"].update(eos_token_id={"a": 1}),
    "a negative stop id": lambda m: m["model"].update(eos_token_id=[-1]),
    "layers that are no number": lambda m: m["model"].update(num_attention_heads="4"),
    "products without a kind": lambda m: m.update(weights={"block": 32}),
    "a file of negative size": lambda m: m["files"]["weights.data"].update(bytes=-1),
    "a hash that is none": lambda m: m["files"]["weights.data"].update(sha256="x" * 64),
    "a file that is the directory": lambda m: m["files"].update({".": {"sha256": "", "bytes": 0}}),
    "a file in a roundabout way": lambda m: m["files"].update({"./embed.onnx": m["files"]["embed.onnx"]}),
    "the manifest itself": lambda m: m["files"].update({"manifest.json": m["files"]["embed.onnx"]}),
    "a graph that is no graph": lambda m: m["graphs"]["embed"].update(file="weights.data"),
    "a name longer than any file's": lambda m: m["files"].update({"é" * 200: {"sha256": "", "bytes": 0}}),
    "a nul in a name": lambda m: m["files"].update({"a\0b": {"sha256": "", "bytes": 0}}),
    "a list for a graph": lambda m: m["graphs"].update(embed=[]),
    "a list for files": lambda m: m.update(files=[]),
    "null for states": lambda m: m.update(states=None),
    "an unknown field of a state": lambda m: m["states"][0].update(address=0),
    "engines that are a list": lambda m: m.update(engines=[]),
    "a version that is true": lambda m: m.update(format_version=True),
    "a version that is a list": lambda m: m.update(format_version=[1]),
}


@pytest.mark.parametrize("change", OUT_OF_BOUNDS)
def test_a_manifest_out_of_bounds_is_refused_in_one_line(package_copy: Path, change: str) -> None:
    edit(package_copy, OUT_OF_BOUNDS[change])
    result = CliRunner().invoke(app, ["inspect", str(package_copy)])
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("melt-run: manifest.json: ")
    assert result.stderr.removesuffix("\n").isprintable()
    assert len(result.stderr) < 600


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "deep"),
        ('{"a":' * 50 + "1" + "}" * 50, "deep"),
        ('{"format_version": ' + "9" * 5000 + "}", "digits"),
        ('{"format_version": -' + "9" * 50 + "}", "digits"),
        ('{"a": "' + "x" * (9 << 20) + '"}', "bytes"),
        ("[]", "object"),
        ("null", "object"),
        ("", "JSON"),
        ("\ufeff{}", "JSON"),
    ],
    ids=["deep lists", "deep objects", "many digits", "negative", "large", "a list", "null", "empty", "a mark"],
)
def test_json_that_would_break_its_reader_is_refused(package_copy: Path, text: str, says: str) -> None:
    for name in ("manifest.json", "generation_config.json"):
        path = package_copy / name
        before = path.read_bytes()
        path.write_text(text, encoding="utf-8")
        if name != "manifest.json":
            edit(package_copy, lambda m, path=path: m["files"][path.name].update(bytes=path.stat().st_size))  # type: ignore[misc]
        with pytest.raises(PackageError, match=says):
            Runtime.load(package_copy, check_hashes=False)
        path.write_bytes(before)


def test_text_that_is_not_utf_8_is_refused(package_copy: Path) -> None:
    (package_copy / "manifest.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(PackageError, match="not UTF-8 text at byte 7"):
        Package.open(package_copy)


def lied_graph(package: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Changes a package's embedding and its entry in the manifest."""
    path = package / "embed.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    edit(package, lambda m: m["files"]["embed.onnx"].update(bytes=path.stat().st_size))


def entry(tensor: TensorProto, key: str) -> onnx.StringStringEntryProto:
    """An entry of a tensor's external data, made if need be."""
    found = next((one for one in tensor.external_data if one.key == key), None)
    if found is None:
        found = tensor.external_data.add()
        found.key = key
    return found


def outside(location: str) -> TensorProto:
    """A tensor that is read from a file."""
    made = numpy_helper.from_array(np.zeros(4, np.float32), "stolen")
    made.ClearField("raw_data")
    made.data_location = TensorProto.EXTERNAL
    entry(made, "location").value = location
    return made


WEIGHTS: dict[str, tuple[Callable[[onnx.ModelProto], object], str]] = {
    "from elsewhere": (
        lambda m: entry(m.graph.initializer[0], "location").__setattr__("value", "../secret"),
        "reads '../secret', which is no weights file",
    ),
    "from an absolute path": (
        lambda m: entry(m.graph.initializer[0], "location").__setattr__("value", "/etc/passwd"),
        "reads '/etc/passwd'",
    ),
    "from a file that is no weights": (
        lambda m: entry(m.graph.initializer[0], "location").__setattr__("value", "tokenizer.json"),
        r"reads 'tokenizer\.json'",
    ),
    "from beyond the end": (
        lambda m: entry(m.graph.initializer[0], "offset").__setattr__("value", str(10**12)),
        "beyond the end of weights.data",
    ),
    "longer than the file": (
        lambda m: entry(m.graph.initializer[0], "length").__setattr__("value", str(10**12)),
        "beyond the end of weights.data",
    ),
    "from a negative place": (
        lambda m: entry(m.graph.initializer[0], "offset").__setattr__("value", "-4096"),
        "an offset or length is '-4096'",
    ),
    "in an attribute": (
        lambda m: m.graph.node.append(helper.make_node("Constant", [], ["x"], value=outside("/etc/passwd"))),
        "an attribute of '' reads values from another file",
    ),
    "in a branch": (
        lambda m: m.graph.node.append(
            helper.make_node("If", ["c"], ["x"], then_branch=helper.make_graph([], "t", [], [], [outside("x.data")]))
        ),
        "a graph within a node reads weights",
    ),
    "sparse": (
        lambda m: m.graph.sparse_initializer.add(
            values=numpy_helper.from_array(np.zeros(1, np.float32)), dims=[10**12]
        ),
        "sparse weights",
    ),
}


@pytest.mark.parametrize("where", WEIGHTS)
def test_a_graph_reads_nothing_but_the_packages_own_weights(package_copy: Path, where: str) -> None:
    change, says = WEIGHTS[where]
    lied_graph(package_copy, change)
    with pytest.raises(PackageError, match=says):
        Package.open(package_copy, check_hashes=False)


def test_a_file_that_the_manifest_does_not_list_is_not_read(package_copy: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (package_copy / "tokenizer_config.json").symlink_to(tmp_path / "secret.json")
    (package_copy / "special_tokens_map.json").write_text("[")
    (package_copy / "chat_template.jinja").write_text("{{ nothing valid")
    (package_copy / "generation_config.json").write_text('{"eos_token_id": 7}')
    edit(package_copy, lambda m: [m["files"].pop(n) for n in ("chat_template.jinja", "generation_config.json")])
    runtime = Runtime.load(package_copy)
    assert runtime.tokenizer is not None
    assert not runtime.tokenizer.has_chat_template
    assert runtime.stop_ids == {1}
    (package_copy / "tokenizer.json").unlink()
    (package_copy / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    edit(package_copy, lambda m: m["files"].pop("tokenizer.json"))
    assert Runtime.load(package_copy).tokenizer is None
    assert json.loads(CliRunner().invoke(app, ["inspect", str(package_copy), "--json"]).stdout)["tokenizer"] is False


def test_the_package_hash_is_that_of_the_manifest_and_can_be_demanded(package_copy: Path) -> None:
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(package_copy), "--json"]).stdout)["hash"]
    assert shown in CliRunner().invoke(app, ["inspect", str(package_copy)]).stdout
    Runtime.load(package_copy, expected_hash=shown)
    Runtime.load(package_copy, expected_hash=f"sha256:{shown.upper()}")
    edit(package_copy, lambda m: m.update(loops=3))
    Runtime.load(package_copy)
    with pytest.raises(PackageError, match=r"another package than expected: its hash is [0-9a-f]{64}"):
        Runtime.load(package_copy, expected_hash=shown)
    for command in (["generate", str(package_copy), "--ids", "5"], ["inspect", str(package_copy)]):
        result = CliRunner().invoke(app, [*command, "--expect", shown])
        assert result.exit_code == 2
        assert "another package than expected" in result.stderr


def test_an_expected_hash_that_is_none_or_vouches_for_nothing_is_refused(tiny_package: Path) -> None:
    with pytest.raises(ValueError, match="64 digits"):
        Package.open(tiny_package, expected_hash="abc")
    with pytest.raises(ValueError, match="not hashed"):
        Package.open(tiny_package, expected_hash=Package.open(tiny_package).hash, check_hashes=False)


def hub_snapshot(package: Path, cache: Path) -> Path:
    """A package as huggingface_hub keeps it: every file a link to its content."""
    snapshot, blobs = cache / "models--a--b" / "snapshots" / "abc", cache / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(package.iterdir())):
        shutil.copyfile(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


def test_a_package_that_a_hub_client_left_as_links_into_its_cache_opens(tiny_package: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(tiny_package, tmp_path)
    expected = Runtime.load(tiny_package).generate([5, 6, 7], max_tokens=4)
    assert Runtime.load(snapshot).generate([5, 6, 7], max_tokens=4) == expected
    assert Package.open(snapshot).hash == Package.open(tiny_package).hash


def test_a_link_from_a_snapshot_to_anywhere_else_is_refused(tiny_package: Path, tmp_path: Path) -> None:
    snapshot = hub_snapshot(tiny_package, tmp_path)
    blobs, outside = tmp_path / "models--a--b" / "blobs", tmp_path / "outside"
    outside.write_bytes((snapshot / "weights.data").read_bytes())
    (snapshot / "weights.data").unlink()
    (snapshot / "weights.data").symlink_to(outside)
    with pytest.raises(PackageError, match="link that leaves"):
        Runtime.load(snapshot)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PackageError, match="link that leaves"):
        Runtime.load(snapshot)


def test_every_graph_of_every_kind_is_what_the_states_require(
    make_looplm: MakeCheckpoint, make_checkpoint: MakeCheckpoint, make_package: MakePackage
) -> None:
    for package in (make_package(make_checkpoint()), make_package(make_looplm())):
        manifest = Package.open(package).manifest
        assert read_manifest(manifest.to_json()) == manifest
        assert set(manifest.graphs) == set(GRAPHS)

"""A package's quantized matmuls alone, from memory and from the processor's cache: what bounds its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from rivals.turns import Sample

# Bytes of weights that fit into the caches of two cores of nearly every processor, and how often a sample reads them.
_CACHED_BYTES, _REPEATS = 1 << 19, 12_000


def matmuls(directory: Path, threads: int, loops: int, tokens: int) -> Iterator[Sample]:
    """Run a package's quantized matmuls alone, with its stored weights: the lower bound of a loop step of one token.

    Like the loop step, the first loop leaves out the gate's matmuls, which are in a branch of the graph.
    """
    import onnx

    model = onnx.load(directory / "loop_step.onnx", load_external_data=False)
    branches = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.HasField("g")]
    always, later = (_matmuls_alone(model, graphs, directory, threads) for graphs in ([model.graph], branches))
    while True:
        times = []
        for _ in range(tokens + 1):
            started = perf_counter()
            for loop in range(loops):
                always()
                if loop:
                    later()
            times.append(perf_counter() - started)
        token = float(np.median(times[1:]))
        yield {"token_s": token, "loop_s": token / loops}


def _matmuls_alone(model: Any, graphs: list[Any], directory: Path, threads: int) -> Callable[[], None]:
    """Return a function that runs every MatMulNBits in graphs of a model, each on a random input, and nothing else."""
    from onnx import TensorProto, helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs: dict[int, Any] = {}
    outputs, nodes = [], []
    for node in (node for graph in graphs for node in graph.node if node.op_type == "MatMulNBits"):
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        inputs[sizes["K"]] = helper.make_tensor_value_info(f"x{sizes['K']}", TensorProto.FLOAT, [1, sizes["K"]])
        outputs.append(helper.make_tensor_value_info(f"y{len(nodes)}", TensorProto.FLOAT, [1, sizes["N"]]))
        node.input[0], node.output[0] = inputs[sizes["K"]].name, outputs[-1].name
        nodes.append(node)
    if not nodes:
        return lambda: None
    used = {name: stored[name] for node in nodes for name in node.input[1:]}
    graph = helper.make_graph(nodes, "products", list(inputs.values()), outputs, list(used.values()))
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = _session(alone, directory, threads)
    binding, random = session.io_binding(), np.random.default_rng(0)
    for size, value in inputs.items():
        binding.bind_cpu_input(value.name, random.standard_normal((1, size)).astype(np.float32))
    for value in outputs:
        binding.bind_output(value.name)
    return lambda: session.run_with_iobinding(binding)


def _session(model: Any, directory: Path, threads: int) -> Any:
    """Return a session of a model in memory, whose large weights are in files of a directory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def cached_matmuls(directory: Path, threads: int) -> Iterator[Sample]:
    """Run the kernel of a package's quantized matmuls over so few weights that they stay in the processor's cache.

    Measures the bytes per second that its arithmetic alone allows, however fast memory is.
    """
    import onnx

    model = onnx.load(directory / "loop_step.onnx", load_external_data=False)
    session, inputs, stored = _matmul_in_a_loop(model, directory, threads)
    inputs["count"] = np.array(_REPEATS)
    while True:
        started = perf_counter()
        session.run(None, inputs)
        seconds = perf_counter() - started
        yield {"token_s": seconds, "bytes_s": _REPEATS * stored / seconds}


def _matmul_in_a_loop(model: Any, directory: Path, threads: int) -> tuple[Any, dict[str, Any], int]:
    """Return a session that multiplies ``count`` times by the first columns of the first MatMulNBits.

    Also returns its inputs, and the bytes that it reads each time.
    """
    from onnx import TensorProto, helper, numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    whole = [numpy_helper.to_array(tensors[name], str(directory)).reshape(sizes["N"], -1) for name in node.input[1:]]
    columns = min(sizes["N"], _CACHED_BYTES // sum(part[0].nbytes for part in whole) // 16 * 16)
    numbers = whole[0][:columns].reshape(columns, -1, sizes["block_size"] * sizes["bits"] // 8)
    parts = [numbers, *(part[:columns].reshape(-1) for part in whole[1:])]

    del node.input[:], node.output[:]
    node.input.extend(["x", *(f"part{index}" for index in range(len(parts)))])
    node.output.append("y")
    next(attribute for attribute in node.attribute if attribute.name == "N").i = columns
    value, flag, number = helper.make_tensor_value_info, TensorProto.BOOL, TensorProto.INT64
    body = helper.make_graph(
        [node, helper.make_node("Identity", ["going"], ["goes_on"])],
        "body",
        [value("index", number, []), value("going", flag, []), value("before", TensorProto.FLOAT, [1, columns])],
        [value("goes_on", flag, []), value("y", TensorProto.FLOAT, [1, columns])],
        [numpy_helper.from_array(part, f"part{index}") for index, part in enumerate(parts)],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["count", "goes", "zeros"], ["last"], body=body)],
        "cached",
        [
            value("count", number, []),
            value("goes", flag, []),
            value("zeros", TensorProto.FLOAT, [1, columns]),
            value("x", TensorProto.FLOAT, [1, sizes["K"]]),
        ],
        [value("last", TensorProto.FLOAT, [1, columns])],
    )
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    session = _session(alone, directory, threads)
    x = np.random.default_rng(0).standard_normal((1, sizes["K"])).astype(np.float32)
    inputs = {"goes": np.array(True), "zeros": np.zeros((1, columns), np.float32), "x": x}
    return session, inputs, sum(part.nbytes for part in parts)

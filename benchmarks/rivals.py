"""Rivals that take turns, each in a process of its own: A B A B, so that a noisy machine affects all alike.

A rival is a generator function that loads what it measures and yields a sample, values by name, per turn.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from melt_runtime.bench.busy import BusyProcesses
from melt_runtime.machine import resident

Sample = dict[str, float]
# Bytes of weights that fit into the caches of two cores of nearly every processor, and how often a sample reads them.
_CACHED_BYTES, _REPEATS = 1 << 19, 12_000


class Rival:
    """A generator function in a fresh process, which makes one step per ``visit``.

    Raises RuntimeError, with the reason, when it fails.
    """

    def __init__(self, name: str, function: Callable[..., Iterator[Sample]], *arguments: Any):
        self.name, self.samples = name, list[Sample]()
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, function, *arguments), daemon=True)
        self._child.start()
        theirs.close()

    def visit(self, *, counts: bool) -> None:
        """Make one step. A sample that does not count is a warm-up."""
        try:
            self._ours.send(True)
            sample = self._ours.recv()
        except (EOFError, OSError):
            sample = "its process ended"
        if isinstance(sample, str):
            raise RuntimeError(f"{self.name}: {sample}")
        if counts:
            self.samples.append(sample)

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._child.join()


def _serve(pipe: Connection, function: Callable[..., Iterator[Sample]], *arguments: Any) -> None:
    steps: Iterator[Sample] | None = None
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            steps = steps or function(*arguments)
            pipe.send({**next(steps), "peak_bytes": resident("VmHWM") or 0})
        except Exception as error:  # any error of a rival is its result
            pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return


def take_turns(rivals: list[Rival], rounds: int, advance: Callable[[], None], busy: int = 0) -> dict[str, Any]:
    """Every rival's median and quartiles of every number, and its time against the first's, pair by pair, beside
    ``busy`` busy processes."""
    try:
        with BusyProcesses(busy):
            for turn in range(rounds + 1):
                for rival in rivals:
                    rival.visit(counts=turn > 0)
                    advance()
    finally:
        for rival in rivals:
            rival.close()
    first = np.array([sample["token_s"] for sample in rivals[0].samples])
    found: dict[str, Any] = {}
    for rival in rivals:
        numbers = {name: [sample[name] for sample in rival.samples] for name in rival.samples[0]}
        numbers["time_against_first"] = (np.array(numbers["token_s"]) / first).tolist()
        found[rival.name] = {name: quartiles(values) for name, values in numbers.items()}
    return found


def best_threads(start: Callable[[int], Rival], counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return the fastest number of threads ("threads"), and the median "token_s" for each number that was tried.

    ``start``: starts a rival with a number of threads. They run one after the other, each in a process of its own.
    """
    if len(counts) == 1:
        return {"threads": counts[0], "token_s": {}}
    found = {}
    for count in counts:
        rival = start(count)
        turns = take_turns([rival], rounds, lambda: None)
        found[str(count)] = turns[rival.name]["token_s"]["median"]
    return {"threads": int(min(found, key=lambda count: found[count])), "token_s": found}


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "low": low, "high": high}


def package(
    directory: Path, threads: int | None, loops: int, context: int, tokens: int, prompt: int
) -> Iterator[Sample]:
    """Run a package as generation does."""
    from melt_runtime import Runtime
    from melt_runtime.bench.sweep import Stopwatch, settle

    runtime = Runtime.load(directory, threads=threads, check_hashes=False)
    watch = Stopwatch(runtime.driver())
    while True:
        if threads is None:
            settle([watch], context)
        token, loop = watch.decode(context, loops, tokens)
        sample = {"token_s": token, "loop_s": loop}
        if prompt:
            sample["prefill_s"] = watch.prefill(prompt, runtime.manifest.chunk, loops)
        yield sample


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


def eager(checkpoint: Path, precision: str, threads: int, loops: int, context: int, tokens: int) -> Iterator[Sample]:
    """Run the checkpoint in PyTorch, operator by operator, over a cache of ``context`` tokens."""
    import torch
    from melt_models.cache import MeltCache
    from melt_models.checkpoint import load_model

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = load_model(checkpoint, dtype)
    config = model.config
    rows = torch.zeros(1, config.num_key_value_heads, context, config.head_dim, dtype=dtype)
    one = torch.zeros(1, 1, dtype=torch.long)
    while True:
        cache = MeltCache(config.num_hidden_layers)
        if context:
            for layer in range(config.num_hidden_layers):
                cache.write(layer, rows, rows)
            cache.commit(torch.ones(1, context, dtype=torch.bool))
            cache.columns = context
        times = []
        with torch.inference_mode():
            for _ in range(tokens + 1):
                started = perf_counter()
                output = model(one, past_key_values=cache, num_loops=loops, exit_threshold=1.0, logits_to_keep=1)
                output.logits.argmax(-1)
                times.append(perf_counter() - started)
        token = float(np.median(times[1:]))
        yield {"token_s": token, "loop_s": token / loops}


def genai(directory: Path, threads: int, context: int, tokens: int, prompt: int) -> Iterator[Sample]:
    """Run a model exported by onnxruntime-genai's own builder in onnxruntime-genai."""
    import onnxruntime_genai as og

    config = og.Config(str(directory))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    longest = max(context, prompt) + tokens + 2

    def generator(count: int) -> Any:
        options = og.GeneratorParams(model)
        options.set_search_options(max_length=longest, min_length=longest, do_sample=False)
        made = og.Generator(model, options)
        made.append_tokens(np.arange(1, count + 1, dtype=np.int32))
        return made

    while True:
        sample: Sample = {}
        if prompt:
            started = perf_counter()
            generator(prompt).generate_next_token()
            sample["prefill_s"] = perf_counter() - started
        running, times = generator(max(context, 1)), []
        running.generate_next_token()
        for _ in range(tokens):
            started = perf_counter()
            running.generate_next_token()
            times.append(perf_counter() - started)
        token = float(np.median(times))
        yield sample | {"token_s": token, "loop_s": token}

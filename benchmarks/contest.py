"""Contestants that run in turn, each in a process of its own: A B A B, so that a noisy machine disturbs all alike.

A contestant is a function that loads what it measures and yields one sample, a dictionary of numbers, a visit.
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
# Weights that two cores of nearly every processor keep in their own caches, and how often they are read for one figure.
_CACHED_BYTES, _REPEATS = 1 << 19, 12_000


class Contestant:
    """A generator function in a fresh process, which makes one step whenever ``visit`` is called.

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
        """One step; a sample that does not count is a warm-up."""
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
        """Ends the process."""
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
        except Exception as error:  # whatever a rival raises is its result
            pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())}")
            return


def take_turns(
    contestants: list[Contestant], rounds: int, advance: Callable[[], None], busy: int = 0
) -> dict[str, Any]:
    """Every contestant's median and quartiles of every number, and its time against the first's, pair by pair, beside
    ``busy`` busy processes."""
    try:
        with BusyProcesses(busy):
            for turn in range(rounds + 1):
                for contestant in contestants:
                    contestant.visit(counts=turn > 0)
                    advance()
    finally:
        for contestant in contestants:
            contestant.close()
    first = np.array([sample["token_s"] for sample in contestants[0].samples])
    found: dict[str, Any] = {}
    for contestant in contestants:
        numbers = {name: [sample[name] for sample in contestant.samples] for name in contestant.samples[0]}
        numbers["time_against_first"] = (np.array(numbers["token_s"]) / first).tolist()
        found[contestant.name] = {name: quartiles(values) for name, values in numbers.items()}
    return found


def best_threads(rival: Callable[[int], Contestant], counts: Sequence[int], rounds: int) -> dict[str, Any]:
    """How many threads serve a contestant best: "threads", and the median "token_s" with each number of them.

    ``rival``: starts it with so many threads. They run one after the other, each in a process of its own.
    """
    if len(counts) == 1:
        return {"threads": counts[0], "token_s": {}}
    found = {}
    for count in counts:
        contestant = rival(count)
        turns = take_turns([contestant], rounds, lambda: None)
        found[str(count)] = turns[contestant.name]["token_s"]["median"]
    return {"threads": int(min(found, key=lambda count: found[count])), "token_s": found}


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return {"median": middle, "low": low, "high": high}


def package(
    directory: Path, threads: int | None, loops: int, context: int, tokens: int, prompt: int
) -> Iterator[Sample]:
    """A package as generation runs it; ``threads`` None: as many as it finds cores for."""
    from melt_runtime import Runtime
    from melt_runtime.bench.sweep import Stopwatch, settle

    runtime = Runtime.load(directory, threads=threads, check_hashes=False)
    watch = Stopwatch(runtime.driver())
    while True:
        if threads is None:
            settle([watch])
        token, loop = watch.decode(context, loops, tokens)
        sample = {"token_s": token, "loop_s": loop}
        if prompt:
            sample["prefill_s"] = watch.prefill(prompt, runtime.manifest.chunk, loops)
        yield sample


def products(directory: Path, threads: int, loops: int, tokens: int) -> Iterator[Sample]:
    """A package's quantized products alone, with its stored weights and nothing between them: what a loop step of one
    token could not be faster than with ONNX Runtime's kernels. Those of the gate, in a branch of the graph, are left
    out of the first loop, as there."""
    import onnx

    model = onnx.load(directory / "loop_step.onnx", load_external_data=False)
    branches = [attribute.g for node in model.graph.node for attribute in node.attribute if attribute.HasField("g")]
    always, later = (_products_alone(model, graphs, directory, threads) for graphs in ([model.graph], branches))
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


def _products_alone(model: Any, graphs: list[Any], directory: Path, threads: int) -> Callable[[], None]:
    """Runs every MatMulNBits in graphs of a model, each on a random input, and nothing else."""
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
    """A session of a model in memory, whose large weights lie in files of a directory."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def cached_products(directory: Path, threads: int) -> Iterator[Sample]:
    """The kernel of a package's quantized products over so few of its weights that they stay in the processor's cache:
    the bytes a second that its arithmetic alone allows, however fast memory is."""
    import onnx

    model = onnx.load(directory / "loop_step.onnx", load_external_data=False)
    session, inputs, stored = _product_in_a_loop(model, directory, threads)
    inputs["count"] = np.array(_REPEATS)
    while True:
        started = perf_counter()
        session.run(None, inputs)
        seconds = perf_counter() - started
        yield {"token_s": seconds, "bytes_s": _REPEATS * stored / seconds}


def _product_in_a_loop(model: Any, directory: Path, threads: int) -> tuple[Any, dict[str, Any], int]:
    """A session that multiplies ``count`` times with the first columns of the first MatMulNBits, its inputs, and the
    bytes that it reads each time."""
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
    """The checkpoint in PyTorch, operator by operator, over a cache of ``context`` rows."""
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
    """A model exported by onnxruntime-genai's own builder, run by onnxruntime-genai."""
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

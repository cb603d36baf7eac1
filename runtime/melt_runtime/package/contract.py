"""The contract between a package's states, graphs and engines: their tensors must agree in name, type and shape.

Buffers are sized by the states and bound with the graphs' shapes, so a difference would read or write beyond a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .manifest import FEWER_LOOPS, STAGES, Manifest
from .specs import CODA, PRECISIONS, PRELUDE, GraphSpec, Shape, StateSpec, TensorSpec, is_latent

_QUANTIZED = ("int8", "uint8")  # stored types of a quantized cache
_MASK: Shape = ("batch", 1, "chunk", "context")
_EXIT = TensorSpec("exit_probability", "float32", ("batch", "chunk"))


def disagreement(manifest: Manifest) -> str | None:
    """Return why a manifest's parts contradict each other, or None."""
    checks = (_sizes, _states, _start, _calibrated, _model, _graphs, _engines)
    return next((problem for check in checks if (problem := check(manifest)) is not None), None)


def required_tensors(manifest: Manifest) -> dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    """Return the inputs and outputs that each graph must have, by states and dialect, in any order."""
    states = manifest.states
    hidden = TensorSpec("hidden", states[0].dtype, states[0].shape)
    tokens: Shape = ("batch", "chunk")
    first_loop = TensorSpec("first_loop", "bool", tokens if manifest.staggers else ("batch",))
    steering = [first_loop, TensorSpec("active", "bool", tokens)]
    lengths = TensorSpec("lengths", "int64", ("batch",))
    fused = manifest.dialect == "onnxruntime"
    control = TensorSpec("chunk_lengths", "int64", ("batch",)) if fused else TensorSpec("attention_mask", "bool", _MASK)
    injected = [TensorSpec("injected", hidden.dtype, hidden.shape)] if manifest.injects else []
    exits = [_EXIT] if manifest.has_exit_gate or manifest.format_version < STAGES else []

    def stage(name: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """The states of a stage as its graph reads and writes them, with the control inputs that its layers need."""
        own = [state for state in states if state.stage == name]
        read = [TensorSpec(state.input, state.dtype, state.bound_shape) for state in own]
        written = [TensorSpec(state.output, state.dtype, state.output_shape) for state in own]
        return [*read, *([lengths, control] if own else [])], written

    read, written = stage("core")
    embed_read, embed_written = stage(PRELUDE)
    coda_read, coda_written = stage(CODA)
    ids = TensorSpec("input_ids", "int64", tokens)
    graphs = {
        "embed": ((ids, *embed_read), (*(injected or [hidden]), *embed_written)),
        "loop_step": ((*read, *(steering if manifest.has_latent else ()), *injected), (*written, *exits)),
        "lm_head": ((hidden,), (TensorSpec("logits", "float32", (*tokens, manifest.vocab_size)),)),
    }
    if manifest.has_coda:
        after = TensorSpec(states[0].output, hidden.dtype, hidden.shape)
        graphs[CODA] = ((hidden, *coda_read), (after, *coda_written))
    return graphs


def difference(wanted: Sequence[TensorSpec], found: Iterable[TensorSpec]) -> str | None:
    """Return how tensors differ from the wanted ones, or None. The order does not matter."""
    there: dict[str, TensorSpec] = {}
    for spec in found:
        if spec.name in there:
            return f"{spec.name} is there twice"
        there[spec.name] = spec
    for spec in wanted:
        other = there.pop(spec.name, None)
        if other is None:
            return f"{spec.name} is missing"
        if (other.dtype, other.shape) != (spec.dtype, spec.shape):
            return f"{spec.name} is {_spelled(other)}, not {_spelled(spec)}"
    return f"{next(iter(there))} is one too many" if there else None


def graph_difference(graph: GraphSpec, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> str | None:
    """Return how a loaded graph differs from the manifest's, or None."""
    for side, wanted, found in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        found_difference = difference(wanted, found)
        if found_difference is not None:
            return f"{side} {found_difference}"
    return None


def _sizes(manifest: Manifest) -> str | None:
    padding = manifest.chunk if manifest.max_batch > 1 else 0
    if manifest.chunk > manifest.max_seq_len:
        return f"chunk is {manifest.chunk}, above the {manifest.max_seq_len} of max_seq_len"
    if manifest.cache_rows != manifest.max_seq_len + padding:
        positions = manifest.max_seq_len + padding
        return f"cache_rows is {manifest.cache_rows}; max_seq_len, chunk and max_batch need {positions}"
    return None


def _states(manifest: Manifest) -> str | None:
    """Check the states: hidden, latent (a MELT of several loops only), and a key and value cache per layer, with the
    sizes of the manifest."""
    dtype, states = PRECISIONS[manifest.precision], manifest.states
    per_loop = any(state.by_loop for state in states)
    caches = manifest.core_caches
    layers = len(caches) // 2
    latents = [] if per_loop else _latents(manifest, layers)
    names = ["hidden", *(state.input for state in latents)]
    counted = {stage: sum(state.stage == stage for state in manifest.caches) // 2 for stage in (PRELUDE, CODA)}
    names += [f"{part}_cache.{layer}" for layer in range(layers) for part in ("key", "value")]
    for stage, count in counted.items():
        names += [f"{stage}_{part}_cache.{layer}" for layer in range(count) for part in ("key", "value")]
    if [state.input for state in states] != names or not layers:
        return f"states must be {', '.join(names[:2])} and so on: a key and a value cache for each layer"
    width = states[0].shape[-1]
    wanted = [StateSpec("hidden", "next_hidden", dtype, ("batch", "chunk", width), "swap")]
    wanted += latents
    first = caches[0]
    once = "read_only" if manifest.dialect == "portable" else "in_place"
    kind = {"in_place": "per_loop", "read_only": "per_loop_read_only"}[once] if per_loop else once
    stored = first.dtype if first.dtype in _QUANTIZED else dtype
    rank = 5 if per_loop else 4
    if len(first.shape) != rank:
        return f"state {first.input} has {len(first.shape)} dimensions; a cache of this kind has {rank}"
    loops, heads, size = first.shape[:1] if per_loop else (), first.shape[-3], first.shape[-1]
    shape: Shape = ("batch", heads, manifest.cache_rows, size)
    for name in names[len(wanted) :]:
        own, of_kind = ((*loops, *shape), kind) if name.startswith(("key_", "value_")) else (shape, once)
        wanted.append(StateSpec(name, _output(name, of_kind), stored, own, of_kind))
    for state, right in zip(states, wanted, strict=True):
        if state != right:
            return f"state {state.input} is {_state(state)}; with the rest of the manifest it would be {_state(right)}"
        if any(isinstance(dim, str) and dim not in ("batch", "chunk") for dim in state.shape) or isinstance(
            state.shape[-1], str
        ):
            return f"state {state.input} has the impossible shape {list(state.shape)}"
    if counted[CODA] and not manifest.has_coda:
        return f"there are caches of a {CODA}, but no graph {CODA}"
    if per_loop and (isinstance(loops[0], str) or manifest.loops > loops[0]):
        return f"loops is {manifest.loops}; the caches are for {loops[0]}"
    if manifest.most_loops == 1 and manifest.loops > 1:
        return f"loops is {manifest.loops}; without the state latent there is one"
    return None


def _latents(manifest: Manifest, layers: int) -> list[StateSpec]:
    """The latents as they must be: none in a package of one loop; one state per layer, or all in one (format 1)."""
    found = next((state for state in manifest.states if is_latent(state)), None)
    if found is None:
        return []
    dtype, shape = PRECISIONS[manifest.precision], ("batch", "chunk", found.shape[-1])
    if found.input == "latent":
        return [StateSpec("latent", "next_latent", dtype, (layers, *shape), "swap")]
    return [StateSpec(f"latent.{layer}", f"next_latent.{layer}", dtype, shape, "swap") for layer in range(layers)]


def _output(name: str, kind: str) -> str:
    return name.replace("_cache.", "_rows.") if kind.endswith("read_only") else f"next_{name}"


def _calibrated(manifest: Manifest) -> str | None:
    """Check that the calibrated exit allows no more loops than the package has, and that older runtimes refuse it."""
    if manifest.exit.get("most_loops") is not None and manifest.format_version < FEWER_LOOPS:
        return f"exit.most_loops needs format version {FEWER_LOOPS}, and this is {manifest.format_version}"
    if manifest.exit_loops > manifest.loops:
        return f"exit.most_loops is {manifest.exit_loops}, above the {manifest.loops} of loops"
    return None


def _start(manifest: Manifest) -> str | None:
    """Check where the loops start, and that a token's embedding is read at all."""
    state = manifest.start.get("state", "embedding")
    if state != "embedding" and not manifest.injects:
        return f"start.state is {state}, but nothing is injected into the loops: no token would be read"
    return None


def _model(manifest: Manifest) -> str | None:
    """Check that the model configuration has the sizes of the states."""
    caches = manifest.core_caches
    known = {
        "hidden_size": manifest.states[0].shape[-1],
        "num_hidden_layers": len(caches) // 2,
        "num_prelude_layers": sum(state.stage == PRELUDE for state in manifest.caches) // 2,
        "num_coda_layers": sum(state.stage == CODA for state in manifest.caches) // 2,
        "num_key_value_heads": caches[0].bound_shape[1],
        "vocab_size": manifest.vocab_size,
    }
    for name, size in known.items():
        said = manifest.model.get(name)
        if said is not None and said != size:
            return f"model.{name} is {said}; the states and graphs have {size}"
    return None


def _graphs(manifest: Manifest) -> str | None:
    for name, (inputs, outputs) in required_tensors(manifest).items():
        file = manifest.graphs[name].file
        if file not in manifest.files:
            return f"graph {name} is {file}, which files does not list"
        graph = GraphSpec("", inputs, outputs)
        found = graph_difference(graph, manifest.graphs[name].inputs, manifest.graphs[name].outputs)
        if found is not None:
            return f"graph {name}: {found}"
    return None


def _engines(manifest: Manifest) -> str | None:
    """Check that the engines' profiles stay within the buffers."""
    most: Mapping[str, int] = {
        "batch": manifest.max_batch,
        "chunk": max(manifest.chunk, 2),  # some engines' decode profiles allow two tokens
        "context": manifest.cache_rows,
    }
    for name, spec in manifest.engines.items():
        if list(spec.buckets) != sorted(set(spec.buckets)) or spec.buckets[-1] != manifest.cache_rows:
            return f"engine {name}: its attention lengths must rise to the {manifest.cache_rows} positions of the cache"
        if set(spec.files) != set(manifest.graphs):
            there, wanted = (", ".join(sorted(graphs)) for graphs in (spec.files, manifest.graphs))
            return f"engine {name} has plans for {there}, not for {wanted}"
        for profile in spec.profiles:
            for size, limit in most.items():
                if getattr(profile, size)[2] > limit:
                    found = getattr(profile, size)[2]
                    return f"engine {name}: its profile {profile.name} has {size} {found}; the package has {limit}"
    return None


def _spelled(spec: TensorSpec) -> str:
    return f"{spec.dtype} {list(spec.shape)}"


def _state(state: StateSpec) -> str:
    return f"{state.kind} {state.dtype} {list(state.shape)}, written to {state.output}"

"""What follows from a manifest: the arithmetic of a package, and which of its parts are untrained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .manifest import Manifest
from .specs import CODA, PRELUDE

_UNTRAINED = {
    "latent_gate": "the latent gate is untrained: answers will be poor until it is trained",
    "early_exit_gate": "the early exit gate is untrained: no token leaves the loops early until it is trained",
}


def arithmetic_of(manifest: Manifest) -> str:
    """Describe what a package computes in."""
    if not manifest.weights:
        return manifest.precision
    matmuls = f"{manifest.precision}; {manifest.weights.get('kind')} weights are multiplied on the CPU with"
    return f"{matmuls} {'float' if activations_of(manifest) == 'float' else '8-bit'} activations"


def stages_of(manifest: Manifest) -> str:
    """Describe what runs once per token, before and after the loops, and where these start; empty where only embedding
    and head do."""
    before, after = (sum(s.stage == stage for s in manifest.caches) // 2 for stage in (PRELUDE, CODA))
    found = [f"{_layers(before)} before the loops"] if before else []
    found += [f"{_layers(after)} after them"] if after else ["a norm after the loops"] if manifest.has_coda else []
    found += ["each loop also reads what precedes them"] if manifest.injects else []
    found += [f"they start from {manifest.start['state']}"] if manifest.start else []
    return ", ".join(found)


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def sharing_of(manifest: Manifest) -> str:
    """Describe what it costs that loops share caches which were trained with caches of their own; empty elsewhere."""
    loss = manifest.shared_caches
    if not loss:
        return ""
    perplexity, before = loss.get("perplexity"), loss.get("perplexity_per_loop")
    grown = ""
    if perplexity is not None and before:
        grown = f", perplexity {perplexity:.2f} instead of {before:.2f} ({100 * (perplexity / before - 1):+.1f}%)"
    how = "token by token" if loss["chunk"] == 1 else f"in chunks of {loss['chunk']}"
    return (
        f"the last loop's keys and values count; against a cache per loop: KL {loss['kl']:.1e}, "
        f"top-1 {loss['top1']:.1%}{grown}, on {loss['positions']:,} positions of {loss['text']} read {how}"
    )


def exit_of(manifest: Manifest) -> str:
    """Describe the calibrated exit of a package: its criteria, the most loops, what they save and what they cost; empty
    without one."""
    found = manifest.exit
    if not found:
        return ""
    asked, loss = str(found["quality"]), float(found["loss"])
    lost = f"perplexity {loss:+.2f}%" if asked.endswith("%") else f"{loss:.2f} points of agreement lost"
    kept = f"{found['loops']:.2f} of {found['full_loops']} loops, {lost}"
    how, most = str(found["criteria"]), found.get("most_loops")
    if most:
        how += f", with {most} {'loop' if most == 1 else 'loops'} at most,"
    return f"{how} keeps {asked}: {kept}, measured on {found['tokens']:,} tokens of {found['text']}"


def activations_of(manifest: Manifest) -> str | None:
    """Return the activations that ONNX Runtime multiplies quantized weights with on the CPU: "int8" or "float"; None
    without quantized weights."""
    return str(manifest.weights.get("activations", "int8")) if manifest.weights else None


def untrained_warnings(manifest: Manifest, loops: int | None = None) -> tuple[str, ...]:
    """Return a warning for each untrained part that is used with this number of loops (None: the package's)."""
    unread = unread_parts(manifest.model, manifest.loops if loops is None else loops)
    return tuple(
        _UNTRAINED.get(part, f"the part {part!r} is untrained") for part in manifest.untrained if part not in unread
    )


def unread_parts(model: Mapping[str, Any], loops: int) -> tuple[str, ...]:
    """Return the gates that do not affect results with this number of loops.

    With one loop, no token can leave early, and a latent that starts at its input stays there.
    """
    if loops > 1:
        return ()
    starts_at_input = model.get("latent_init", "first_input") == "first_input"
    return ("early_exit_gate", "latent_gate") if starts_at_input else ("early_exit_gate",)


def lane_window(manifest: Manifest) -> int:
    """Return the most tokens of a sequence that one run can hold in different loops: 1 if it cannot."""
    if manifest.cache_loops is not None:
        # The tokens in flight are one chunk of the coda.
        return min(manifest.cache_loops, manifest.chunk) if manifest.has_coda else manifest.cache_loops
    return min(manifest.loops, manifest.chunk) if manifest.staggers else 1


def lane_shape(manifest: Manifest) -> tuple[int, int]:
    """Return rows and columns of a pipelined run of one sequence; (1, 1) where there is none."""
    window = lane_window(manifest)
    return (1, window) if manifest.cache_loops is None or window == 1 else (manifest.cache_loops, 1)

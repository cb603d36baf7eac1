"""Format a scheduler's counters for Prometheus (text format 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate

from ..scheduler.metrics import DEEPEST, Histogram, SchedulerMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def prometheus(metrics: SchedulerMetrics, unread: int) -> str:
    """Return the page of /metrics. ``unread``: tokens that clients have not taken."""
    deep = sum(loops * count for loops, count in metrics.depth.items())
    # A bucket counts all up to its depth. The last depth also stands for greater ones, so it has no bound.
    bounds = [loops for loops in metrics.depth if loops < DEEPEST]
    depth = _cumulative(bounds, [metrics.depth[loops] for loops in bounds], sum(metrics.depth.values()))
    lines = [
        *_single("melt_requests_waiting", "gauge", "Requests in the queue.", metrics.waiting),
        *_single("melt_requests_running", "gauge", "Requests that have a slot.", metrics.running),
        *_single("melt_slots", "gauge", "Requests that can run at once.", metrics.slots),
        *_head("melt_requests_total", "counter", "Requests that ended, by outcome."),
        *(f'melt_requests_total{{outcome="{name}"}} {count}' for name, count in metrics.requests.items()),
        *_single("melt_prompt_tokens_total", "counter", "Prompt tokens run through the model.", metrics.prompt_tokens),
        *_single("melt_prefix_hits_total", "counter", "Prompts whose beginning was restored.", metrics.prefix_hits),
        *_single("melt_prefix_tokens_total", "counter", "Prompt tokens restored, not run.", metrics.prefix_tokens),
        *_single("melt_prefix_bytes", "gauge", "Size of the prefix cache.", metrics.prefix_bytes),
        *_single("melt_generated_tokens_total", "counter", "Generated tokens.", metrics.generated_tokens),
        *_single("melt_unread_tokens", "gauge", "Generated tokens that no client has read.", unread),
        *_histogram("melt_first_token_seconds", "From submission to the first token.", metrics.first_token),
        *_histogram("melt_inter_token_seconds", "From a token to the next.", metrics.inter_token),
        *_head("melt_depth_loops", "histogram", f"Loops per generated token; {DEEPEST} means that many or more."),
        *_buckets("melt_depth_loops", depth, deep),
        *_single("melt_state_bytes", "gauge", "State of all slots, whatever the loops.", metrics.state_bytes),
        *_single("melt_weights_bytes", "gauge", "Graphs and weights as stored.", metrics.weights_bytes),
    ]
    return "\n".join(lines) + "\n"


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _single(name: str, kind: str, text: str, value: int) -> list[str]:
    return [*_head(name, kind, text), f"{name} {value}"]


def _histogram(name: str, text: str, histogram: Histogram) -> list[str]:
    buckets = _cumulative(histogram.bounds, histogram.counts[:-1], histogram.count)
    return [*_head(name, "histogram", text), *_buckets(name, buckets, histogram.total)]


def _cumulative(bounds: Iterable[float], counts: Iterable[int], total: int) -> dict[str, int]:
    return {**{f"{bound:g}": sum_ for bound, sum_ in zip(bounds, accumulate(counts), strict=True)}, "+Inf": total}


def _buckets(name: str, buckets: Mapping[str, int], total: float) -> list[str]:
    lines = [f'{name}_bucket{{le="{bound}"}} {count}' for bound, count in buckets.items()]
    return [*lines, f"{name}_sum {total}", f"{name}_count {buckets['+Inf']}"]

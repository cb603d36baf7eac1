"""Export a scheduler's counters to Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..scheduler.metrics import DEEPEST, Histogram, SchedulerMetrics

__all__ = ["CONTENT_TYPE", "prometheus"]


def prometheus(metrics: SchedulerMetrics, unread: int, build: Mapping[str, str] | None = None) -> str:
    """Return the page of /metrics, with the memory and time of this process where the system tells them.

    ``unread``: tokens that clients have not taken. ``build``: what runs here, as labels.
    """
    registry = CollectorRegistry()  # of its own, because several applications may share a process
    registry.register(_Counters(metrics, unread, build or {}))
    ProcessCollector(registry=registry)
    return generate_latest(registry).decode()


class _Counters(Collector):
    """The metrics of one moment."""

    def __init__(self, metrics: SchedulerMetrics, unread: int, build: Mapping[str, str]):
        self.metrics, self.unread, self.build = metrics, unread, build

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, in the order of the page."""
        now = self.metrics
        built = GaugeMetricFamily("melt_build_info", "What runs here; always 1.", labels=list(self.build))
        built.add_metric(list(self.build.values()), 1)
        yield built
        yield GaugeMetricFamily("melt_requests_waiting", "Requests in the queue.", now.waiting)
        yield GaugeMetricFamily("melt_requests_running", "Requests that have a slot.", now.running)
        yield GaugeMetricFamily("melt_slots", "Requests that can run at once.", now.slots)
        ended = CounterMetricFamily("melt_requests", "Requests that ended, by outcome.", labels=["outcome"])
        for outcome, count in now.requests.items():
            ended.add_metric([outcome], count)
        yield ended
        yield CounterMetricFamily("melt_prompt_tokens", "Prompt tokens run through the model.", now.prompt_tokens)
        yield CounterMetricFamily("melt_prefix_hits", "Prompts whose beginning was restored.", now.prefix_hits)
        yield CounterMetricFamily("melt_prefix_tokens", "Prompt tokens restored, not run.", now.prefix_tokens)
        yield GaugeMetricFamily("melt_prefix_bytes", "Size of the prefix cache.", now.prefix_bytes)
        yield CounterMetricFamily("melt_generated_tokens", "Generated tokens.", now.generated_tokens)
        yield GaugeMetricFamily("melt_unread_tokens", "Generated tokens that no client has read.", self.unread)
        yield _times("melt_queue_seconds", "From submission to a slot.", now.queued)
        yield _times("melt_request_seconds", "From submission to the end, whatever the outcome.", now.whole)
        yield _times("melt_first_token_seconds", "From submission to the first token.", now.first_token)
        yield _times("melt_inter_token_seconds", "From a token to the next.", now.inter_token)
        yield _depth(now.depth)
        yield CounterMetricFamily("melt_pipeline_runs", "Runs of pipelined decoding.", now.pipeline_runs)
        yield CounterMetricFamily("melt_pipeline_tokens", "Tokens decoded pipelined.", now.pipeline_tokens)
        yield _drafts(
            "melt_drafts_held", "Drafts that were the next token, by the loop that predicted it.", now.drafts_held
        )
        yield _drafts("melt_drafts_dropped", "Drafts that were not the next token, by loop.", now.drafts_dropped)
        yield GaugeMetricFamily("melt_state_bytes", "State of all slots, whatever the loops.", now.state_bytes)
        yield GaugeMetricFamily("melt_weights_bytes", "Graphs and weights as stored.", now.weights_bytes)


def _times(name: str, text: str, times: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, _buckets(times.bounds, times.counts[:-1], times.count), times.total)


def _drafts(name: str, text: str, counts: Sequence[int]) -> Metric:
    found = CounterMetricFamily(name, text, labels=["loop"])
    for loop, count in enumerate(counts, 1):
        found.add_metric([str(loop)], count)
    return found


def _depth(depth: dict[int, int]) -> Metric:
    # The last depth also stands for greater ones, so it has no bound.
    bounds = [loops for loops in depth if loops < DEEPEST]
    buckets = _buckets(bounds, [depth[loops] for loops in bounds], sum(depth.values()))
    text = f"Loops per generated token; {DEEPEST} means that many or more."
    return HistogramMetricFamily("melt_depth_loops", text, buckets, sum(loops * n for loops, n in depth.items()))


def _buckets(bounds: Iterable[float], counts: Iterable[int], total: int) -> list[tuple[str, float]]:
    """Return, for each bound, how many observations are up to it."""
    found = [(f"{bound:g}", float(sum_)) for bound, sum_ in zip(bounds, accumulate(counts), strict=True)]
    return [*found, ("+Inf", float(total))]

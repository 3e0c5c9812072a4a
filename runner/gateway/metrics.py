"""`/metrics`: the gateway's counters and the engines' own, as Prometheus text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from runner.gateway.backend import Deployment
from runner.telemetry import Counter, GatewayMetrics, Histogram

__all__ = ["CONTENT_TYPE", "render"]

_GAUGES = {
    "rows": "Requests decoding.",
    "prefilling": "Requests in prefill.",
    "waiting": "Requests queued in the engine.",
    "active_bytes": "Bytes that MLX holds.",
    "peak_bytes": "Most bytes that MLX has held.",
    "cache_bytes": "Bytes of freed memory that MLX keeps.",
    "prefix_cache_bytes": "Bytes of the prefix cache.",
}
_COUNTERS = {
    "prompt_tokens_total": "Prompt tokens, cached ones included.",
    "cached_tokens_total": "Prompt tokens that came from the prefix cache.",
    "completion_tokens_total": "Generated tokens.",
    "drafted_tokens_total": "Tokens that the draft model proposed.",
    "accepted_tokens_total": "Proposed tokens that the model accepted.",
    "steps_total": "Steps of the engine loop.",
    "cancelled_total": "Requests cancelled.",
    "failed_total": "Requests failed.",
}


class _Snapshot(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(metrics: GatewayMetrics, engines: Iterable[Deployment], listener: str, connections: int) -> bytes:
    """All of it, as of now; `connections` is how many clients hold to the listener's port."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot([*_gateway(metrics, listener, connections), *_engines(list(engines))]))
    return generate_latest(registry)


def _gateway(metrics: GatewayMetrics, listener: str, connections: int) -> Iterator[Metric]:
    for counter in metrics.counters():
        yield _family(CounterMetricFamily(counter.name, counter.help, labels=counter.labels), counter)
    flight = metrics.in_flight
    yield _family(GaugeMetricFamily(flight.name, flight.help, labels=flight.labels), flight)
    for histogram in metrics.histograms():
        yield _histogram(histogram)
    gauge = GaugeMetricFamily("mlx_run_open_connections", "Connections that clients hold.", labels=("listener",))
    gauge.add_metric((listener,), connections)
    yield gauge


def _family(
    family: CounterMetricFamily | GaugeMetricFamily, counter: Counter
) -> CounterMetricFamily | GaugeMetricFamily:
    for labels, value in counter.values.items():
        family.add_metric(labels, value)
    return family


def _histogram(histogram: Histogram) -> Metric:
    family = HistogramMetricFamily(histogram.name, histogram.help, labels=histogram.labels)
    bounds = [*(f"{bound:g}" for bound in histogram.bounds), "+Inf"]
    for labels, series in histogram.values.items():
        total = 0
        buckets = []
        for bound, count in zip(bounds, series.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        family.add_metric(labels, buckets, series.sum)
    return family


def _engines(engines: list[Deployment]) -> Iterator[Metric]:
    labels = ("model",)
    ready = GaugeMetricFamily(
        "mlx_run_model_ready", "1 when the model has generated and takes requests.", labels=labels
    )
    for engine in engines:
        ready.add_metric((engine.name,), float(engine.ready))
    yield ready
    known = [(engine.name, engine.stats) for engine in engines if engine.stats is not None]
    for name, text in _GAUGES.items():
        gauge = GaugeMetricFamily(f"mlx_run_engine_{name}", text, labels=labels)
        for model, stats in known:
            gauge.add_metric((model,), getattr(stats, name))
        yield gauge
    for name, text in _COUNTERS.items():
        counter = CounterMetricFamily(f"mlx_run_engine_{name.removesuffix('_total')}", text, labels=labels)
        for model, stats in known:
            counter.add_metric((model,), getattr(stats, name))
        yield counter

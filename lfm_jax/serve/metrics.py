"""Metrics for Prometheus: requests, times, and the counts of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Finish

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses",
         "/v1/embeddings", "/v1/rerank")
"""Others are counted together, lest a client makes up series without end."""
TOKENS = {"prompt_tokens": "Tokens of prompts", "cached_tokens": "Tokens of prompts found in the prefix cache",
          "drafted_tokens": "Tokens drafted by prompt lookup", "accepted_tokens": "Drafted tokens that were right",
          "not_finite": "Continuations that failed since the model's logits were not finite",
          "tokens": "Tokens generated", "steps": "Steps of rows that generated them"}


class Metrics:
    """The metrics of one server, in a registry of their own; those of its engine too, if it has one."""

    def __init__(self, engine: Engine | None = None):
        self._registry = CollectorRegistry()
        self._requests = Counter("lfm_requests", "Requests by path and status", ["path", "status"],
                                 registry=self._registry)
        self._seconds = Histogram("lfm_request_seconds", "Time from arrival to the end of the answer", ["path"],
                                  buckets=SECONDS, registry=self._registry)
        self.first_token = Histogram("lfm_first_token_seconds", "Time from a whole body to the first token",
                                     buckets=SECONDS, registry=self._registry)
        if engine is not None:
            self._registry.register(_EngineCounts(engine))

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        path = path if path in PATHS else "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCounts:
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        counts: Any = self._engine.counts.copy()
        for name, what in TOKENS.items():
            yield CounterMetricFamily(f"lfm_{name}", what, value=counts[name])
        ends = CounterMetricFamily("lfm_continuations", "Continuations by how they ended", labels=["finish"])
        for finish in get_args(Finish):
            ends.add_metric([finish], counts[finish])
        yield ends
        yield GaugeMetricFamily("lfm_slots_in_use", "Slots in use", value=self._engine.running())
        yield GaugeMetricFamily("lfm_waiting", "Requests without a slot", value=self._engine.waiting())

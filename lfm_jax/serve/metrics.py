"""Metrics for Prometheus: requests, times, and the counts of the engine or of an encoder's queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Finish

if TYPE_CHECKING:
    from lfm_jax.serve.encoder_queue import EncoderQueue

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
PATHS = ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/responses",
         "/v1/embeddings", "/v1/rerank", "/v2/rerank")
"""Others are counted together, lest a client makes up series without end."""
TOKENS = {"prompt_tokens": "Tokens of prompts", "cached_tokens": "Tokens of prompts found in the prefix cache",
          "drafted_tokens": "Tokens drafted by prompt lookup", "accepted_tokens": "Drafted tokens that were right",
          "not_finite": "Continuations that failed since the model's logits were not finite",
          "tokens": "Tokens generated", "steps": "Steps of rows that generated them"}
ENCODED = {"prompt_tokens": "Tokens of texts that were encoded", "padded_tokens": "The same with padding",
           "texts": "Texts that were encoded", "batches": "Batches that they were encoded in"}


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
      counts: what else is counted, an engine's or a queue's.
    """

    def __init__(self, counts: Collector):
        self._registry = CollectorRegistry()
        self._requests = Counter("lfm_requests", "Requests by path and status", ["path", "status"],
                                 registry=self._registry)
        self._seconds = Histogram("lfm_request_seconds", "Time from arrival to the end of the answer", ["path"],
                                  buckets=SECONDS, registry=self._registry)
        self.first_token = Histogram("lfm_first_token_seconds", "Time from a whole body to the first token",
                                     buckets=SECONDS, registry=self._registry)
        self._registry.register(counts)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Counts a request that has ended."""
        path = path if path in PATHS else "other"
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class EngineCounts(Collector):
    """The counts of an engine."""

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


class EncoderCounts(Collector):
    """The counts of an encoder's queue."""

    def __init__(self, queue: EncoderQueue):
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        for name, what in ENCODED.items():
            yield CounterMetricFamily(f"lfm_{name}", what, value=self._queue.counts[name])
        yield GaugeMetricFamily("lfm_waiting", "Texts that wait for a batch", value=self._queue.waiting())

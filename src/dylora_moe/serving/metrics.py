"""What a server counts, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The counts of one server.

    Args:
        service: whose state is told.
    """

    def __init__(self, service: Service):
        self._service = service
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": "dylora_moe"}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **own)
        self.latency = Histogram("request_seconds", "Until an answer has ended.", ["path"], buckets=SECONDS, **own)
        self.first = Histogram("first_token_seconds", "Until the first token of an answer.", buckets=SECONDS, **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", **own)
        self.tokens = Counter("generated_tokens", "Tokens of answers.", **own)
        self.changes = Counter("changes", "Changes of the mixture.", ["kind", "outcome"], **own)
        self.registry.register(self)  # pyright: ignore[reportArgumentType]

    def collect(self) -> Iterator[Metric]:
        """What is read when it is asked for."""
        service, engine = self._service, self._service.engine
        yield GaugeMetricFamily("dylora_moe_queue", "Requests that wait for a slot.", engine.waiting)
        yield GaugeMetricFamily("dylora_moe_live", "Requests that are read or answered.", engine.live)
        yield GaugeMetricFamily("dylora_moe_slots", "Requests that are answered at a time.", engine.slots)
        yield GaugeMetricFamily("dylora_moe_experts", "Experts of the mixture.", len(service.model.expert_names))
        yield CounterMetricFamily("dylora_moe_cancelled", "Requests whose client went away.", service.worker.cancelled)
        load = CounterMetricFamily(
            "dylora_moe_expert_tokens", "Tokens an expert has written: sums of routing weights.", labels=["expert"]
        )
        for name, tokens in list(service.written.items()):
            load.add_metric([name], tokens)
        yield load

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)

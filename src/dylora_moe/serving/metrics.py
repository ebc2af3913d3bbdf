"""What a server counts, in the format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.responses import Response

from .service import Service

NAMESPACE = "dylora_moe"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class RequestMetrics:
    """The counts of any server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry, "namespace": NAMESPACE}
        self.requests = Counter("requests", "Requests answered.", ["path", "status"], **own)
        self.latency = Histogram("request_seconds", "Until an answer has ended.", ["path"], buckets=SECONDS, **own)

    def response(self) -> Response:
        """All of it."""
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")


class Metrics(RequestMetrics):
    """The counts of one server of a mixture.

    Args:
        service: whose state is told.
    """

    def __init__(self, service: Service):
        super().__init__()
        self._service = service
        own = {"registry": self.registry, "namespace": NAMESPACE}
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

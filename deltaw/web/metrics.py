"""What is measured, in Prometheus's form: per persona what it cost, and of the engine how full it is."""

from collections.abc import Iterator
from time import monotonic

from fastapi import Response
from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from deltaw.serve.engine import Engine
from deltaw.serve.sequence import Sequence

SECONDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3, 6, 12, 30, 60)
BLEND = "(blend)"
"""What all blends are counted as: there is no end of them."""
DISTINCT = (0, 1, 2, 4, 8, 16, 32, 64)


class Metrics(Collector):
    """One server's."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        own, each = self.registry, ["persona"]
        self.requests = Counter("deltaw_requests", "Answers that ended, by why.", [*each, "finish"], registry=own)
        self.asked = Counter("deltaw_prompt_tokens", "Tokens of prompts.", each, registry=own)
        self.said = Counter("deltaw_answer_tokens", "Tokens that were said.", each, registry=own)
        self.keys = Counter("deltaw_key_requests", "Answers that ended, by key.", ["key"], registry=own)
        self.tokens = Counter("deltaw_key_tokens", "Tokens of prompts and answers, by key.", ["key"], registry=own)
        self.refused = Counter("deltaw_refused", "Requests told to come again.", ["key", "why"], registry=own)
        self.queued = Summary("deltaw_queue_seconds", "Until an answer was begun.", each, registry=own)
        self.first = Summary("deltaw_first_token_seconds", "Until its first token.", each, registry=own)
        self.firsts = Histogram("deltaw_all_first_token_seconds", "Until any first token.", buckets=SECONDS,
                                registry=own)  # fmt: skip
        distinct = Histogram("deltaw_batch_adapters", "Distinct adapters in a step.", buckets=DISTINCT, registry=own)
        engine.stepped = distinct.observe
        self.registry.register(self)

    def ended(self, persona: str, sequence: Sequence, first: float | None, finish: str) -> None:
        """An answer came to its end."""
        persona = BLEND if len(sequence.worn) > 1 else "".join(sequence.names) or persona
        self.requests.labels(persona, finish).inc()
        self.asked.labels(persona).inc(len(sequence.asked))
        self.said.labels(persona).inc(len(sequence.said))
        self.keys.labels(sequence.tenant).inc()
        self.tokens.labels(sequence.tenant).inc(len(sequence.asked) + len(sequence.said))
        self.queued.labels(persona).observe((sequence.begun or monotonic()) - sequence.since)
        if first is not None:
            self.first.labels(persona).observe(first - sequence.since)
            self.firsts.observe(first - sequence.since)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """How things stand."""
        arena, engine = self.engine.arena, self.engine
        yield _gauge("deltaw_sequences", "Answers under way.", "state",
                     {"running": len(engine.running), "waiting": len(engine.waiting)})  # fmt: skip
        yield _gauge("deltaw_pages", "Pages of the one budget.", "state",
                     {"free": len(arena.free), "held": len(arena.held), "known": len(arena.idle),
                      "adapters": len(arena.given)})  # fmt: skip
        entries = list(engine.wardrobe.entries.values())
        yield _gauge("deltaw_adapters", "Adapters by state.", "state",
                     {state: sum(e.state == state for e in entries)
                      for state in ("known", "reading", "waiting", "ready", "failed")})  # fmt: skip
        yield _gauge("deltaw_adapter_bytes", "Memory of an adapter that is there.", "persona",
                     {e.name: served.size_bytes for e in entries if (served := e.served) is not None})  # fmt: skip
        yield _gauge("deltaw_adapter_load_seconds", "How long it took to read, the last time.", "persona",
                     {e.name: e.seconds for e in entries if e.seconds is not None})  # fmt: skip


def measured(registry: CollectorRegistry) -> Response:
    """All of it, as Prometheus reads it."""
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")


def _gauge(name: str, text: str, label: str, values: dict[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family

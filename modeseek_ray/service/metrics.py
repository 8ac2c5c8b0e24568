"""Figures for Prometheus. One registry per service, so that tests can start several."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from modeseek_ray.jobs.engine_store import LIVING
from modeseek_ray.jobs.records import EventDraft
from modeseek_ray.jobs.states import TRANSITIONS
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.notify import Notifier

# Part of a step -> the driver's figure of it. A sync is no part of the trainer's report: it follows the step, and
# its figures come with the next one.
STEP_PARTS = {
    **{part: f"seconds_{part}" for part in ("score", "forward", "backward", "optimizer", "total")},
    "sync": "sync.seconds",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters that are kept, and figures read from the store when asked for."""

    def __init__(self, store: Store, notifier: Notifier) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_StoreCollector(store, notifier))
        self.request_seconds = Histogram(
            "modeseek_request_seconds",
            "Time to the last byte of an answer.",
            ("method", "route", "status"),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self._registry,
        )
        self._driver_events = Counter(
            "modeseek_driver_events", "Events stored for drivers.", registry=self._registry
        )
        self._event_lag = Histogram(
            "modeseek_event_lag_seconds",
            "From the driver's event to its place in the store.",
            buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
            registry=self._registry,
        )
        self._steps = Counter("modeseek_steps", "Optimizer steps reported.", registry=self._registry)
        self._trained_tokens = Counter(
            "modeseek_trained_tokens", "Tokens trained on in those steps.", registry=self._registry
        )
        self._ess = Histogram(
            "modeseek_ess_ratio",
            "Effective sample size of each step's weights, over the batch.",
            buckets=[i / 10 for i in range(1, 11)],
            registry=self._registry,
        )
        self._part_seconds = Histogram(
            "modeseek_step_part_seconds",
            "Time of one part of a step: score, forward, backward, optimizer, sync, total.",
            ("part",),
            buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 300, 1800),
            registry=self._registry,
        )

        self.engine_wait_seconds = Histogram(
            "modeseek_engine_wait_seconds",
            "How long a question waited for its model's inference engine to be there.",
            buckets=(0.01, 0.1, 1, 5, 10, 20, 40, 60, 120, 300),
            registry=self._registry,
        )
        self._answers = Counter(
            "modeseek_answers", "Answers written by inference engines.", registry=self._registry
        )
        self._answer_tokens = Counter(
            "modeseek_answer_tokens",
            "Tokens read (prompt) and written (completion) for them.",
            ("kind",),
            registry=self._registry,
        )

    def observe_answers(self, count: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what an inference engine has written for one request."""
        self._answers.inc(count)
        self._answer_tokens.labels("prompt").inc(prompt_tokens)
        self._answer_tokens.labels("completion").inc(completion_tokens)

    def observe_events(self, drafts: Sequence[EventDraft], now: float) -> None:
        """Count what a driver has delivered; figures of steps are read from its metrics events."""
        self._driver_events.inc(len(drafts))
        for draft in drafts:
            if draft.created_at is not None:
                self._event_lag.observe(max(0.0, now - draft.created_at))
            if draft.type == "metrics" and "loss" in draft.data:
                self._observe_step(draft.data)

    def _observe_step(self, data: Mapping[str, Any]) -> None:
        self._steps.inc()
        self._trained_tokens.inc(_number(data.get("num_tokens")) or 0.0)
        ess_ratio = _number(data.get("ess_ratio"))
        if ess_ratio is not None:
            self._ess.observe(ess_ratio)
        for part, figure in STEP_PARTS.items():
            seconds = _number(data.get(figure))
            if seconds is not None:
                self._part_seconds.labels(part).observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)


def _number(value: Any) -> float | None:
    """A driver's figure, if it is one: a Prometheus counter goes up, and NaN would stay in a sum for ever."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if value >= 0 else None


class _StoreCollector(Collector):
    """Jobs by internal state, their progress, and open event streams."""

    def __init__(self, store: Store, notifier: Notifier) -> None:
        self._store = store
        self._notifier = notifier

    def describe(self) -> Iterator[Metric]:
        return iter(())  # registering must not ask the store

    def collect(self) -> Iterator[Metric]:
        counts = self._store.jobs.count_by_state()
        jobs = GaugeMetricFamily("modeseek_jobs", "Jobs by state.", labels=("state",))
        for state in TRANSITIONS:
            jobs.add_metric((state,), counts.get(state, 0))
        yield jobs
        oldest = self._store.queue.oldest_queued_at()
        waited = 0.0 if oldest is None else max(0.0, self._store.database.clock() - oldest)
        yield GaugeMetricFamily(
            "modeseek_queue_length", "Jobs that wait for their turn.", value=counts.get("queued", 0)
        )
        yield GaugeMetricFamily(
            "modeseek_queue_oldest_seconds", "How long the longest of them has waited.", value=waited
        )
        yield GaugeMetricFamily(
            "modeseek_webhooks_waiting",
            "Webhook events not confirmed yet.",
            value=self._store.webhooks.waiting(),
        )
        states = self._store.engines.count_by_state()
        engines = GaugeMetricFamily("modeseek_engines", "Inference engines by state.", labels=("state",))
        for state in LIVING:
            engines.add_metric((state,), states.get(state, 0))
        yield engines
        # Sums, not one figure per job: anybody who reaches this page may read it.
        running = self._store.jobs.in_states("running", "checkpointing")
        speed = sum(job.tokens_per_s or 0.0 for job in running)
        yield GaugeMetricFamily("modeseek_tokens_per_second", "Trained tokens per second.", value=speed)
        yield GaugeMetricFamily(
            "modeseek_event_streams", "Open event streams.", value=self._notifier.num_listeners
        )

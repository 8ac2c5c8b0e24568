"""Figures for Prometheus. One registry per service, so that tests can start several."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from modeseek_ray.jobs.states import TRANSITIONS
from modeseek_ray.jobs.store import Store
from modeseek_ray.service.notify import Notifier

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
        self.driver_events = Counter(
            "modeseek_driver_events", "Events stored for drivers.", registry=self._registry
        )

    def render(self) -> bytes:
        return generate_latest(self._registry)


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
        # Sums, not one figure per job: anybody who reaches this page may read it.
        running = self._store.jobs.in_states("running", "checkpointing")
        speed = sum(job.tokens_per_s or 0.0 for job in running)
        yield GaugeMetricFamily("modeseek_tokens_per_second", "Trained tokens per second.", value=speed)
        yield GaugeMetricFamily(
            "modeseek_event_streams", "Open event streams.", value=self._notifier.num_listeners
        )

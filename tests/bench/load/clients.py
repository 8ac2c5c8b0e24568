"""Who asks: submitters that repeat themselves, pollers, listeners to event streams, drivers that write events.

Each keeps a list of what it was answered; `problems` compares them with each other and with the store.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from modeseek_ray.client import AttemptClient

REPEATS = 0.3  # share of submissions that have been sent before
THINK_S = (0.2, 0.8)  # between a client's requests
EVENT_EVERY_S = 0.5  # of one driver
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used: to load certificates for each takes seconds


@dataclass
class Seen:
    """All that the clients were answered. Times in seconds."""

    submitted_s: list[float] = field(default_factory=list)
    polled_s: list[float] = field(default_factory=list)  # jobs that run
    queued_s: list[float] = field(default_factory=list)  # polls of jobs that wait, told their place
    listed_s: list[float] = field(default_factory=list)  # the newest jobs
    lags_s: list[float] = field(default_factory=list)  # from a driver's event to a listener
    statuses: Counter[int] = field(default_factory=Counter)
    answers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # key -> jobs
    repeated: int = 0
    streams: list[tuple[str, list[int]]] = field(default_factory=list)  # job, numbers of its events
    written: Counter[str] = field(default_factory=Counter)  # job -> events acknowledged

    @property
    def num_requests(self) -> int:
        """Answered: a driver sends a heartbeat with each event."""
        return sum(self.statuses.values()) + 2 * sum(self.written.values())


class Load:
    """Clients of one service until `deadline` (monotonic)."""

    def __init__(self, url: str, body: dict[str, Any], jobs_directory: Path, deadline: float) -> None:
        self._url = url
        self._body = body
        self._jobs_directory = jobs_directory
        self._deadline = deadline
        self._random = random.Random(0)
        self._keys: list[str] = []
        self._queued: list[str] = []  # no driver takes them: all slots are those of `jobs`
        self._clients: list[httpx.AsyncClient] = []
        self.seen = Seen()
        self.jobs: list[str] = []  # that drivers write to

    async def close(self) -> None:
        await asyncio.gather(*(http.aclose() for http in self._clients))

    def _client(self) -> httpx.AsyncClient:
        """One each: a pool of hundreds of connections looks at each with each for every request."""
        self._clients.append(
            httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=60, verify=_NO_TLS)
        )
        return self._clients[-1]

    def _goes_on(self) -> bool:
        return time.monotonic() < self._deadline

    async def _think(self) -> None:
        await asyncio.sleep(self._random.uniform(*THINK_S))

    async def prepare(self, count: int) -> None:
        """The jobs that drivers write to and listeners hear of."""
        http = self._client()
        for i in range(count):
            answer = await http.post(
                "/v1/fine_tuning/jobs", json=self._body, headers={"Idempotency-Key": f"driven-{i}"}
            )
            answer.raise_for_status()
            self.jobs.append(answer.json()["id"])
            self.seen.answers[f"driven-{i}"].add(self.jobs[-1])

    async def submit(self, name: str) -> None:
        number, http = 0, self._client()
        while self._goes_on():
            if self._keys and self._random.random() < REPEATS:
                key = self._random.choice(self._keys)
                self.seen.repeated += 1
            else:
                key, number = f"{name}-{number}", number + 1
                self._keys.append(key)
            started = time.monotonic()
            answer = await http.post(
                "/v1/fine_tuning/jobs", json=self._body, headers={"Idempotency-Key": key}
            )
            self.seen.submitted_s.append(time.monotonic() - started)
            self.seen.statuses[answer.status_code] += 1
            if answer.status_code == 200:
                self.seen.answers[key].add(answer.json()["id"])
                self._queued.append(answer.json()["id"])
            await self._think()

    async def poll(self) -> None:
        http = self._client()
        while self._goes_on():
            await self._think()
            path, times_s = self._random.choice(
                [
                    (f"/{self._random.choice(self.jobs)}", self.seen.polled_s),
                    (f"/{self._random.choice(self._queued or self.jobs)}", self.seen.queued_s),
                    ("?limit=20", self.seen.listed_s),
                ]
            )
            started = time.monotonic()
            answer = await http.get(f"/v1/fine_tuning/jobs{path}")
            times_s.append(time.monotonic() - started)
            self.seen.statuses[answer.status_code] += 1

    async def listen(self, job_id: str) -> None:
        """One stream from the job's beginning to the deadline."""
        numbers: list[int] = []
        self.seen.streams.append((job_id, numbers))
        path = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"
        async with self._client().stream("GET", path) as answer:
            self.seen.statuses[answer.status_code] += 1
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    event = json.loads(line[5:])
                    numbers.append(int(event["id"].rpartition("-")[2]))
                    if "sent" in (event["data"] or {}):
                        self.seen.lags_s.append(time.time() - event["data"]["sent"])

    async def drive(self, job_id: str) -> None:
        """Write events as the job's driver, each with the time it was written."""
        secret = await self._secret(job_id)
        client = AttemptClient(self._url, job_id, 1, token=secret["token"], fence=secret["fence"])
        await client.transition("running")
        number = 0
        while self._goes_on():
            number += 1
            event = {"seq": number, "type": "metrics", "message": f"Step {number}", "created_at": time.time()}
            await client.events([{**event, "data": {"step": number, "sent": time.time()}}])
            self.seen.written[job_id] = number
            await client.heartbeat({"step": number, "section": "step"})
            await asyncio.sleep(EVENT_EVERY_S)
        await client.close()

    async def _secret(self, job_id: str) -> dict[str, Any]:
        path = self._jobs_directory / job_id / "attempts" / "1" / "secret.json"
        while not path.exists():
            await asyncio.sleep(0.1)
        secret: dict[str, Any] = json.loads(path.read_text())
        return secret


def problems(seen: Seen, stored: dict[str, str], events: dict[str, int]) -> list[str]:
    """What was lost or doubled. `stored`: job by idempotency key; `events`: their number by job."""
    found = [f"{count} answers of {status}" for status, count in seen.statuses.items() if status >= 500]
    for key, jobs in seen.answers.items():
        if len(jobs) > 1:
            found.append(f"key {key} made {len(jobs)} jobs")
        if stored.get(key) not in jobs:
            found.append(f"key {key} was answered {jobs}, the store has {stored.get(key)}")
    for job_id, numbers in seen.streams:
        if numbers != list(range(1, len(numbers) + 1)):
            found.append(f"a stream of {job_id} has gaps or repetitions")
        if len(numbers) < seen.written[job_id]:
            found.append(f"a stream of {job_id} gave {len(numbers)} of {events[job_id]} events")
    return found

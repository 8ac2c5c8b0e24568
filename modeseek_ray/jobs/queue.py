"""Who is next, and when: the order of the queue, limits per tenant, and a guess at each start."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from modeseek_ray.jobs.records import JobRecord

TYPICAL_S = 600.0  # of a job of which nothing is known, where none has ended yet


@dataclass(frozen=True)
class Place:
    """Where a queued job stands: 1 = next. `starts_in_s` is a guess."""

    position: int
    starts_in_s: float


def startable(
    queue: Sequence[JobRecord],
    attended: Iterable[JobRecord],
    *,
    slots: int,
    limits: Mapping[str, int | None],
) -> list[JobRecord]:
    """Those of `queue` (first in line first) to start now.

    `slots` is how many jobs may run in all, `limits` how many of a tenant. A tenant at its limit
    stands aside: whoever comes behind is not kept waiting by it.
    """
    running = Counter(job.tenant_id for job in attended)
    found = []
    for job in queue:
        if running.total() >= slots:
            break
        limit = limits.get(job.tenant_id)
        if limit is None or running[job.tenant_id] < limit:
            running[job.tenant_id] += 1
            found.append(job)
    return found


def places(
    queue: Sequence[JobRecord],
    attended: Sequence[JobRecord],
    *,
    slots: int,
    limits: Mapping[str, int | None],
    typical_s: float | None = None,
) -> dict[str, Place]:
    """A place for each job of `queue`, as if every job took what it says is left of it, or `typical_s`.

    >>> places([], [], slots=1, limits={})
    {}
    """
    length_s = TYPICAL_S if typical_s is None else typical_s
    ends = [(_remaining_s(job, length_s), job.tenant_id) for job in attended]
    heapq.heapify(ends)
    running = Counter(tenant_id for _, tenant_id in ends)
    found: dict[str, Place] = {}
    waiting, now_s = list(queue), 0.0
    while waiting:
        job = next((j for j in waiting if _may_start(j, running, slots, limits)), None)
        if job is not None:
            waiting.remove(job)
            running[job.tenant_id] += 1
            heapq.heappush(ends, (now_s + _remaining_s(job, length_s), job.tenant_id))
            found[job.id] = Place(len(found) + 1, now_s)
        elif ends:
            now_s, ended = heapq.heappop(ends)
            running[ended] -= 1
        else:  # a limit of no jobs at all
            break
    return found


def _may_start(job: JobRecord, running: Counter[str], slots: int, limits: Mapping[str, int | None]) -> bool:
    limit = limits.get(job.tenant_id)
    return running.total() < slots and (limit is None or running[job.tenant_id] < limit)


def _remaining_s(job: JobRecord, typical_s: float) -> float:
    return typical_s if job.eta_s is None else job.eta_s

"""Who is next, and when: the order of the queue, limits per tenant, and a guess at each start."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

TYPICAL_S = 600.0  # of a job of which nothing is known, where none has ended yet


class Queued(Protocol):
    """What is looked at of a job that may start."""

    @property
    def tenant_id(self) -> str: ...


class Waiting(Queued, Protocol):
    """What is looked at to guess when."""

    @property
    def id(self) -> str: ...
    @property
    def eta_s(self) -> float | None: ...


Q = TypeVar("Q", bound=Queued)


@dataclass(frozen=True)
class Place:
    """Where a queued job stands: 1 = next. `starts_in_s` is a guess."""

    position: int
    starts_in_s: float


def startable(
    queue: Iterable[Q],
    attended: Iterable[Queued],
    *,
    slots: int,
    limits: Mapping[str, int | None],
) -> list[Q]:
    """Those of `queue` (first in line first) to start now.

    `slots` is how many jobs may run in all, `limits` how many of a tenant. A tenant at its limit
    stands aside: whoever comes behind is not kept waiting by it. `queue` is read no further than needed.
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
    queue: Sequence[Waiting],
    attended: Sequence[Waiting],
    *,
    slots: int,
    limits: Mapping[str, int | None],
    typical_s: float | None = None,
) -> dict[str, Place]:
    """A place for each job of `queue`, as if every job took what it says is left of it, or `typical_s`.

    Whenever a slot is free the first in line starts whose tenant is below its limit. Only the first of each
    tenant can be that one: a line per tenant and a heap of their heads make it n log n.

    >>> places([], [], slots=1, limits={})
    {}
    """
    length_s = TYPICAL_S if typical_s is None else typical_s
    ends = [(_remaining_s(job, length_s), job.tenant_id) for job in attended]
    heapq.heapify(ends)
    running = Counter(tenant_id for _, tenant_id in ends)
    lines: dict[str, deque[tuple[int, Waiting]]] = defaultdict(deque)
    for number, job in enumerate(queue):
        lines[job.tenant_id].append((number, job))
    heads: list[tuple[int, str]] = []  # of the tenants that may start one more: (place in `queue`, tenant)

    def step_up(tenant_id: str) -> None:
        limit = limits.get(tenant_id)
        if lines[tenant_id] and (limit is None or running[tenant_id] < limit):
            heapq.heappush(heads, (lines[tenant_id][0][0], tenant_id))

    for tenant_id in list(lines):
        step_up(tenant_id)
    found: dict[str, Place] = {}
    now_s = 0.0
    while len(found) < len(queue):
        if heads and len(ends) < slots:  # all that run have an end
            _, tenant_id = heapq.heappop(heads)
            _, job = lines[tenant_id].popleft()
            running[tenant_id] += 1
            heapq.heappush(ends, (now_s + _remaining_s(job, length_s), tenant_id))
            found[job.id] = Place(len(found) + 1, now_s)
            step_up(tenant_id)
        elif ends:
            now_s, ended = heapq.heappop(ends)
            running[ended] -= 1
            limit = limits.get(ended)
            if limit is not None and running[ended] == limit - 1:  # it stood aside until now
                step_up(ended)
        else:  # a limit of no jobs at all
            break
    return found


def _remaining_s(job: Waiting, typical_s: float) -> float:
    return typical_s if job.eta_s is None else job.eta_s

"""One share of a step's time, and the links that bytes take."""

from __future__ import annotations

from dataclasses import dataclass

from modeseek_ray.jobs.hardware import Hardware


@dataclass(frozen=True)
class TimePart:
    """One share of a step's time."""

    name: str
    seconds: float
    formula: str


def link(on: Hardware, devices: int) -> float:
    """Bytes/s that the slowest step of a ring over so many devices moves."""
    inside = devices <= on.devices_per_node
    return (on.link_bandwidth if inside else on.network_bandwidth) * on.bandwidth_efficiency

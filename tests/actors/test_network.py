"""Ports that stay free until what shall listen there is ready. Addresses: tests/actors/test_nodes.py."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from actors import network, ray_head


def test_ports_differ_and_are_none_that_the_kernel_lends_to_connections() -> None:
    lent = network._EPHEMERAL_RANGE
    first_lent = int(lent.read_text().split()[0]) if lent.exists() else 32_768
    found = network.free_ports(50)
    assert len(set(found)) == 50
    assert all(network._FIRST_PORT <= port < first_lent for port in found)


def test_ports_are_none_that_ray_gives_to_its_workers() -> None:
    """It refuses to start where one of them is the head's."""
    assert ray_head.LAST_WORKER_PORT < network._FIRST_PORT


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        taken, other = holder.getsockname()[1], network.free_port()
        monkeypatch.setattr(network.random.SystemRandom, "sample", lambda *_: [taken, other])
        assert network.free_port() == other
        monkeypatch.setattr(network.random.SystemRandom, "sample", lambda *_: [taken])
        with pytest.raises(OSError, match="no 1 free TCP ports between 30000 and"):
            network.free_port()


def test_where_connections_may_take_every_port_the_kernel_chooses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "range").write_text("1024\t65535\n")
    monkeypatch.setattr(network, "_EPHEMERAL_RANGE", tmp_path / "range")
    assert len(set(network.free_ports(3))) == 3

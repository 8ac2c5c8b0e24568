"""Addresses and ports of this machine: by which one others reach it, which interface holds it, what is free."""

from __future__ import annotations

import ipaddress
import random
import socket
from contextlib import ExitStack
from pathlib import Path

import psutil

from modeseek_ray.errors import ConfigError

_FIRST_PORT = 30_000  # workers listen below: Ray's own choice, and that of `ray_head`
_EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_ports(count: int) -> list[int]:
    """Different TCP ports nobody listens on at this moment.

    They lie below those that the kernel lends to outgoing connections. What is to listen here may need
    half a minute to be imported, and a port out of the kernel's range would be another's by then.
    """
    first_ephemeral = int(_EPHEMERAL_RANGE.read_text().split()[0]) if _EPHEMERAL_RANGE.exists() else 32_768
    with ExitStack() as held:
        if first_ephemeral - _FIRST_PORT < 1_000:  # an operator has widened that range
            candidates = [0] * count
        else:  # from the system's entropy: processes with one seed must not draw the same
            candidates = random.SystemRandom().sample(range(_FIRST_PORT, first_ephemeral), 1_000)
        found: list[int] = []
        for port in candidates:
            listener = held.enter_context(socket.socket())
            try:
                listener.bind(("", port))
            except OSError:
                continue
            found.append(int(listener.getsockname()[1]))
            if len(found) == count:
                return found
    raise OSError(f"no {count} free TCP ports between {_FIRST_PORT} and {first_ephemeral}")


def free_port() -> int:
    """See `free_ports`."""
    return free_ports(1)[0]


def address_towards(host: str) -> str:
    """The address of this machine that `host` sees. Nothing is sent. Raises `OSError` where no route leads there.

    >>> address_towards("127.0.0.1")
    '127.0.0.1'
    """
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def own_addresses() -> dict[str, str]:
    """Every address of this machine -> the name of its interface."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        held.address.split("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for held in addresses
        if held.family in families
    }


def interface_towards(host: str) -> str | None:
    """The interface that holds `address_towards(host)`; None where that cannot be told.

    gloo asks for the address of this machine's *name* otherwise, and takes loopback where that fails:
    ranks on two nodes then wait for each other for ever.
    """
    try:
        address = address_towards(host)
    except OSError:
        return None
    if ipaddress.ip_address(address).is_loopback:  # 127.0.0.2 is held by lo, which lists 127.0.0.1 alone
        address = "127.0.0.1" if ":" not in address else address
    return own_addresses().get(address)


def is_own(host: str) -> bool:
    """Whether a name or an address means this machine. A name that cannot be resolved does not."""
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = own_addresses()
    return any(address in own or ipaddress.ip_address(address).is_loopback for address in found)


def url_for_drivers(host: str, port: int, cluster: str | None, advertised: str | None) -> str:
    """What drivers are told to call: `advertised`, or the address of this machine that the cluster sees.

    `host` and `port` are listened on; `cluster` is the host of Ray's dashboard, None = a head of our own.
    Raises `ConfigError` for a service that listens on loopback and a cluster that is elsewhere.
    """
    if advertised:
        return advertised.rstrip("/")
    unspecified = host in ("0.0.0.0", "::", "")
    if cluster is None or is_own(cluster):
        return _url("127.0.0.1" if unspecified else host, port)
    if not unspecified and host != "localhost" and not ipaddress.ip_address(host).is_loopback:
        return _url(host, port)
    if unspecified:
        try:
            return _url(address_towards(cluster), port)
        except OSError:
            pass
    raise ConfigError(
        f"drivers will run at {cluster}, and cannot call {host}:{port} from there.",
        param="--host",
        mend="Listen on an address of this machine (--host 0.0.0.0, with keys), or say in MODESEEK_ADVERTISE_URL"
        " by which URL the cluster reaches this service.",
    )


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

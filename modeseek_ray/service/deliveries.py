"""Tells webhook endpoints what is in the outbox: signed, one address at a time, again until it is confirmed.

The URL is a user's, and this process can reach what users cannot. So the name is resolved here, every
address it leads to must be public (or in a network the operator named), and the connection goes to
that very address: a name that answers differently the second time gains nothing. Redirects are not
followed and answers are not read.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import logging
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.errors import NotFoundError
from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.webhook_store import DeliveryRecord, EndpointRecord, event_body

log = logging.getLogger(__name__)

POLL_S = 1.0
TIMEOUT_S = 10.0
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class WebhookError(ModeseekError):
    """An endpoint's URL is not one that we may or can send to."""

    code = "webhook_not_allowed"
    http_status = 400


class Deliveries:
    """`run()` is a task of the service. Several services may share a store: each event is claimed first."""

    def __init__(self, store: Store, networks: Sequence[str] = ()) -> None:
        self._store = store
        self._networks = parse_networks(networks)

    async def run(self) -> None:
        """Until cancelled. What a crash cuts off is due again when its claim has run out."""
        while True:
            try:
                due = await asyncio.to_thread(self._store.webhooks.claim)
                await asyncio.gather(*(self._deliver(delivery) for delivery in due))
            except Exception:
                log.exception("webhooks could not be delivered; trying again")
            await asyncio.sleep(POLL_S)

    async def _deliver(self, delivery: DeliveryRecord) -> None:
        try:
            endpoint = await asyncio.to_thread(self._store.webhooks.get, delivery.endpoint_id)
        except NotFoundError:  # deleted since
            return
        problem: str | None = None
        try:
            status = await send(endpoint, delivery.event_id, event_body(delivery), self._networks)
            if not 200 <= status < 300:
                problem = f"it answered {status}"
        except WebhookError as error:
            problem = error.message
        except (httpx.HTTPError, OSError) as error:
            problem = f"no answer: {error or type(error).__name__}"
        if problem is not None:
            log.warning("webhook %s to %s: %s", delivery.event_id, delivery.endpoint_id, problem)
        await asyncio.to_thread(self._store.webhooks.report, delivery, problem)


async def send(endpoint: EndpointRecord, event_id: str, body: str, networks: Sequence[Network]) -> int:
    """POST one event and return the status. Raises `WebhookError`, `httpx.HTTPError` or `OSError`."""
    url = urlsplit(endpoint.url)
    address = await resolve(endpoint.url, networks)
    port = url.port or (443 if url.scheme == "https" else 80)
    host = f"[{address}]" if address.version == 6 else str(address)
    target = f"{url.scheme}://{host}:{port}{url.path or '/'}{f'?{url.query}' if url.query else ''}"
    headers = {
        "Host": url.netloc.rpartition("@")[2],
        "Content-Type": "application/json",
        "User-Agent": "modeseek-webhooks",
        **signature(endpoint.signing_secrets(time.time()), event_id, int(time.time()), body),
    }
    async with httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, follow_redirects=False) as client:
        # The certificate is checked against the name, though we connect to the address.
        extensions = {"sni_hostname": url.hostname}
        request = client.build_request("POST", target, content=body, headers=headers, extensions=extensions)
        response = await client.send(request, stream=True)
        await response.aclose()
    return response.status_code


def signature(secrets: Sequence[str], event_id: str, timestamp: int, body: str) -> dict[str, str]:
    """The headers of the Standard Webhooks specification, as OpenAI's clients verify them."""
    signed = f"{event_id}.{timestamp}.{body}".encode()
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    digests = [base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in keys]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{digest}" for digest in digests),
    }


async def resolve(url: str, networks: Sequence[Network]) -> Address:
    """The address to connect to. Raises `WebhookError` unless every one the name leads to is allowed."""
    check_url(url)
    parts = urlsplit(url)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise WebhookError(
            f"there is no host {parts.hostname!r}.", param="url", mend="Mend the host name."
        ) from None
    addresses = [_plain(ipaddress.ip_address(entry[4][0])) for entry in found]
    named = all(any(address in network for network in networks) for address in addresses)
    if not named and not all(_is_public(address) for address in addresses):
        raise WebhookError(
            "the host has a private address.",
            param="url",
            mend="Name a public host, or have the operator allow its network (--webhook-network).",
        )
    if not named and parts.scheme != "https":
        raise WebhookError("https is needed to send beyond this network.", param="url", mend="Use https.")
    return addresses[0]


def check_url(url: str) -> None:
    """The form of a URL, before anything is asked of the network. Raises `WebhookError`."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or any(c.isspace() or not c.isprintable() or ord(c) > 126 for c in url) or parts.username:
        raise WebhookError(
            "this is not a URL to send to.", param="url", mend="Write https://host/path, without a password."
        )


def parse_networks(networks: Sequence[str]) -> tuple[Network, ...]:
    """Raises `WebhookError` naming the one that is not a network."""
    try:
        return tuple(ipaddress.ip_network(network) for network in networks)
    except ValueError as error:
        raise WebhookError(f"{error}.", mend="Write networks as 10.0.0.0/8.") from None


def _plain(address: Address) -> Address:
    """An IPv4 address in IPv6's clothes is what it is underneath."""
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (address.sixtofour or address.teredo):
        return False  # carries an IPv4 address that nobody checked
    return address.is_global and not address.is_multicast

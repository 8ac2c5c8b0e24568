"""Webhooks, from the end of a job to the unmodified `openai` client that verifies and unwraps them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest

from modeseek_ray.jobs.store import Store
from modeseek_ray.jobs.webhook_store import CLAIM_S, EVENT_TYPES, RETRIES_S
from modeseek_ray.service.deliveries import Deliveries, WebhookError, parse_networks, resolve

HERE = ("127.0.0.0/8", "::1/128")


@dataclass
class Receiver:
    """A user's web server: keeps what it was sent, answers what it is told to."""

    url: str = ""
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)  # the next ones; then 200


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    inbox = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            inbox.got.append((dict(self.headers), body))
            self.send_response(inbox.answers.pop(0) if inbox.answers else 200)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    inbox.url = f"http://127.0.0.1:{server.server_port}/hook?a=1"
    yield inbox
    server.shutdown()
    server.server_close()


def test_a_finished_job_is_told_and_the_openai_client_believes_it(
    start_service: Any, receiver: Receiver, until: Any
) -> None:
    service = start_service(webhook_networks=HERE)
    client = service.openai()
    hook = client.webhooks.create(name="mine", url=receiver.url, event_types=list(EVENT_TYPES))
    job_id = service.submit()
    client.fine_tuning.jobs.cancel(job_id)
    until(lambda: receiver.got)
    headers, body = receiver.got[0]
    event = client.webhooks.unwrap(body, headers, secret=hook.signing_secret)
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", job_id)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"ftjob", b"xtjob"), headers, secret=hook.signing_secret)
    until(lambda: service.store.webhooks.deliveries(hook.id)[0].delivered_at)


def test_endpoints_are_managed_as_openais_client_does(start_service: Any, receiver: Receiver) -> None:
    service = start_service(webhook_networks=HERE)
    client = service.openai()
    hook = client.webhooks.create(name="a", url=receiver.url, event_types=["fine_tuning.job.failed"])
    assert hook.signing_secret.startswith("whsec_")
    assert client.webhooks.retrieve(hook.id).signing_secret_hint == f"whsec_…{hook.signing_secret[-4:]}"
    changed = client.webhooks.update(hook.id, name="b", event_types=["fine_tuning.job.succeeded"])
    assert (changed.name, changed.event_types, changed.url) == (
        "b",
        ["fine_tuning.job.succeeded"],
        receiver.url,
    )
    rotated = client.webhooks.rotate_secret(hook.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != hook.signing_secret
    result = client.webhooks.test(hook.id, event_type="fine_tuning.job.failed")
    assert (result.success, result.status_code) == (True, 200)
    headers, body = receiver.got[-1]
    for secret in (hook.signing_secret, rotated.signing_secret):  # both sign for a day
        assert client.webhooks.unwrap(body, headers, secret=secret).type == "fine_tuning.job.failed"
    others = [
        client.webhooks.create(name=str(i), url=receiver.url, event_types=["fine_tuning.job.failed"])
        for i in range(3)
    ]
    listed = [endpoint.id for endpoint in client.webhooks.list(limit=2)]
    assert listed == [endpoint.id for endpoint in [*others[::-1], hook]]
    assert client.webhooks.delete(hook.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(hook.id)
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)


@pytest.fixture
def store(tmp_path: Any) -> Iterator[Any]:
    """A store whose clock the test turns: `store.database.clock`."""

    class Clock:
        now = 1_000_000.0

        def __call__(self) -> float:
            return self.now

    store = Store(f"sqlite:///{tmp_path / 's.sqlite3'}", clock=Clock())
    yield store
    store.close()


def end_a_job(store: Store, name: str = "ftjob-1") -> None:
    store.jobs.submit(name, {"model": "m", "training_file": "f"})
    store.jobs.cancel(name)


async def deliver(store: Store, networks: tuple[str, ...] = HERE) -> None:
    """One round of what the service's task does."""
    deliveries = Deliveries(store, networks)
    for delivery in store.webhooks.claim():
        await deliveries._deliver(delivery)


async def test_it_is_told_again_with_longer_waits_until_it_answers(store: Any, receiver: Receiver) -> None:
    clock = store.database.clock
    hook = store.webhooks.create("default", "mine", receiver.url, ["fine_tuning.job.cancelled"])
    end_a_job(store)
    receiver.answers = [500, 302, 404]
    for number, wait_s in enumerate(RETRIES_S[:3], start=1):
        await deliver(store)
        assert len(receiver.got) == number
        clock.now += wait_s - 1
        await deliver(store)
        assert len(receiver.got) == number  # not yet
        clock.now += 1
    [waiting] = store.webhooks.deliveries(hook.id)
    assert (waiting.tries, waiting.problem, waiting.delivered_at) == (3, "it answered 404", None)
    await deliver(store)
    [done] = store.webhooks.deliveries(hook.id)
    assert (done.tries, done.problem, done.delivered_at, done.next_at) == (4, None, clock.now, None)
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1  # a repetition can be told
    assert {path for path in (headers.get("Host") for headers, _ in receiver.got)} == {
        receiver.url.split("/")[2]
    }


async def test_a_silent_endpoint_is_given_up_in_the_end(store: Any) -> None:
    clock = store.database.clock
    hook = store.webhooks.create("default", "gone", "http://127.0.0.1:9/", ["fine_tuning.job.cancelled"])
    end_a_job(store)
    for wait_s in RETRIES_S:
        await deliver(store)
        clock.now += wait_s
    await deliver(store)
    [last] = store.webhooks.deliveries(hook.id)
    assert (last.tries, last.next_at, last.delivered_at) == (len(RETRIES_S) + 1, None, None)
    assert last.problem is not None and "no answer" in last.problem


def test_a_crash_in_the_middle_of_a_delivery_delays_it_and_no_more(store: Any) -> None:
    store.webhooks.create("default", "mine", "https://example.org/", ["fine_tuning.job.cancelled"])
    end_a_job(store)
    assert len(store.webhooks.claim()) == 1
    assert store.webhooks.claim() == []  # another service has it
    store.database.clock.now += CLAIM_S
    assert len(store.webhooks.claim()) == 1


def test_only_the_tenants_own_ends_of_the_asked_kind_are_told(store: Any) -> None:
    store.keys.create("k", tenant_id="other")
    wants = store.webhooks.create("default", "a", "https://a.org/", ["fine_tuning.job.cancelled"])
    kind = store.webhooks.create("default", "b", "https://b.org/", ["fine_tuning.job.succeeded"])
    theirs = store.webhooks.create("other", "c", "https://c.org/", ["fine_tuning.job.cancelled"])
    deleted = store.webhooks.create("default", "d", "https://d.org/", ["fine_tuning.job.cancelled"])
    store.webhooks.delete(deleted.id, "default")
    end_a_job(store)
    counts = [len(store.webhooks.deliveries(hook.id)) for hook in (wants, kind, theirs, deleted)]
    assert counts == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/", "https://[::1]/", "https://localhost:8420/", "https://10.1.2.3/", "https://192.168.0.1/",
        "https://169.254.169.254/latest/meta-data", "https://[::ffff:127.0.0.1]/", "https://0.0.0.0/",
        "https://100.64.0.1/", "https://[fe80::1]/", "https://2130706433/", "https://[2002:7f00:1::]/",
        "https://224.0.0.1/", "http://8.8.8.8/", "ftp://8.8.8.8/", "https://u:p@8.8.8.8/", "https://8.8.8.8:0/",
        "https://8.8.8.8:99999/", "https://x y/", "https:///x", "https://no-such-host.invalid/", "file:///etc/passwd",
    ],
)  # fmt: skip
async def test_what_is_not_public_is_not_sent_to(url: str) -> None:
    with pytest.raises(WebhookError):
        await resolve(url, ())


async def test_public_addresses_and_named_networks_are() -> None:
    assert str(await resolve("https://8.8.8.8/x", ())) == "8.8.8.8"
    assert str(await resolve("http://10.1.2.3/x", parse_networks(["10.0.0.0/8"]))) == "10.1.2.3"
    with pytest.raises(WebhookError, match="private"):
        await resolve("https://192.168.0.1/", parse_networks(["10.0.0.0/8"]))
    with pytest.raises(WebhookError):
        parse_networks(["10.0.0.0/99"])


async def test_a_name_that_has_moved_to_a_private_address_gets_nothing(
    store: Any, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Public when it was registered, this machine when it is told: the address is looked at each time."""
    url = receiver.url.replace("127.0.0.1", "moved.example").replace("http:", "https:")
    hook = store.webhooks.create("default", "moved", url, ["fine_tuning.job.cancelled"])
    end_a_job(store)

    async def lookup(*_: Any, **__: Any) -> Any:
        return [(2, 1, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    await deliver(store, networks=())
    [told] = store.webhooks.deliveries(hook.id)
    assert (receiver.got, told.problem) == ([], "the host has a private address.")


def test_a_private_address_is_refused_when_it_is_registered(service: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        service.openai().webhooks.create(
            name="x", url="https://127.0.0.1/", event_types=["fine_tuning.job.failed"]
        )
    assert (refused.value.code, refused.value.param) == ("webhook_not_allowed", "url")

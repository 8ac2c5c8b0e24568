"""A real service on a real port: uvicorn in a thread, SQLite on disk. Cluster and validation are fakes."""

from __future__ import annotations

import asyncio
import json
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from actors.network import free_port
from modeseek_ray.client import AttemptClient, Client
from modeseek_ray.jobs.engine_keeper import EngineKeeper
from modeseek_ray.jobs.launcher import Capacity, LaunchStatus, ValidationOutcome
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.reconciler import Reconciler, ReconcilerSettings
from modeseek_ray.jobs.store import Store
from modeseek_ray.service import ServiceSettings, create_app
from modeseek_ray.service.serve import listen, make_server

ROWS = b'{"prompt": "one plus one is", "completion": " two"}\n' * 3


@dataclass
class FakeLauncher:
    """A driver "runs" until it is stopped; the test speaks for it with an `AttemptClient`."""

    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)
    statuses: dict[str, LaunchStatus] = field(default_factory=dict)
    has: Capacity | None = None

    async def launch(self, job_id: str, attempt: int, secret_path: Path) -> str:
        self.secrets[job_id] = json.loads(secret_path.read_text())
        self.statuses[f"{job_id}-{attempt}"] = "running"
        return f"{job_id}-{attempt}"

    async def stop(self, submission_id: str) -> None:
        self.statuses[submission_id] = "stopped"

    async def status(self, submission_id: str) -> LaunchStatus:
        return self.statuses.get(submission_id, "unknown")

    async def capacity(self) -> Capacity | None:
        return self.has

    async def logs(self, submission_id: str) -> str | None:
        return f"what {submission_id} printed\n" if submission_id in self.statuses else None


@dataclass
class FakeValidator:
    outcome: ValidationOutcome = field(default_factory=lambda: ValidationOutcome(True, report={"rows": 3}))

    async def validate(self, job_id: str, *, score: bool = False) -> ValidationOutcome:
        return self.outcome


@dataclass
class Running:
    """A service and ways to talk to it."""

    url: str
    home: Home
    store: Store
    launcher: FakeLauncher
    validator: FakeValidator
    model: Path
    reconciler: Reconciler
    app: FastAPI

    def http(self, **options: Any) -> httpx.Client:
        """Every refusal it sees must name a code that the README explains."""
        hooks = {"response": [assert_explained]}
        return httpx.Client(base_url=self.url, trust_env=False, timeout=60, event_hooks=hooks, **options)

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0)

    def client(self, api_key: str | None = None) -> Client:
        return Client(self.url, api_key)

    def upload(self, content: bytes = ROWS, name: str = "train.jsonl", **options: Any) -> str:
        with self.http() as http:
            form: dict[str, Any] = {"files": {"file": (name, content)}, "data": {"purpose": "fine-tune"}}
            answer = http.post("/v1/files", **form, **options)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def body(self, **changes: Any) -> dict[str, Any]:
        return {"model": str(self.model), "training_file": self.upload(), **changes}

    def submit(self, **changes: Any) -> str:
        with self.client() as client:
            return str(client.submit(self.body(**changes))["id"])

    def driver(self, job_id: str) -> AttemptClient:
        """Wait until the job was launched, and speak for its driver."""
        wait_for(lambda: job_id in self.launcher.secrets)
        wait_for(lambda: self.store.jobs.get(job_id).state == "starting")
        secret = self.launcher.secrets[job_id]
        return AttemptClient(
            self.url, job_id, secret["attempt"], token=secret["token"], fence=secret["fence"]
        )

    def finish(self, job_id: str) -> None:
        """Drive the job to its success: two steps, a checkpoint, a model, a result file."""
        asyncio.run(drive_to_success(self, job_id))


@cache
def explained_codes() -> frozenset[str]:
    """The codes in the README's table of errors."""
    text = (Path(__file__).parents[3] / "README.md").read_text()
    table = text[text.index("## Errors") :]
    return frozenset(re.findall(r"^\| `([a-z0-9_]+)` \|", table, flags=re.MULTILINE))


def assert_explained(response: Any) -> None:
    """An answer that is not a success has OpenAI's body and a code that the README explains."""
    if response.status_code >= 400:
        if isinstance(response, httpx.Response):
            response.read()
        error = json.loads(response.content)["error"]
        assert error["code"] in explained_codes(), error
        assert error["message"] and error["type"], error


async def drive_to_success(service: Running, job_id: str) -> None:
    """What a driver says in two steps, and the files it leaves."""
    driver = service.driver(job_id)
    spec = await driver.spec()
    assert Path(spec["files"]["training_file"]).read_bytes()
    assert spec["model_path"] == str(service.model)
    await driver.transition("running")
    await driver.heartbeat(
        {"step": 2, "total_steps": 2, "tokens_per_s": float("nan"), "unknown_to_service": 1}
    )
    events = [
        {"seq": i + 1, "type": "metrics", "message": f"step {2 - i}", "data": {"loss": 2.0 - i}}
        for i in range(2)
    ]
    assert await driver.events(events) == 2
    checkpoint = service.home.checkpoints(job_id) / "step-2"
    checkpoint.mkdir(parents=True)
    await driver.checkpoint(2, str(checkpoint), {"loss": 1.0})
    model = service.home.model(job_id)
    for file in service.model.iterdir():
        model.mkdir(exist_ok=True)
        (model / file.name).write_bytes(file.read_bytes())
    service.home.results(job_id).mkdir()
    service.home.metrics_csv(job_id).write_text("step,loss\n1,2.0\n")
    results = {
        "fine_tuned_model_path": str(model),
        "result_files": [str(service.home.metrics_csv(job_id))],
        "trained_tokens": 123,
        "hyperparameters": {"batch_size": 3, "epochs": 2},
    }
    await driver.transition("succeeded", results=results)
    await driver.transition("succeeded", results=results)  # the answer was lost; said again
    await driver.close()


def wait_for(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def write_model(path: Path, **config: Any) -> Path:
    """A directory that looks like a model to everything that does not load it: 20 parameters in float32."""
    path.mkdir(parents=True)
    settings = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 4,
        "num_hidden_layers": 1,
        "hidden_size": 5,
        "max_position_embeddings": 64,
        **config,
    }
    (path / "config.json").write_text(json.dumps(settings))
    (path / "tokenizer.json").write_text("{}")
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    header = json.dumps({"w": {"dtype": "F32", "shape": [4, 5], "data_offsets": [0, 80]}}).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(80))
    return path


@contextmanager
def serving(
    directory: Path,
    *,
    port: int,
    store_url: str | None = None,
    engines: Callable[[Store, Home, str], EngineKeeper] | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """A service over `directory` until the block ends. `engines`: who starts inference engines; None = nobody."""
    home = Home(directory / "home")
    home.prepare()
    model = directory / "models" / "base"
    if not model.exists():
        write_model(model)
    store = Store(store_url or home.store_url)
    launcher, validator = FakeLauncher(), FakeValidator()
    quick = ReconcilerSettings(
        max_running_jobs=4, pass_every_s=0.1, cancel_grace_s=0.5, stop_timeout_s=0.5, status_every_s=0.2
    )
    url = f"http://127.0.0.1:{port}"
    keeper = None if engines is None else engines(store, home, url)
    reconciler = Reconciler(store, home, launcher, validator, url=url, settings=quick, engines=keeper)
    options = ServiceSettings(**{"roots": (directory / "models", directory / "data"), **settings})
    app = create_app(home, store, reconciler=reconciler, validator=validator, settings=options)
    server = make_server(app, port=port)
    with listen("127.0.0.1", port) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield Running(url, home, store, launcher, validator, model, reconciler, app)
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            store.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, free_port_of_module: int) -> Iterator[Running]:
    """One service for a test file, without keys."""
    directory = tmp_path_factory.mktemp("service")
    with serving(directory, port=free_port_of_module) as running:
        yield running


@pytest.fixture(scope="module")
def free_port_of_module() -> int:
    return free_port()


@pytest.fixture
def start_service(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Callable[..., Running]]:
    """Start a service of the test's own, with its own settings."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(serving(tmp_path, port=free_port(), **settings))


@pytest.fixture
def until() -> Callable[..., None]:
    return wait_for


@pytest.fixture
def make_model() -> Callable[..., Path]:
    return write_model

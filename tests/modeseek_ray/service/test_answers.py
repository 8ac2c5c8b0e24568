"""Asking a model by the unmodified `openai` client: real service, real engine processes, a writer of letters."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from typer.testing import CliRunner

from actors import main
from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.engine_keeper import EngineKeeper, EngineSettings
from modeseek_ray.jobs.launcher import LaunchStatus
from tests.modeseek_ray.service.conftest import Running, wait_for

ROOT = Path(__file__).parents[3]
IS_WANTED = {
    "type": "string_check",
    "name": "equals",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.wanted }}",
    "operation": "eq",
}


@dataclass
class Processes:
    """`EngineLauncher` whose cluster are processes of this machine."""

    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    full: bool = False
    waiting: list[str] = field(default_factory=list)

    async def launch_engine(self, engine_id: str, secret_path: Path, *, cpus: float, gpus: float) -> str:
        if self.full:
            self.waiting.append(engine_id)
            return engine_id
        command = [sys.executable, "-m", "tests.modeseek_ray.service.fake_engine", str(secret_path)]
        self.running[engine_id] = subprocess.Popen(command, cwd=ROOT)
        return engine_id

    async def stop(self, submission_id: str) -> None:
        if submission_id in self.running:
            self.running[submission_id].terminate()

    async def status(self, submission_id: str) -> LaunchStatus:
        if submission_id in self.waiting:
            return "pending"
        if submission_id not in self.running:
            return "unknown"
        code = self.running[submission_id].poll()
        return "running" if code is None else "succeeded" if code == 0 else "failed"

    def alive(self) -> list[str]:
        return [name for name, process in self.running.items() if process.poll() is None]

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def cluster() -> Iterator[Processes]:
    processes = Processes()
    yield processes
    processes.end()


@pytest.fixture
def begin(
    start_service: Callable[..., Running], cluster: Processes, tiny_dense: Path, tmp_path: Path
) -> Callable[..., Running]:
    """Start a service that may ask models; keywords are its `EngineSettings`. `tiny` and `other` are models."""

    def begin(**settings: Any) -> Running:
        for name in ("tiny", "other"):
            if not (tmp_path / "models" / name).exists():
                shutil.copytree(tiny_dense, tmp_path / "models" / name)
        options = EngineSettings(**{"status_every_s": 0.1, "wait_s": 60.0, **settings})
        return start_service(
            engines=lambda store, home, url: EngineKeeper(store, home, cluster, url=url, settings=options)
        )

    return begin


def model(running: Running, name: str = "tiny") -> str:
    return str(running.model.parent / name)


def engines_of(running: Running) -> list[tuple[str, str]]:
    return [(Path(engine.model_path).name, engine.state) for engine in running.store.engines.living()]


def test_completions_chats_streams_and_the_best_of_several(begin: Callable[..., Running]) -> None:
    """One engine serves it all, started by the first question."""
    running = begin()
    client = running.openai()
    name = model(running)

    one = client.completions.create(model=name, prompt="ab", max_tokens=3, seed=1)
    [choice] = one.choices
    assert choice.text == choice.text[0] * 3 and choice.finish_reason == "length" and choice.logprobs is None
    assert one.usage is not None and one.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
    }
    assert client.completions.create(model=name, prompt="ab", max_tokens=3, seed=1).choices == one.choices

    # Several prompts, as texts and as tokens: their answers in order, and the same seeds for all of them.
    several = client.completions.create(model=name, prompt=["a", "bc"], n=2, max_tokens=1, seed=1, logprobs=1)
    tokens = client.completions.create(model=name, prompt=[[70], [71, 72]], n=2, max_tokens=1, seed=1)
    assert [c.text for c in several.choices] == [c.text for c in tokens.choices]
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    logprobs = several.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens == [several.choices[0].text]
    assert logprobs.top_logprobs == [{several.choices[0].text: -0.5}] and logprobs.text_offset == [0]

    # Without a grader the likeliest are returned: in this writer, the first letters of the alphabet.
    every = client.completions.create(model=name, prompt="a", n=8, max_tokens=2, seed=3)
    best = client.completions.create(model=name, prompt="a", n=3, best_of=8, max_tokens=2, seed=3)
    assert [c.text for c in best.choices] == sorted(c.text for c in every.choices)[:3]
    assert best.usage is not None and best.usage.completion_tokens == 16

    # With one, those with the highest reward, and all rewards are told.
    wanted = every.choices[5].text
    graded = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": "a"}],
        n=2,
        max_completion_tokens=2,
        seed=3,
        extra_body={"best_of": 8, "grader": IS_WANTED, "item": {"wanted": wanted}},
    )
    assert graded.choices[0].message.content == wanted and graded.choices[0].reward == 1.0  # type: ignore[attr-defined]
    assert graded.rewards == [[float(c.text == wanted) for c in every.choices]]  # type: ignore[attr-defined]

    chat = client.chat.completions.create(
        model=name,
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ],
        max_tokens=4,
        seed=5,
        logprobs=True,
        top_logprobs=1,
    )
    text = chat.choices[0].message.content
    assert text is not None and len(text) == 4 and chat.choices[0].logprobs is not None
    assert [t.token for t in chat.choices[0].logprobs.content or []] == list(text)
    # <|system|>s<|end|><|user|>a<|end|><|assistant|>
    assert chat.usage is not None and chat.usage.prompt_tokens == 7

    pieces = list(
        client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "a"}],
            max_tokens=4,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for p in pieces for c in p.choices) == text
    assert [c.finish_reason for p in pieces for c in p.choices][-1] == "length"
    assert (
        pieces[-1].choices == [] and pieces[-1].usage is not None and pieces[-1].usage.completion_tokens == 4
    )

    texts = ["", ""]
    for piece in client.completions.create(model=name, prompt="a", n=2, max_tokens=3, seed=3, stream=True):
        for part in piece.choices:
            texts[part.index] += part.text
    assert texts == [c.text[0] * 3 for c in every.choices[:2]]

    assert engines_of(running) == [("tiny", "ready")]
    with running.http() as http:
        figures = http.get("/metrics").text
    assert 'modeseek_engines{state="ready"} 1.0' in figures
    assert 'modeseek_answer_tokens_total{kind="completion"}' in figures
    assert "modeseek_engine_wait_seconds_count" in figures


def test_the_command_line_asks_grades_and_says_what_is_wrong(
    begin: Callable[..., Running], tmp_path: Path
) -> None:
    running = begin()

    def ask(*arguments: str) -> str:
        command = ["ask", model(running), "a", "--url", running.url, *arguments]
        result = CliRunner().invoke(main.app, command)
        if isinstance(result.exception, ModeseekError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    answer = json.loads(ask("--max-tokens", "3", "--seed", "3", "-n", "8", "--json"))
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert ask("--max-tokens", "3", "--seed", "3").split() == texts[:1]
    assert ask("--max-tokens", "3", "--seed", "3", "--best-of", "8").split() == [min(texts)]
    assert len(ask("--completion", "--max-tokens", "4").strip()) == 4

    grader = tmp_path / "grader.yaml"
    grader.write_text(yaml.safe_dump({"grader": IS_WANTED}))
    item = json.dumps({"wanted": texts[5]})
    graded = ask(
        "--max-tokens", "3", "--seed", "3", "--best-of", "8", "--grader", str(grader), "--item", item
    )
    mean = texts.count(texts[5]) / 8
    assert graded.splitlines() == ["reward 1", texts[5], f"8 answers graded, mean reward {mean:.3g}"]

    with pytest.raises(ModeseekError, match="item"):
        ask("--grader", str(grader))
    with pytest.raises(ModeseekError, match="not JSON"):
        ask("--grader", str(grader), "--item", "wanted: a")
    with pytest.raises(ModeseekError) as refused:
        ask("--max-tokens", "1000")
    assert refused.value.code == "context_length_exceeded"


def test_what_cannot_be_answered_is_refused_with_its_field_and_starts_nothing(
    begin: Callable[..., Running], cluster: Processes
) -> None:
    running = begin()
    name = model(running)
    chat = {"model": name, "messages": [{"role": "user", "content": "a"}]}
    plain = {"model": name, "prompt": "a"}

    def refusal(path: str, **body: Any) -> tuple[int, str, str]:
        with running.http() as http:
            answer = http.post(f"/v1/{path}", json=body)
        error = answer.json()["error"]
        return answer.status_code, error["param"], error["code"]

    bad = "invalid_config"
    assert refusal("completions", **plain, echo=True) == (400, "echo", "unsupported_parameter")
    assert refusal("chat/completions", **chat, tools=[{}]) == (400, "tools", "unsupported_parameter")
    json_mode = {"response_format": {"type": "json_object"}}
    assert refusal("chat/completions", **chat, **json_mode) == (
        400,
        "response_format",
        "unsupported_parameter",
    )
    assert refusal("completions", **plain, temprature=1) == (400, "temprature", bad)
    assert refusal("completions", **plain, temperature=2.5) == (400, "temperature", bad)
    assert refusal("completions", **plain, n="2") == (400, "n", bad)
    assert refusal("completions", **plain, stop=[""]) == (400, "stop", bad)
    assert refusal("completions", model=name, prompt=[[1], "a", 2]) == (400, "prompt", bad)
    assert refusal("completions", model=name, prompt="") == (400, "prompt", "invalid_request")
    assert refusal("completions", model=name, prompt=[5000]) == (400, "prompt", "unknown_token")
    assert refusal("completions", **plain, n=3, best_of=2) == (400, "best_of", "invalid_parameter")
    assert refusal("completions", **plain, best_of=2, stream=True) == (400, "stream", "invalid_parameter")
    assert refusal("completions", **plain, item={"a": 1}) == (400, "item", "invalid_parameter")
    assert refusal("completions", **plain, grader=IS_WANTED) == (400, "grader.reference", bad)
    assert refusal("completions", **plain, grader={**IS_WANTED, "operation": "is"})[:2] == (
        400,
        "grader.operation",
    )
    local = {"type": "score_model", "name": "s", "model": "/m", "input": "{{ sample.output_text }}"}
    assert refusal("completions", **plain, grader=local)[0] == 400
    assert refusal("completions", **plain, max_tokens=256) == (400, "prompt", "context_length_exceeded")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    status, param, code = refusal("chat/completions", model=name, messages=image)
    assert (status, code) == (400, bad) and param.startswith("messages.0.content")
    assert refusal("chat/completions", **chat, top_logprobs=2) == (400, "top_logprobs", "invalid_parameter")
    assert refusal("completions", model="ft:none", prompt="a") == (404, "model", "model_not_found")
    assert refusal("completions", model="/etc", prompt="a") == (400, "model", "path_not_allowed")
    # What asks for nothing is no reason to refuse.
    neutral = {"echo": False, "suffix": None, "logit_bias": {}, "best_of": None, "n": 0}
    assert refusal("completions", **plain, **neutral) == (400, "n", bad)
    assert cluster.running == {} and engines_of(running) == []


def test_an_engine_that_is_killed_is_replaced_by_the_next_question(
    begin: Callable[..., Running], cluster: Processes
) -> None:
    running = begin()
    client = running.openai()
    ask = {"model": model(running), "prompt": "a", "max_tokens": 2, "seed": 1}
    before = client.completions.create(**ask).choices
    [first] = cluster.alive()
    os.kill(cluster.running[first].pid, signal.SIGKILL)
    assert client.completions.create(**ask).choices == before
    [second] = cluster.alive()
    assert second != first

    # Killed in the middle of an answer: one that nobody has seen of is written again, ...
    with httpx.Client(base_url=running.url, timeout=60, trust_env=False) as http:
        body = {**ask, "max_tokens": 250, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data:")
            os.kill(cluster.running[second].pid, signal.SIGKILL)
            rest = [line for line in lines if line]
    # ... one that was begun cannot be: the stream ends with the error, not with [DONE].
    assert '"code":"engine_lost"' in rest[-1].replace(" ", "") and "[DONE]" not in rest[-1]
    assert client.completions.create(**ask).choices == before


def test_an_idle_engine_ends_and_a_service_that_comes_back_adopts_a_living_one(
    begin: Callable[..., Running], cluster: Processes, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    from tests.modeseek_ray.service.conftest import serving

    port = free_port()
    begin_settings = EngineSettings(status_every_s=0.1, idle_s=4.0)

    def engines(store: Any, home: Any, url: str) -> EngineKeeper:
        return EngineKeeper(store, home, cluster, url=url, settings=begin_settings)

    shutil.copytree(Path(model(begin())), tmp_path / "again" / "models" / "tiny")
    directory = tmp_path / "again"
    with serving(directory, port=port, engines=engines) as running:
        ask = {"model": model(running), "prompt": "a", "max_tokens": 2, "seed": 1}
        before = running.openai().completions.create(**ask).choices
    [first] = cluster.alive()
    with serving(directory, port=port, engines=engines) as running:
        assert running.openai().completions.create(**ask).choices == before
        assert cluster.alive() == [first]
        wait_for(lambda: cluster.alive() == [])
        wait_for(lambda: engines_of(running) == [])
        assert cluster.running[first].wait() == 0
        record = running.store.engines.get(first)
        assert record is not None and record.outcome == "idle"


def test_the_least_recently_used_engine_makes_room(begin: Callable[..., Running], cluster: Processes) -> None:
    running = begin(max_engines=1)
    client = running.openai()
    client.completions.create(model=model(running, "tiny"), prompt="a", max_tokens=1)
    client.completions.create(model=model(running, "other"), prompt="a", max_tokens=1)
    assert engines_of(running) == [("other", "ready")] and len(cluster.alive()) == 1


def test_an_engine_that_gets_no_room_and_one_that_cannot_start_are_told_apart(
    begin: Callable[..., Running], cluster: Processes, tmp_path: Path, tiny_dense: Path
) -> None:
    running = begin(wait_s=1.0)
    cluster.full = True
    with running.http() as http:
        answer = http.post("/v1/completions", json={"model": model(running), "prompt": "a"})
    assert answer.status_code == 503 and answer.headers["Retry-After"] == "5"
    assert answer.json()["error"]["code"] == "no_resources"
    cluster.full = False

    shutil.copytree(tiny_dense, tmp_path / "models" / "unloadable")
    with running.http() as http:
        for _ in range(60):  # it is said as soon as it is known
            answer = http.post("/v1/completions", json={"model": model(running, "unloadable"), "prompt": "a"})
            if answer.json()["error"]["code"] != "model_starting":
                break
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"
    assert "vLLM does not take this model" in answer.json()["error"]["message"]


def test_models_are_the_tenants_own_and_a_deleted_one_is_not_asked_any_more(
    begin: Callable[..., Running], cluster: Processes
) -> None:
    running = begin()
    keys = {name: running.store.keys.create("k", tenant_id=name)[0] for name in ("ours", "theirs")}
    name = _train(running, keys["ours"])
    ours, theirs = running.openai(keys["ours"]), running.openai(keys["theirs"])
    ask: dict[str, Any] = {"model": name, "prompt": "a", "max_tokens": 1}
    with pytest.raises(openai.NotFoundError) as refused:
        theirs.completions.create(**ask)
    assert refused.value.code == "model_not_found" and cluster.running == {}
    assert ours.completions.create(**ask).choices[0].text
    ours.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        ours.completions.create(**ask)
    wait_for(lambda: cluster.alive() == [])


def _train(running: Running, key: str) -> str:
    """The name of a model that a job of the key's tenant has made."""
    headers = {"Authorization": f"Bearer {key}"}
    with running.client(key) as client:
        body = {"model": model(running), "training_file": running.upload(headers=headers)}
        job_id = str(client.submit(body)["id"])
    made = running.home.model(job_id)
    shutil.copytree(model(running), made)

    async def drive() -> str:
        driver = running.driver(job_id)
        await driver.heartbeat({"step": 1})
        await driver.transition("running")
        results = {"fine_tuned_model_path": str(made), "result_files": [], "trained_tokens": 1}
        ended = await driver.transition("succeeded", results=results)
        await driver.close()
        return str(ended["fine_tuned_model"])

    return asyncio.run(drive())

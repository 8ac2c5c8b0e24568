"""`score_model` against a real server on this machine, and against a stand-in for the classifiers' pool."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from modeseek_ray.errors import ConfigError
from modeseek_ray.rewards import (
    Endpoint,
    Grade,
    GradeItem,
    GraderSection,
    build_grader,
    local_models,
    read_endpoints,
)
from modeseek_ray.rewards.parameters import ScoreModel
from modeseek_ray.rewards.score_model import Conversation

SECTION: TypeAdapter[Any] = TypeAdapter(GraderSection)


class Judge(ThreadingHTTPServer):
    """An OpenAI-compatible judge that does what the answer it is shown tells it to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.under_way = self.most_under_way = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def asked(self, answer: str) -> int:
        return sum(body["messages"][-1]["content"] == answer for _, body, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        order = body["messages"][-1]["content"]
        with self.server.lock:
            self.server.requests.append((self.path, body, dict(self.headers)))
            times = self.server.asked(order)
            self.server.under_way += 1
            self.server.most_under_way = max(self.server.most_under_way, self.server.under_way)
        try:
            self.obey(order, times)
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def obey(self, order: str, times: int) -> None:
        verb, _, value = order.partition(" ")
        match verb:
            case "score":
                self.grade(json.dumps({"steps": [], "result": json.loads(value)}))
            case "slowly":
                time.sleep(0.1)
                self.grade('{"steps": [], "result": 1}')
            case "say":
                self.grade(value)
            case "refuse":
                self.send(200, {"choices": [{"message": {"content": None, "refusal": "I'd rather not"}}]})
            case "break-off":
                self.grade('{"steps": [{"descr', finish_reason="length")
            case "status":
                status, _, said = value.partition(" ")
                self.send(int(status), {"error": said})
            case "redirect":
                self.send(302, {}, location="/elsewhere")
            case "flood":
                self.send(200, {"x": "x" * (1 << 20)})
            case "garble":
                self.send(200, None)
            case "recover" if times == 1:
                self.send(int(value), {"error": "not now"}, retry_after="0")
            case "later" if times == 1:
                self.send(int(value), {"error": "not now"}, retry_after="0.4")
            case "reset" if times == 1:  # a connection that breaks without an answer
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            case "hang" if times == 1:
                time.sleep(1.5)
            case _:
                self.grade('{"steps": [], "result": 0.25}')

    def grade(self, content: str, finish_reason: str = "stop") -> None:
        message = {"role": "assistant", "content": content}
        self.send(200, {"choices": [{"message": message, "finish_reason": finish_reason}]})

    def send(self, status: int, body: Any, **headers: str) -> None:
        content = b"<html>" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[Judge]:
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def section(**more: Any) -> Any:
    fields = {"model": "judge-1", "input": [{"role": "user", "content": "{{ sample.output_text }}"}], **more}
    return SECTION.validate_python({"type": "score_model", **fields})


@pytest.fixture
def grades(judge: Judge) -> Callable[..., Any]:
    """Grade these answers with the judge, listed with these limits."""

    async def ask(texts: Sequence[str], section: Any, **limits: Any) -> list[Grade]:
        endpoint = Endpoint(url=judge.url, models=["judge-1"], **{"first_wait_s": 0.0, **limits})
        items = [GradeItem(text, {"reference": "Paris"}, 1) for text in texts]
        return await build_grader(section, endpoints=[endpoint]).grade(items)

    return ask


async def test_the_judge_is_asked_as_openai_s_is(
    judge: Judge, grades: Callable[..., Any], tmp_path: Path
) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("sk-secret\n")
    asked = section(
        input=[
            {
                "role": "developer",
                "content": [{"type": "input_text", "text": "Reference:"}, "{{ item.reference }}"],
            },
            {"role": "user", "content": "{{ sample.output_text }}"},
        ],
        sampling_params={
            "max_completions_tokens": 99,
            "temperature": 0.5,
            "seed": 1,
            "reasoning_effort": "low",
        },
        base_url=judge.url,
    )
    assert await grades(["score 0.75"], asked, api_key_file=str(key)) == [Grade(0.75)]
    [(path, body, headers)] = judge.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    schema = body.pop("response_format")["json_schema"]
    assert schema["strict"] is True
    assert schema["schema"]["required"] == ["steps", "result"]
    assert body == {
        "model": "judge-1",
        "messages": [
            {"role": "developer", "content": "Reference:\nParis"},
            {"role": "user", "content": "score 0.75"},
        ],
        "max_completion_tokens": 99,
        "temperature": 0.5,
        "seed": 1,
        "reasoning_effort": "low",
    }


async def test_scores_are_cut_to_the_range_and_stay_in_order(grades: Callable[..., Any]) -> None:
    orders = [f"score {n}" for n in (7, -7, 3, 0.5)]
    assert [g.reward for g in await grades(orders, section())] == [1.0, 0.0, 1.0, 0.5]
    assert [g.reward for g in await grades(orders, section(range=[-5, 5]))] == [5.0, -5.0, 3.0, 0.5]


@pytest.mark.parametrize(
    ("order", "error", "times"),
    [
        ("say seven", "the judge wrote 'seven' instead of a result", 1),
        ('say {"score": 1}', "the judge wrote '{\"score\": 1}' instead of a result", 1),
        ('say {"result": true}', "the judge's result is True, not a number", 1),
        ('say {"result": NaN}', "the judge's result is nan, not a number", 1),
        ('say {"result": "0.5"}', "the judge's result is '0.5', not a number", 1),
        ("refuse", "the judge refused: I'd rather not", 1),
        ("break-off", "the judge was cut off; raise sampling_params.max_completions_tokens", 1),
        ("status 400 no", 'the judge gave no answer after 1 attempt(s): HTTP 400: {"error": "no"}', 1),
        ("status 401 bad key sk-x", 'after 1 attempt(s): HTTP 401: {"error": "bad key (the key)"}', 1),
        ("status 503 busy", 'the judge gave no answer after 3 attempt(s): HTTP 503: {"error": "busy"}', 3),
        ("redirect", "after 1 attempt(s): HTTP 302", 1),
        ("flood", "its answer is larger than 1048576 bytes", 1),
        ("garble", "after 3 attempt(s): its answer is not JSON", 3),
    ],
)
async def test_a_sample_without_a_score_says_why(
    judge: Judge, grades: Callable[..., Any], tmp_path: Path, order: str, error: str, times: int
) -> None:
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text("sk-x")
    found = await grades([order, "score 1"], section(), attempts=3, api_key_file=str(key))
    assert error in (found[0].error or "")
    assert found[1] == Grade(1.0)
    assert judge.asked(order) == times
    assert {path for path, _, _ in judge.requests} == {"/v1/chat/completions"}  # nobody followed the redirect


@pytest.mark.parametrize("order", ["recover 500", "recover 429", "reset", "hang"])
async def test_what_may_pass_is_asked_again(judge: Judge, grades: Callable[..., Any], order: str) -> None:
    assert await grades([order], section(), timeout_s=0.5) == [Grade(0.25)]
    assert judge.asked(order) == 2


async def test_waits_grow_with_each_failure(judge: Judge, grades: Callable[..., Any]) -> None:
    started = time.monotonic()
    await grades(["status 500"], section(), attempts=4, first_wait_s=0.1)
    assert time.monotonic() - started >= 0.75 * (0.1 + 0.2 + 0.4)


async def test_a_judge_that_says_when_to_come_back_is_obeyed(grades: Callable[..., Any]) -> None:
    started = time.monotonic()
    assert await grades(["later 429"], section()) == [Grade(0.25)]
    assert time.monotonic() - started >= 0.4


async def test_no_more_requests_at_once_than_allowed(judge: Judge, grades: Callable[..., Any]) -> None:
    found = await grades([f"slowly {n}" for n in range(9)], section(), max_concurrency=3)
    assert found == [Grade(1.0)] * 9
    assert judge.most_under_way == 3


async def test_a_judge_that_is_down_is_not_asked_for_every_sample(
    judge: Judge, grades: Callable[..., Any]
) -> None:
    found = await grades([f"status 500 {n}" for n in range(10)], section(), max_concurrency=1, attempts=2)
    assert len(judge.requests) == 3 * 2
    assert found[9].error == "not asked: the judge failed 3 samples in a row"

    now_and_then = ["status 500 a", "status 500 b", "score 1"] * 3
    found = await grades(now_and_then, section(), max_concurrency=1, attempts=1)
    assert [grade.reward for grade in found] == [None, None, 1.0] * 3

    nobody = Endpoint(url="http://127.0.0.1:1/v1", models=["judge-1"], attempts=1)
    [grade] = await build_grader(section(), endpoints=[nobody]).grade([GradeItem("x", {}, 1)])
    assert "ConnectError" in (grade.error or "")


async def test_an_answer_without_what_the_judge_should_see_gets_the_lowest_score(
    judge: Judge, grades: Callable[..., Any]
) -> None:
    asked = section(input=[{"role": "user", "content": "score {{ sample.output_json.x }}"}], range=[-1, 1])
    assert await grades(["no JSON", '{"x": 0.5}'], asked) == [Grade(-1.0), Grade(0.5)]
    assert len(judge.requests) == 1


ALLOWED = "https://judge.example/v1"


@pytest.mark.parametrize(
    ("base_url", "allowed"),
    [
        ("https://judge.example/v1", True),
        ("https://judge.example/v1/", True),
        ("https://JUDGE.example:443/v1/team-a", True),
        ("http://judge.example/v1", False),
        ("https://judge.example:8443/v1", False),
        ("https://judge.example/v10", False),
        ("https://judge.example/", False),
        ("https://judge.example.evil.com/v1", False),
        ("https://evil.com/judge.example/v1", False),
        ("https://judge.example@evil.com/v1", None),
        ("https://judge.example/v1/../admin", None),
        ("https://judge.example/v1/%2e%2e/admin", None),
        ("https://judge.example\\@evil.com/v1", None),
        ("https://judge.example/v1?x=1", None),
        ("https://judge.example/v1#", None),
        ("file:///etc/passwd", None),
        ("//judge.example/v1", None),
        ("https://judge.example:99999/v1", None),
    ],
)
def test_only_what_the_operator_lists_is_reached(base_url: str, allowed: bool | None) -> None:
    """None: not even a URL that could be compared."""
    asked = section(base_url=base_url)
    if allowed:
        assert local_models(asked, endpoints=[Endpoint(url=ALLOWED)]) == []
        return
    with pytest.raises(ConfigError) as caught:
        local_models(asked, endpoints=[Endpoint(url=ALLOWED)], param="method.online.grader")
    assert caught.value.param == "method.online.grader.base_url"
    assert ("not among the endpoints" in caught.value.message) == (allowed is False)
    with pytest.raises(ConfigError):
        build_grader(asked, endpoints=[Endpoint(url=ALLOWED)])


def test_where_a_model_is_looked_for() -> None:
    endpoint = Endpoint(url=ALLOWED, models=["judge-1"])
    multi = SECTION.validate_python(
        {
            "type": "multi",
            "graders": {"a": section().model_dump(), "b": section(model="/models/reward").model_dump()},
            "calculate_output": "a + b",
        }
    )
    [(path, wanted)] = local_models(multi, endpoints=[endpoint])
    assert (path, wanted.model) == ("grader.graders.b", "/models/reward")
    assert [path for path, _ in local_models(multi)] == ["grader.graders.a", "grader.graders.b"]
    assert local_models(section(label="good"), endpoints=[endpoint]) != []  # labels are a classifier's
    with pytest.raises(ConfigError, match=r"grader.graders.b.model: '/models/reward' is no model of"):
        build_grader(multi, endpoints=[endpoint])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"range": [1, 1]}, "range must be"),
        ({"range": [0, float("inf")]}, "finite"),
        ({"input": []}, "at least 1"),
        ({"input": [{"role": "tool", "content": "x"}]}, "'user', 'assistant', 'system' or 'developer'"),
        (
            {"input": [{"role": "user", "content": {"type": "input_image", "image_url": "x"}}]},
            "input_image is not offered",
        ),
        ({"input": [{"role": "user", "content": "{{ x }}"}]}, "'x' is unknown"),
        ({"label": "good", "base_url": ALLOWED}, "drop one of them"),
        ({"sampling_params": {"max_tokens": 5}}, "not permitted"),
    ],
)
def test_what_is_wrong_is_refused(more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        section(**more)


def test_the_operator_s_list(tmp_path: Path) -> None:
    path = tmp_path / "endpoints.yaml"
    assert read_endpoints(path) == ()  # nobody is allowed where there is no list
    path.write_text(
        "endpoints:\n- url: https://judge.example/v1\n  models: [judge-1]\n  max_concurrency: 4\n"
    )
    assert read_endpoints(path) == (
        Endpoint(url="https://judge.example/v1", models=["judge-1"], max_concurrency=4),
    )
    for text, said in (
        ("endpoints:\n- url: judge.example/v1\n", "endpoints.0.url"),
        ("endpoints:\n- url: https://a:b@judge.example\n", "not a plain URL"),
        ("endpoints:\n- uri: x\n", "endpoints.0"),
        ("", "valid dictionary"),
        ("a: [", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_endpoints(path)
        assert caught.value.file == str(path)
        assert said in f"{caught.value.param}: {caught.value.message}"


async def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("sk-secret")
    key.chmod(0o640)
    endpoint = Endpoint(url=ALLOWED, models=["judge-1"], api_key_file=str(key))
    with pytest.raises(ConfigError, match="can be read by others") as caught:
        await build_grader(section(), endpoints=[endpoint]).grade([GradeItem("x", {}, 1)])
    assert "sk-secret" not in str(caught.value)


async def test_a_classifier_s_scores_are_cut_only_where_a_range_is_given() -> None:
    class Pool:
        """Scores a conversation by its number of characters."""

        async def score(
            self, model: str, label: str | None, conversations: Sequence[Conversation]
        ) -> list[Grade]:
            assert (model, label) == ("/models/reward", "good")
            lengths = [sum(len(message["content"]) for message in c) for c in conversations]
            return [Grade(float(n)) if n < 9 else Grade(None, "too long") for n in lengths]

    asked: ScoreModel = section(
        model="/models/reward",
        label="good",
        input=[{"role": "user", "content": "{{ sample.output_json.x }}"}],
    )
    items = [
        GradeItem(text, {}, 1) for text in ('{"x": "abc"}', "no JSON", '{"x": "123456789"}', '{"x": ""}')
    ]
    found = await build_grader(asked, classifier=Pool()).grade(items)
    assert found[0] == Grade(3.0)
    assert found[1].error == "sample.output_json.x: the answer is not JSON"  # no lowest score is known
    assert found[2:] == [Grade(None, "too long"), Grade(0.0)]

    cut = asked.model_copy(update={"range": (-1.0, 2.0)})
    found = await build_grader(cut, classifier=Pool()).grade(items)
    assert [grade.reward for grade in found] == [2.0, -1.0, None, 0.0]

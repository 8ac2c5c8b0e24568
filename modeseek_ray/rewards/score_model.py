"""`score_model`: a number from a judge behind an OpenAI-compatible endpoint, or from a local classifier.

The judge is asked for OpenAI's structured answer, `{"steps": [...], "result": number}`. What is not of that
form is the sample's error and not a zero: a judge that is cut off says nothing about the answer.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from modeseek_ray.rewards.endpoints import Endpoint
from modeseek_ray.rewards.grader import Grade, GradeItem, SampleError, failed, grade_of
from modeseek_ray.rewards.parameters import ScoreModel
from modeseek_ray.rewards.template import parse_template

if TYPE_CHECKING:
    import httpx

Conversation = Sequence[Mapping[str, str]]  # messages with `role` and `content`

_RANGE = (0.0, 1.0)
_LONGEST_WAIT_S = 30.0
_MOST_BYTES = 1 << 20
_TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_STEP = {
    "type": "object",
    "properties": {"description": {"type": "string"}, "conclusion": {"type": "string"}},
    "required": ["description", "conclusion"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "grade",
        "strict": True,
        "schema": {
            "type": "object",
            # Steps first: a model that writes the number first finds its reasons afterwards.
            "properties": {"steps": {"type": "array", "items": _STEP}, "result": {"type": "number"}},
            "required": ["steps", "result"],
            "additionalProperties": False,
        },
    },
}


class Classifier(Protocol):
    """Scores conversations with a sequence classifier: a pool of `actors/reward_model.py`."""

    async def score(
        self, model: str, label: str | None, conversations: Sequence[Conversation]
    ) -> list[Grade]: ...


class _Messages:
    """The section's messages as templates, filled in per sample."""

    def __init__(self, section: ScoreModel) -> None:
        self._templates = [(message.role, parse_template(message.text())) for message in section.input]

    def render(self, item: GradeItem) -> list[dict[str, str]]:
        return [{"role": role, "content": text.render(item)} for role, text in self._templates]


class ClassifierGrader:
    """A local model's score: its single logit as it is, or the probability of `label`."""

    def __init__(self, section: ScoreModel, classifier: Classifier) -> None:
        self._section = section
        self._messages = _Messages(section)
        self._classifier = classifier

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        lowest = None if self._section.range is None else self._section.range[0]
        grades: list[Grade | None] = []
        conversations = []
        for item in items:
            try:
                conversations.append(self._messages.render(item))
                grades.append(None)
            except SampleError as error:
                grades.append(failed(error, lowest=lowest))
        scores = iter(await self._scores(conversations))
        return [next(scores) if grade is None else grade for grade in grades]

    async def _scores(self, conversations: Sequence[Conversation]) -> list[Grade]:
        if not conversations:
            return []
        section = self._section
        scores = await self._classifier.score(section.model, section.label, conversations)
        if section.range is None:
            return scores
        return [s if s.reward is None else Grade(_cut(s.reward, section.range)) for s in scores]

    async def close(self) -> None:
        """The pool belongs to whoever built it."""


class JudgeGrader:
    """Asks an endpoint, several samples at once, each until it answers or its attempts are used up."""

    def __init__(self, section: ScoreModel, endpoint: Endpoint) -> None:
        self._section = section
        self._endpoint = endpoint
        self._messages = _Messages(section)
        self._range = section.range or _RANGE
        self._turns = asyncio.Semaphore(endpoint.max_concurrency)

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        import httpx

        key = self._endpoint.api_key()
        async with httpx.AsyncClient(
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=None,  # one limit for the whole of a request, below
            follow_redirects=False,  # they would lead where the operator has not allowed
            trust_env=False,
            limits=httpx.Limits(max_connections=self._endpoint.max_concurrency),
        ) as client:
            round_ = _Round(client, self._endpoint, key)
            return list(await asyncio.gather(*(self._one(round_, item) for item in items)))

    async def _one(self, round_: _Round, item: GradeItem) -> Grade:
        try:
            body = self._body(self._messages.render(item))
            async with self._turns:
                answer = await round_.ask(body)
            return grade_of(_cut(read_score(answer), self._range))
        except Exception as error:
            return failed(error, lowest=self._range[0])

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        sampling = self._section.sampling_params.model_dump(exclude_none=True)
        if "max_completions_tokens" in sampling:  # the grader's name for it; the chat API has the singular
            sampling["max_completion_tokens"] = sampling.pop("max_completions_tokens")
        return {
            "model": self._section.model,
            "messages": messages,
            "response_format": RESPONSE_FORMAT,
            **sampling,
        }

    async def close(self) -> None:
        """Connections are closed after each round."""


class _Round:
    """One call of `grade`: gives up on an endpoint that is down, instead of on one sample after another."""

    def __init__(self, client: httpx.AsyncClient, endpoint: Endpoint, key: str | None) -> None:
        self._client = client
        self._endpoint = endpoint
        self._key = key
        self._given_up_in_a_row = 0

    async def ask(self, body: Mapping[str, Any]) -> Any:
        """The parsed answer. Raises `SampleError` with the last reason once the attempts are used up."""
        if self._given_up_in_a_row >= max(3, self._endpoint.max_concurrency):
            raise SampleError(f"not asked: the judge failed {self._given_up_in_a_row} samples in a row")
        for attempt in range(1, self._endpoint.attempts + 1):
            reason, wait_s, answer = await self._try(body)
            if reason is None:
                self._given_up_in_a_row = 0
                return answer
            if wait_s is None or attempt == self._endpoint.attempts:
                break
            backoff_s = self._endpoint.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
            await asyncio.sleep(min(max(wait_s, backoff_s), _LONGEST_WAIT_S))
        self._given_up_in_a_row += 1
        raise SampleError(f"the judge gave no answer after {attempt} attempt(s): {reason}")

    async def _try(self, body: Mapping[str, Any]) -> tuple[str | None, float | None, Any]:
        """Why it failed (None = it did not), how long to wait at least (None = useless), the answer."""
        import httpx

        url = f"{self._endpoint.url.rstrip('/')}/chat/completions"
        try:
            async with (
                asyncio.timeout(self._endpoint.timeout_s),
                self._client.stream("POST", url, json=body) as response,
            ):
                content = b""
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > _MOST_BYTES:
                        return f"its answer is larger than {_MOST_BYTES} bytes", None, None
        except TimeoutError:
            return f"no answer within {self._endpoint.timeout_s:g} s", 0.0, None
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}", 0.0, None
        if response.status_code != 200:
            said = content.decode("utf-8", errors="replace")
            said = (said.replace(self._key, "(the key)") if self._key else said)[:200]
            wait_s = _retry_after(response.headers) if response.status_code in _TRY_AGAIN else None
            return f"HTTP {response.status_code}: {said}", wait_s, None
        try:
            return None, None, json.loads(content)
        except ValueError:
            return "its answer is not JSON", 0.0, None


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds; the form with a date is left to our own back-off."""
    try:
        seconds = float(headers.get("retry-after", "0"))
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def read_score(answer: Any) -> float:
    """The number in a chat completion. Raises `SampleError` saying what the judge wrote instead."""
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise SampleError("the judge's answer is no chat completion") from None
    if message.get("refusal"):
        raise SampleError(f"the judge refused: {str(message['refusal'])[:200]}")
    if choice.get("finish_reason") == "length":
        raise SampleError("the judge was cut off; raise sampling_params.max_completions_tokens")
    try:
        result = json.loads(content)["result"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise SampleError(f"the judge wrote {str(content)[:200]!r} instead of a result") from None
    number = isinstance(result, int | float) and not isinstance(result, bool)
    if not number or not -1e300 < result < 1e300:  # NaN compares false; whole numbers have no end
        raise SampleError(f"the judge's result is {repr(result)[:50]}, not a number")
    return float(result)


def _cut(score: float, range_: tuple[float, float]) -> float:
    return min(max(score, range_[0]), range_[1])

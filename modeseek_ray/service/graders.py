"""`/v1/fine_tuning/alpha/graders`: try a grader on one answer before a job is given to it. OpenAI's routes.

Endpoints of judges are those of the operator's list in the home; a local classifier is loaded for jobs only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, JsonValue, ValidationError

from modeseek_ray.config import config_error
from modeseek_ray.rewards import Endpoint, Grade, GradeItem, GraderSection, build_grader, read_endpoints
from modeseek_ray.rewards.parameters import LengthPenalty, Multi
from modeseek_ray.service.body import read_json
from modeseek_ray.service.context import CallerDep, ServiceDep
from modeseek_ray.service.errors import ERROR_RESPONSES, RequestError
from modeseek_ray.strict import Strict

router = APIRouter(prefix="/v1/fine_tuning/alpha/graders", tags=["graders"], responses=ERROR_RESPONSES)

_TRIAL_TIMEOUT_S = 30.0  # somebody waits for the answer


class ToValidate(Strict):
    """A grader, as a job's `grader` has it."""

    grader: GraderSection


class ToRun(ToValidate):
    """A grader, an answer, and the row it answers."""

    model_sample: str = Field(max_length=1_000_000)
    """What the model would have written."""
    item: dict[str, JsonValue] = Field(default_factory=dict)
    """The row's fields."""
    num_tokens: int | None = Field(None, ge=0, le=10_000_000)
    """Tokens of the answer. Ours; `length_penalty` needs it, no tokenizer being known here."""


class ValidGrader(BaseModel):
    """The grader, with its defaults filled in."""

    grader: dict[str, Any]


class RunErrors(BaseModel):
    """OpenAI has a flag for each kind; of those here one is ever set, and the sentence is ours."""

    formula_parse_error: bool = False
    invalid_variable_error: bool = False
    model_grader_parse_error: bool = False
    model_grader_refusal_error: bool = False
    model_grader_server_error: bool = False
    python_grader_runtime_error: bool = False
    python_grader_server_error: bool = False
    sample_parse_error: bool = False
    truncated_observation_error: bool = False
    unresponsive_reward_error: bool = False
    other_error: bool
    details: str | None


class RunMetadata(BaseModel):
    """How the grading went. `scores` are the parts' of a `multi`, or the grader's own."""

    name: str
    type: str
    errors: RunErrors
    execution_time: float
    scores: dict[str, float]


class RunResult(BaseModel):
    """The reward; None, with the reason in `metadata.errors`, where there is none."""

    reward: float | None
    sub_rewards: dict[str, float]
    metadata: RunMetadata
    model_grader_token_usage_per_model: dict[str, int] = Field(default_factory=dict)


def _body(model: type[Strict]) -> dict[str, Any]:
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/validate", openapi_extra=_body(ToValidate))
async def validate_grader(request: Request, service: ServiceDep, caller: CallerDep) -> ValidGrader:
    """Refuse a grader as a job would be refused, with the path of the field."""
    body = _parsed(ToValidate, await read_json(request, service.settings.max_body_bytes))
    return ValidGrader(grader=body.grader.model_dump(mode="json", exclude_none=True))


@router.post("/run", openapi_extra=_body(ToRun))
async def run_grader(request: Request, service: ServiceDep, caller: CallerDep) -> RunResult:
    """Grade one answer."""
    body = _parsed(ToRun, await read_json(request, service.settings.max_body_bytes))
    if body.num_tokens is None and any(isinstance(p, LengthPenalty) for p in _parts(body.grader)):
        raise RequestError(
            "length_penalty needs the number of tokens.", mend="Add num_tokens beside model_sample."
        )
    endpoints = [for_one(endpoint) for endpoint in read_endpoints(service.home.endpoints)]
    grader = build_grader(body.grader, endpoints=endpoints)
    started = time.monotonic()
    try:
        [grade] = await grader.grade([GradeItem(body.model_sample, body.item, body.num_tokens or 0)])
    finally:
        await grader.close()
    return _result(body.grader, grade, time.monotonic() - started)


def _parsed(model: type[Any], body: Any) -> Any:
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise config_error(error) from None


def _parts(grader: Any) -> Sequence[Any]:
    return list(grader.graders.values()) if isinstance(grader, Multi) else [grader]


def for_one(endpoint: Endpoint) -> Endpoint:
    """Asked once, and not for long."""
    timeout_s = min(endpoint.timeout_s, _TRIAL_TIMEOUT_S)
    return endpoint.model_copy(update={"attempts": 1, "timeout_s": timeout_s})


def _result(grader: Any, grade: Grade, seconds: float) -> RunResult:
    name = grader.name or grader.type
    scores = dict(grade.parts) or ({} if grade.reward is None else {name: grade.reward})
    errors = RunErrors(other_error=grade.error is not None, details=grade.error)
    metadata = RunMetadata(name=name, type=grader.type, errors=errors, execution_time=seconds, scores=scores)
    return RunResult(reward=grade.reward, sub_rewards=dict(grade.parts), metadata=metadata)

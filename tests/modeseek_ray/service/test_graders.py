"""Trying a grader over HTTP, with the unmodified `openai` client."""

from __future__ import annotations

import asyncio
import shutil
from typing import Any

import openai
import pytest

from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.spec import JobSpec

EQUALS = {
    "type": "string_check",
    "name": "equals",
    "input": "{{ sample.output_text }}",
    "reference": "{{ item.reference }}",
    "operation": "eq",
}
SIMILAR = {
    "type": "text_similarity",
    "name": "similar",
    "input": "{{ sample.output_json.city }}",
    "reference": "{{ item.reference }}",
    "evaluation_metric": "fuzzy_match",
}


def run(service: Any, grader: Any, sample: str, item: Any = None, **more: Any) -> Any:
    graders = service.openai().fine_tuning.alpha.graders
    return graders.run(grader=grader, model_sample=sample, item=item or {}, extra_body=more or None)


def test_a_grader_is_tried_on_one_answer(service: Any) -> None:
    right = run(service, EQUALS, "Paris", {"reference": "Paris"})
    assert right.reward == 1.0
    assert (right.metadata.name, right.metadata.type) == ("equals", "string_check")
    assert right.metadata.scores == {"equals": 1.0}
    assert run(service, EQUALS, "Rome", {"reference": "Paris"}).reward == 0.0
    maths = {"type": "math_answer", "reference": "{{ item.reference }}"}
    assert run(service, maths, "It is 0.5.", {"reference": "1/2"}).reward == 1.0


def test_a_multi_says_what_its_parts_said(service: Any) -> None:
    multi = {
        "type": "multi",
        "graders": {"city": SIMILAR, "long": {"type": "length_penalty", "free_tokens": 1, "max_tokens": 3}},
        "calculate_output": "city ^ 2 + long",
    }
    result = run(service, multi, '{"city": "paris!"}', {"reference": "Paris"}, num_tokens=2)
    assert result.reward == 0.5
    assert result.sub_rewards == {"city": 1.0, "long": -0.5}
    with pytest.raises(openai.BadRequestError, match="length_penalty needs the number of tokens"):
        run(service, multi, "{}", {"reference": "Paris"})


def test_an_answer_that_cannot_be_graded_has_no_reward_and_a_reason(service: Any) -> None:
    result = run(service, EQUALS, "Paris")
    assert result.reward is None
    assert result.metadata.errors.other_error is True
    assert result.metadata.errors.details == "item.reference: there is no 'reference'"


@pytest.mark.parametrize(
    ("grader", "param", "said"),
    [
        (
            {**EQUALS, "operation": "neq"},
            "grader.operation",
            "'neq' is not one of its choices. Did you mean `ne`?",
        ),
        ({"type": "python", "source": "1"}, "grader", "would run a user's code"),
        ({**EQUALS, "input": "{{ sample.x }}"}, "grader.input", "sample.x is unknown"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(service: Any, grader: Any, param: str, said: str) -> None:
    for ask in (
        lambda: service.openai().fine_tuning.alpha.graders.validate(grader=grader),
        lambda: run(service, grader, "Paris"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.param == param
        assert said in caught.value.message


def test_a_valid_grader_comes_back_with_its_defaults(service: Any) -> None:
    grader = service.openai().fine_tuning.alpha.graders.validate(grader=EQUALS).grader
    assert (grader.type, grader.operation) == ("string_check", "eq")


def test_judges_are_those_of_the_operator_s_list(start_service: Any, tmp_path: Any) -> None:
    service = start_service()
    judge = {"type": "score_model", "model": "judge", "input": [{"role": "user", "content": "x"}]}
    with pytest.raises(openai.BadRequestError, match="is not among the endpoints"):
        run(service, {**judge, "base_url": "http://127.0.0.1:1/v1"}, "Paris")
    with pytest.raises(openai.BadRequestError, match="no model of an allowed endpoint"):
        run(service, judge, "Paris")

    service.home.endpoints.write_text("endpoints:\n- url: http://127.0.0.1:1/v1\n  models: [judge]\n")
    for grader in (judge, {**judge, "base_url": "http://127.0.0.1:1/v1"}):
        result = run(service, grader, "Paris")
        assert result.reward is None
        assert "after 1 attempt(s): ConnectError" in result.metadata.errors.details


async def _succeed(service: Any, job_id: str) -> None:
    """What a driver says of a job whose model is the one it started from."""
    driver = service.driver(job_id)
    await driver.transition("running")
    model = shutil.copytree(service.model, service.home.model(job_id))
    results = {"fine_tuned_model_path": str(model), "result_files": [], "trained_tokens": 1}
    await driver.transition("succeeded", results=results)
    await driver.close()


def test_a_judge_of_the_job_s_own_making_is_found_as_any_model_is(service: Any) -> None:
    """`ft:…` in a grader leads where it leads as the job's model; the driver is told the directory."""
    first = service.submit()
    asyncio.run(_succeed(service, first))
    [name] = [m.name for m in service.store.models.all() if m.name.startswith("ft:")]
    judge = {"type": "score_model", "model": name, "input": [{"role": "user", "content": "x"}]}
    method = {"type": "online", "online": {"preset": "grpo", "grader": judge}}
    questions = service.upload(b'{"messages": [{"role": "user", "content": "?"}]}\n', "questions.jsonl")
    job = service.submit(training_file=questions, method=method)
    spec = JobSpec.read(service.home.config(job))
    assert spec.judges == {name: service.home.model(first)}
    assert JobSpec.from_json(spec.to_json()) == spec

    method["online"]["grader"] = {**judge, "model": "ft:nobody"}
    with pytest.raises(ModeseekError) as refused:
        service.submit(training_file=questions, method=method)
    assert refused.value.param == "method.online.grader.model"

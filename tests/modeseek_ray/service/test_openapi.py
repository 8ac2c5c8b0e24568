"""Schemathesis over the whole OpenAPI document: no 5xx, no answer that the document does not name.

Every operation gets requests that fit the document and requests that do not; answers are checked against
their schemas. The service is real, on a port; cluster and validation are fakes.
"""

from __future__ import annotations

from typing import Any

import hypothesis
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 4  # per operation and mode


def test_every_answer_is_one_that_the_document_names(service: Any) -> None:
    known = {
        "job_id": service.submit(),
        "file_id": service.upload(),
        "endpoint_id": service.store.webhooks.create(
            "default", "a", "https://203.0.113.1/", ["fine_tuning.job.failed"]
        ).id,
        "name": "playground/none",
    }
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    problems, answered = [], {}
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                statuses = exercise(operation, mode, known)
            except hypothesis.errors.Unsatisfiable:  # nothing in this operation can be wrong
                continue
            except (Exception, FailureGroup) as error:
                what = [str(e) for e in getattr(error, "exceptions", [error])]
                problems.append(f"{operation.label} ({mode.value}): {what}")
                continue
            answered.setdefault(operation.label, set()).update(statuses)
    assert not problems, "\n\n".join(problems)
    assert len(answered) >= 30
    # The requests went deep enough to be carried out, not only to be refused at the door.
    done = {label for label, statuses in answered.items() if statuses & {200, 202}}
    assert len(done) >= 20, sorted(set(answered) - done)


def exercise(operation: Any, mode: GenerationMode, known: dict[str, str]) -> set[int]:
    """Send generated requests; half of them about things that are there. Returns the statuses seen."""
    statuses = set()
    turn = 0

    @hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        nonlocal turn
        turn += 1
        if turn % 2:
            names = case.path_parameters or {}
            case.path_parameters = {name: known.get(name, value) for name, value in names.items()}
        if operation.path.endswith("/events"):
            case.query = {**(case.query or {}), "stream": "false"}  # a stream has no end
        response = case.call(timeout=20)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    send()
    return statuses

"""Schemathesis over the whole OpenAPI document: no 5xx, no answer that the document does not name.

Every operation gets requests that fit the document and requests that do not; answers are checked against
their schemas. The service is real, on a port; cluster and validation are fakes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.modeseek_ray.fuzzing import LONG
from tests.modeseek_ray.service.conftest import assert_explained

EXAMPLES = 100 if LONG else 4  # per operation and mode
WALKS, STEPS = (300, 30) if LONG else (12, 12)

pytestmark = pytest.mark.timeout(3600 if LONG else 600)


def explained(_context: Any, response: Any, _case: Any) -> None:
    """A refusal names a code that the README's table has."""
    assert_explained(response)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    explained,
]


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
        response = case.call(timeout=60)
        statuses.add(response.status_code)
        case.validate_response(response, checks=CHECKS)

    send()
    return statuses


def test_walks_along_the_documents_links(service: Any) -> None:
    """Stateful: ids from answers go into the operations that the document links them to, in any order.

    A new job, file or endpoint is made before each listing, so that the first of the list is one that
    nothing has happened to yet.
    """
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    seen: dict[str, set[int]] = defaultdict(set)
    makes = {
        "GET /v1/files": service.upload,
        "GET /v1/fine_tuning/jobs": service.submit,
        "GET /v1/webhook_endpoints": lambda: service.store.webhooks.create(
            "default", "a", "https://203.0.113.1/", ["fine_tuning.job.failed"]
        ),
    }

    class Walk(schema.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: Any) -> None:
            if case.operation.label in makes:
                makes[case.operation.label]()
                case.query = {"limit": 1}
            if case.operation.path.endswith("/events"):
                case.query = {**(case.query or {}), "stream": "false"}  # a stream has no end

        def validate_response(self, response: Any, case: Any, *_: Any, **__: Any) -> None:
            seen[case.operation.label].add(response.status_code)
            case.validate_response(response, checks=CHECKS)

    Walk.run(
        settings=hypothesis.settings(
            max_examples=WALKS,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not LONG,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
    )
    of_jobs = {label for label, statuses in seen.items() if "{job_id}" in label and 200 in statuses}
    assert of_jobs, dict(seen)  # ids did go from one answer into the next request


def test_links_lead_to_operations_that_exist(service: Any) -> None:
    with service.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    operations = {o["operationId"]: (path, o) for path, item in paths.items() for o in item.values()}
    links = [
        link
        for _, operation in operations.values()
        for response in operation["responses"].values()
        for link in response.get("links", {}).values()
    ]
    assert len(links) >= 30
    for link in links:
        path, _ = operations[link["operationId"]]
        assert all(f"{{{name}}}" in path for name in link["parameters"])
    created = paths["/v1/fine_tuning/jobs"]["post"]["responses"]["200"]["links"]
    linked = {operations[link["operationId"]][0].rpartition("/")[2] for link in created.values()}
    assert {"cancel", "pause", "resume", "events", "checkpoints", "weights", "report"} <= linked

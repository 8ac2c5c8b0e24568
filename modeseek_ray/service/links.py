"""Links of the OpenAPI document: which operations may follow with an id that an answer holds.

Programs that read the document, and the tests that walk it, learn from them that a created job can be
read, paused or cancelled.
"""

from __future__ import annotations

from typing import Any

_FILE, _JOB, _HOOK = (
    "/v1/files/{file_id}",
    "/v1/fine_tuning/jobs/{job_id}",
    "/v1/webhook_endpoints/{endpoint_id}",
)
_CHECK = "/v1/fine_tuning/validations/{validation_id}"

# From an operation and a status: the template of a path, its parameter, and where in the answer it stands.
SOURCES: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("post", "/v1/files", "200", _FILE, "file_id", "/id"),
    ("get", "/v1/files", "200", _FILE, "file_id", "/data/0/id"),
    ("post", "/v1/fine_tuning/jobs", "200", _JOB, "job_id", "/id"),
    ("get", "/v1/fine_tuning/jobs", "200", _JOB, "job_id", "/data/0/id"),
    ("post", "/v1/fine_tuning/jobs/validate", "202", _CHECK, "validation_id", "/id"),
    ("post", "/v1/webhook_endpoints", "200", _HOOK, "endpoint_id", "/id"),
    ("get", "/v1/webhook_endpoints", "200", _HOOK, "endpoint_id", "/data/0/id"),
    ("get", "/v1/models", "200", "/v1/models/{name}", "name", "/data/0/id"),
)


def add_links(document: dict[str, Any]) -> dict[str, Any]:
    """Add to each source one link per operation at or below its path. Returns the same document."""
    paths = document["paths"]
    for method, path, status, template, parameter, pointer in SOURCES:
        response = paths[path][method]["responses"].setdefault(status, {"description": "Accepted."})
        response["links"] = {
            operation["operationId"]: {
                "operationId": operation["operationId"],
                "parameters": {parameter: f"$response.body#{pointer}"},
            }
            for below, item in paths.items()
            if below == template or below.startswith(f"{template}/")
            for operation in item.values()
        }
    return document

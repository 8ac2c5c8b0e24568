"""`modeseek validate`: what needs a tokenizer, in a process of its own. Prints one JSON object.

A file that makes the tokenizer slow, or memory run out, costs this process, not the service.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.commands.outlook import look, why_no_look, write_look
from actors.commands.preflight import preflight
from modeseek_ray.data.check import inspect_job
from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.look import LookRequest
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.spec import JobSpec


def validate(job_id: str, home: Path, *, score: bool = False) -> int:
    """Print `{"ok", "error", "report"}`. The exit code is 0 whenever that could be said.

    With `score` the report has an `outlook`: what the job's weighting and the presets asked for
    (`Home.look`) would do; and there is a page with plots (`Home.outlook_html`). A job that writes its
    own samples has none yet: a warning says so.
    """
    json.dump(_outcome(job_id, Home(home), score), sys.stdout, allow_nan=False)
    sys.stdout.write("\n")
    return 0


def _outcome(job_id: str, home: Home, score: bool) -> dict[str, Any]:
    try:
        spec = JobSpec.read(home.config(job_id))
        data = inspect_job(spec.config, spec.files, spec.model_path, names=spec.filenames)
        has_behavior = spec.behavior_model_path is not None
        checked = preflight(spec.config, data, spec.model_path, has_behavior=has_behavior)
        no_look = why_no_look(spec.config) if score else None
        if no_look is not None:
            checked = replace(checked, warnings=(*checked.warnings, no_look))
        report = checked.to_dict()
        if score and no_look is None:
            request = LookRequest.read(home.look(job_id))
            seen = look(
                spec.config,
                spec.files["training_file"],
                spec.model_path,
                home.cache,
                behavior_model=spec.behavior_model_path,
                presets=request.presets,
                rows=request.rows,
            )
            report["outlook"] = seen.to_dict()
            write_look(
                seen, home.outlook_html(job_id), spec.config.suffix or job_id, spec.files["training_file"]
            )
        return {"ok": True, "error": None, "report": report}
    except ModeseekError as error:
        return {
            "ok": False,
            "error": {"code": error.code, "message": str(error), "param": error.param},
            "report": {},
        }

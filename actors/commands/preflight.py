"""Everything that can be found wrong before a worker starts, and the plan of what would run.

The same checks behind `modeseek check`, `modeseek run` and the service's validation process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeseek_ray.config import JobConfig
from modeseek_ray.data.report import DataReport
from modeseek_ray.data.weighting import weighting_problems
from modeseek_ray.errors import ConfigError, ModelError, Warn
from modeseek_ray.jobs.integrations import check_integrations
from modeseek_ray.jobs.models import ModelInfo, resolve_model
from modeseek_ray.jobs.paths import Home
from modeseek_ray.jobs.plan import Plan, plan
from modeseek_ray.jobs.spec import FILE_ROLES
from modeseek_ray.rewards.build import local_models
from modeseek_ray.rewards.endpoints import Endpoint


@dataclass(frozen=True)
class Preflight:
    """A job that may start: what its data holds, what would run where, and what to mind."""

    data: DataReport
    plan: Plan
    warnings: tuple[Warn, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "data": self.data.to_dict(),
            "plan": self.plan.to_dict(),
            "warnings": [vars(w) for w in self.warnings],
        }


def files_of(config: JobConfig, base: Path) -> dict[str, Path]:
    """The job's data files by role; relative paths are read from `base`. Raises `ConfigError`."""
    files = {}
    for role in FILE_ROLES:
        name = getattr(config, role)
        if name is None:
            continue
        path = Path(name).expanduser() if Path(name).is_absolute() else base / name
        if not path.is_file():
            raise ConfigError(
                f"there is no file {path}.", param=role, mend="Paths are read from the job file's place."
            )
        files[role] = path
    return files


def local_model(name: str, home: Home) -> Path:
    """A model for `modeseek run` and `check`, which act with the rights of whoever types them."""
    return resolve_model(name, home=home, roots=[Path("/"), home.jobs, home.storage / "playground"])


def local_judges(config: JobConfig, endpoints: Sequence[Endpoint], home: Home) -> dict[str, Path]:
    """Directories of the grader's local classifiers, by the names the job calls them, found as `local_model`."""
    if config.grader is None:
        return {}
    param = f"method.{config.method.type}.grader"
    found = {}
    for path, section in local_models(config.grader, endpoints=endpoints, param=param):
        try:
            found[section.model] = local_model(section.model, home)
        except ModelError as error:
            error.param = error.param or f"{path}.model"
            raise
    return found


def preflight(config: JobConfig, data: DataReport, model_path: Path, *, has_behavior: bool) -> Preflight:
    """Check data and weighting against each other. Raises the first problem as its own error."""
    check_integrations(config)
    data.raise_if_bad()
    model = ModelInfo.read(model_path)
    refuse_replay_without_experts(config, model)
    config.resources.check_heads(model.num_heads)
    problems = weighting_problems(config, data.training, has_behavior=has_behavior)
    for problem in problems:
        if problem.severity == "error":
            raise problem.error()
    warnings = [Warn(p.code, f"{p.message} {p.mend}", p.param) for p in problems]
    return Preflight(data, plan(config, model, data), (*data.warnings, *warnings))


def refuse_replay_without_experts(config: JobConfig, model: ModelInfo) -> None:
    """Raise `ConfigError` where routes are to be replayed, or experts' load balanced, and the model has none."""
    if config.routing_replay is not None and not model.is_moe:
        raise ConfigError(
            f"routing replay needs an MoE model; {model.architecture} is dense.",
            param=f"method.{config.method.type}.routing_replay",
            mend="Drop it, or choose an MoE model.",
        )
    if config.training.router_aux_loss_coef > 0 and not model.is_moe:
        raise ConfigError(
            f"there is no load to balance: {model.architecture} is dense.",
            param=f"method.{config.method.type}.training.router_aux_loss_coef",
            mend="Set it to 0, or choose an MoE model.",
        )

"""Which kind of attempt a job's method asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from actors.attempt import Attempt
from actors.attempt_best_of_n import BestOfNAttempt
from actors.attempt_online import OnlineAttempt
from actors.attempt_spec import AttemptSpec
from actors.journal import ResultJournal
from actors.placement import Placement
from modeseek_ray.config import JobConfig, rooted
from modeseek_ray.errors import ModeseekError


def attempt_of(spec: AttemptSpec, placement: Placement, journal: ResultJournal) -> Attempt:
    """The attempt at this job; `run` it once."""
    if spec.config.online is not None:
        return OnlineAttempt(spec, placement, journal)
    if spec.config.best_of_n is not None:
        return BestOfNAttempt(spec, placement, journal)
    return Attempt(spec, placement, journal)


@contextmanager
def paths_as_written(config: JobConfig) -> Iterator[None]:
    """Errors name `method.online…` where the job says that: weighting and workers call every method `weighted`."""
    try:
        yield
    except ModeseekError as error:
        error.param = error.param and rooted(error.param, config.method.type)
        raise

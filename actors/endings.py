"""Which errors end a job at once, and which only its attempt.

Another attempt costs minutes; a job that fails for good costs its user's night. So a job fails at once only
for what the next attempt would meet again: what stands in the job, its data or its model, and what
the job itself computes from them. Everything else (a worker that died or raised, an error of Ray, a
deadline, a mistake of ours) ends the attempt, and the service starts another: three in a row that get
no further are enough (`attempts_exhausted`).
"""

from __future__ import annotations

from modeseek_ray.errors import ConfigError, DataError, ModelError, ModeseekError

# All codes of these: what the user gave cannot be trained on, whoever tries.
GIVEN = (ConfigError, DataError, ModelError)

# And by code, what comes of it with the same numbers, or of how the cluster is set up.
AGAIN = {
    "numerics": "the same rows and weights give the same NaN, the same sync the same difference",
    "routing": "the routers do not take the recorded routes",
    "grader_failing": "the grader, its endpoint or the rows have to be mended",
    "storage": "a directory that cannot be written, checkpoints of which none verifies",
    "storage_not_shared": "a node lacks the directory or has another model: the operator has to act",
}


def would_come_again(error: ModeseekError) -> bool:
    """Whether the job fails with this error, rather than be tried again."""
    return isinstance(error, GIVEN) or error.code in AGAIN

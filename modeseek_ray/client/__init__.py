"""The HTTP clients: `Client` for people and the command line, `AttemptClient` for a job's driver,
`EngineClient` for an inference engine, `OperatorClient` for the operator's own commands.

All raise `ServiceError` with the code, the sentence and the mend the service sent.
"""

from modeseek_ray.client.answers import finite
from modeseek_ray.client.driver import AttemptClient
from modeseek_ray.client.engine import EngineClient
from modeseek_ray.client.operator import OperatorClient
from modeseek_ray.client.user import Client

__all__ = ["AttemptClient", "Client", "EngineClient", "OperatorClient", "finite"]

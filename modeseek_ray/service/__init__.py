"""The HTTP service: OpenAI's fine-tuning API over the job store. Loads no torch and no Ray."""

from modeseek_ray.service.app import create_app
from modeseek_ray.service.serve import run_service
from modeseek_ray.service.settings import ServiceSettings

__all__ = ["ServiceSettings", "create_app", "run_service"]

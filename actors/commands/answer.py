"""`modeseek answer`: an inference engine, as the Ray job that the service starts."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path

from actors.answer_server import AnswerServer
from actors.answer_writer import VllmWriter
from modeseek_ray.errors import ModeseekError
from modeseek_ray.jobs.engine_wire import EngineSecret
from modeseek_ray.jobs.spec import JobSpec
from modeseek_ray.jobs.structured_logs import configure

log = logging.getLogger(__name__)


def answer(secret_path: Path) -> int:
    """Answer until it is time to end. The exit code says whether it ended in order."""
    configure("text")
    secret = EngineSecret.model_validate_json(secret_path.read_text(encoding="utf-8"))
    code = asyncio.run(_answer(secret))
    logging.shutdown()
    os._exit(code)  # vLLM's threads, and a model that is still being loaded, are not waited for


async def _answer(secret: EngineSecret) -> int:
    server = AnswerServer(secret, _start)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.end, "ended from outside")
    try:
        outcome = await server.run()
    except ModeseekError as error:
        log.error("%s", error)
        return 1
    except Exception:
        log.exception("the engine could not start")
        return 1
    log.warning("the engine ends: %s", outcome)
    return 0


def _start(secret: EngineSecret) -> VllmWriter:
    """Runs in a thread. A checkpoint is written out as a model first."""
    if secret.checkpoint is not None and not Path(secret.model_path).is_dir():
        assert secret.job is not None
        asyncio.run(_export(Path(secret.job), Path(secret.checkpoint), Path(secret.model_path)))
    return VllmWriter.start(secret)


async def _export(job: Path, checkpoint: Path, model: Path) -> None:
    from actors.checkpoint_export import export_checkpoint
    from actors.cluster import RayPlacement, connect

    spec = JobSpec.read(job)
    connect(os.environ.get("RAY_ADDRESS"))
    await export_checkpoint(spec, checkpoint, model, RayPlacement(spec.config.resources))

"""What a driver says of a job, told to a real service by the driver's own journal.

The job's life, the store, the stream, the ledger and the page are real; only the numbers are made up
(`tests/modeseek_ray/reports/synthetic.py`), so that any course of events is there in a second.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from actors.journal import CallbackSink, ResultJournal
from modeseek_ray.client import AttemptClient
from modeseek_ray.types import StepReport
from tests.modeseek_ray.reports import synthetic

EVENTS_PER_CALL = 2_500


class Story:
    """One job of a running service, and its driver."""

    def __init__(
        self, service: Any, name: str, *, gamma_max: float = 1.0, forgets: float = 0.2, learns: float = 1.0
    ):
        self._service = service
        self._course = (gamma_max, forgets, learns)
        method = (
            {"type": "weighted", "weighted": {"preset": "anchored"}} if gamma_max else {"type": "supervised"}
        )
        self.id = service.submit(suffix=name, training_file=_training_file(service), method=method)
        self._driver: AttemptClient = service.driver(self.id)
        self._told: list[dict[str, Any]] = []
        self._journal = ResultJournal(service.home.results(self.id), CallbackSink(self._hear))
        self._num_told = 0
        self._step = 0
        self._rng = np.random.default_rng(0)
        self._noise = np.zeros(len(synthetic.OLD_TASKS))
        self._order = np.concatenate([self._rng.permutation(synthetic.ROWS) for _ in range(synthetic.EPOCHS)])
        self._distance_R = np.repeat([[0.2, 0.6, 1.2, 2.0]], synthetic.ROWS // 4, axis=0).ravel()

    def train(self, until: int = synthetic.NUM_STEPS) -> Story:
        """Steps up to `until`, as the driver would tell them. May be called again to go on."""
        _run(self._train(until))
        return self

    def show_answers(self, number: int, rewards: Sequence[float | None]) -> Story:
        """What an online job says of a round: one question, its answers and their rewards."""
        answers = [{"text": f"answer {i}", "reward": r, "error": None} for i, r in enumerate(rewards)]
        work = self._journal.message(
            f"Round {number}: {len(rewards)} samples.", prompt="2 + 2 =", rollouts=answers
        )
        _run(work)
        _run(self._send(self._told))
        self._told = []
        return self

    def checkpoint(self) -> Story:
        """A committed checkpoint at the present step."""
        path = self._service.home.checkpoints(self.id) / f"step-{self._step}.a1"
        path.mkdir(parents=True)
        _run(self._driver.checkpoint(self._step, str(path), {"validation.nll": 0.41}))
        return self

    def obey(self) -> str:
        """Ask what is desired, and stop where that is a pause."""
        wanted = str(_run(self._driver.heartbeat({"step": self._step})))
        if wanted == "pause":
            _run(self._driver.transition("paused"))
        return wanted

    def succeed(self) -> Story:
        model = self._service.home.model(self.id)
        model.mkdir(parents=True, exist_ok=True)
        self._service.home.report_html(self.id).write_text("<!doctype html><title>report</title>")
        metrics, _ = self._journal.close()
        results = {
            "fine_tuned_model_path": str(model),
            "trained_tokens": 12_800,
            "result_files": [str(metrics)],
        }
        _run(self._end("succeeded", results=results))
        return self

    def fail(self, code: str, message: str) -> Story:
        _run(self._end("failed", error={"code": code, "message": message}))
        return self

    def flood(self, num_steps: int) -> Story:
        """`num_steps` events at once, numbers only: what a very long job has behind it."""
        noise = self._rng.normal(size=num_steps + 1)
        _run(
            self._send(
                [
                    self._numbered(_bare_step(step, num_steps, float(noise[step])))
                    for step in range(1, num_steps + 1)
                ]
            )
        )
        return self

    async def _train(self, until: int) -> None:
        gamma_max, forgets, learns = self._course
        if self._step == 0:
            await self._driver.transition("running")
            await self._journal.message("Scored 480 rows under the start.")
            await self._journal.evaluated(0, synthetic.evaluations(0.0, forgets, learns, self._noise))
        for step in range(self._step + 1, until + 1):
            progress = step / synthetic.NUM_STEPS
            row_N = self._order[(step - 1) * synthetic.BATCH : step * synthetic.BATCH]
            weights, groups = synthetic.weigh_batch(row_N, self._distance_R, progress, gamma_max, self._rng)
            await self._journal.record(
                step, groups, weights, self._report(step, progress, weights.ess_ratio), synthetic.NUM_STEPS
            )
            if step % 15 == 0:
                self._noise = 0.8 * self._noise + synthetic.NOISE * self._rng.standard_normal(
                    len(self._noise)
                )
                await self._journal.evaluated(
                    step, synthetic.evaluations(progress, forgets, learns, self._noise)
                )
            if step == synthetic.NUM_STEPS // 2:
                await self._journal.message(
                    f"Step {step}: 3 groups have tied rewards.", level="warn", step=step
                )
        self._step = until
        await self._send(self._told)
        self._told = []
        beat = {
            "step": until,
            "total_steps": synthetic.NUM_STEPS,
            "tokens_per_s": 931.0,
            "eta_s": 0.6 * (synthetic.NUM_STEPS - until),
        }
        await self._driver.heartbeat(beat)

    def _report(self, step: int, progress: float, ess_ratio: float) -> StepReport:
        nll = 0.35 + 2.2 * np.exp(-4 * self._course[2] * progress) + 0.08 * self._rng.standard_normal()
        return StepReport(
            step=step, loss=nll * (0.75 + 0.25 * ess_ratio), nll=nll, accuracy=float(np.clip(1 - nll / 3, 0, 1)),
            grad_norm=float(0.4 + 2 * np.exp(-5 * progress) + 0.1 * self._rng.random()), learning_rate=5e-4,
            num_tokens=synthetic.BATCH * 9, num_padded=12, num_positions=synthetic.BATCH * 20, kl_nats=0.3 * progress,
            seconds={"score": 0.05, "forward": 0.11, "backward": 0.2, "optimizer": 0.04, "total": 0.42},
        )  # fmt: skip

    async def _end(self, state: str, **said: Any) -> None:
        await self._driver.transition(state, **said)
        await self._driver.close()

    async def _send(self, events: Sequence[Mapping[str, Any]]) -> None:
        for start in range(0, len(events), EVENTS_PER_CALL):
            await self._driver.events(events[start : start + EVENTS_PER_CALL])

    def _hear(self, event: Mapping[str, Any]) -> None:
        self._told.append(self._numbered(event))

    def _numbered(self, event: Mapping[str, Any]) -> dict[str, Any]:
        self._num_told += 1
        return {**event, "seq": self._num_told}


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Playwright's synchronous API occupies the loop of the test's own thread."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(work, _loop()).result(timeout=120)


def _training_file(service: Any) -> str:
    path: Path = service.home.root.parent / "roman.jsonl"
    if not path.exists():
        synthetic.write_training_file(path)
    return str(service.upload(path.read_bytes(), name=path.name))


def _bare_step(step: int, total: int, noise: float) -> dict[str, Any]:
    progress = step / total
    data = {
        "step": step, "total_steps": total, "attempt": 1,
        "loss": 2.0 - progress + 0.1 * noise, "nll": 2.2 - progress + 0.1 * noise,
        "ess_ratio": 0.5 + 0.05 * noise, "gamma": progress, "bound_by": "ess" if progress < 0.5 else "cap",
        "grad_norm": 1.0 + 0.1 * noise**2, "tokens_per_s": 900.0 + noise, "seconds_total": 0.4, "seconds_forward": 0.2,
    }  # fmt: skip
    return {"type": "metrics", "level": "info", "message": f"Step {step}/{total}", "data": data}

"""A made-up but believable result directory: a job that learns the new and forgets some of the old.

    python -m tests.modeseek_ray.reports.synthetic DIRECTORY

writes two jobs, `sft` and `weighted`, their training file, and the reports of both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from modeseek_ray.reports.results import JobRecord, MetricsWriter, WeightsWriter, flatten, write_job
from modeseek_ray.types import EvalReport, FloatArray, Group, Handle, StepReport, Weights

ROWS, BATCH, EPOCHS = 480, 16, 5
NUM_STEPS = ROWS * EPOCHS // BATCH
OLD_TASKS = {"sort": 0.97, "reverse": 0.95, "copy": 1.0, "brackets": 0.93, "facts": 0.9}
NOISE = 0.02


def write_training_file(path: Path, seed: int = 0) -> None:
    """Roman numerals, in answer formats near to and far from what the base model would say."""
    rng = np.random.default_rng(seed)
    formats = ("{n}", "= {n}", "The number is {n}.", "«{n}»")
    with path.open("w") as file:
        for row in range(ROWS):
            n = int(rng.integers(1, 400))
            answer = formats[row % 4].format(n=n)
            file.write(json.dumps({"prompt": f"roman {'I' * (n % 4 + 1)}V →", "completion": answer}) + "\n")


def write_job_directory(
    directory: Path,
    *,
    gamma_max: float,
    forgets: float,
    learns: float,
    name: str,
    seed: int = 0,
    **record: object,
) -> Path:
    """One finished job. `gamma_max=0` is plain SFT."""
    rng = np.random.default_rng(seed)
    metrics, ledger = MetricsWriter(directory), WeightsWriter(directory)
    order = np.concatenate([rng.permutation(ROWS) for _ in range(EPOCHS)])
    distance_R = np.repeat([[0.2, 0.6, 1.2, 2.0]], ROWS // 4, axis=0).ravel() + 0.1 * rng.standard_normal(
        ROWS
    )
    noise = np.zeros(len(OLD_TASKS))
    metrics.evaluated(0, flatten(None, None, evaluations(0.0, forgets, learns, noise)))
    for step in range(1, NUM_STEPS + 1):
        progress = step / NUM_STEPS
        row_N = order[(step - 1) * BATCH : step * BATCH]
        weights, groups = weigh_batch(row_N, distance_R, progress, gamma_max, rng)
        nll = 0.35 + 2.2 * np.exp(-learns * 4 * progress) + 0.08 * rng.standard_normal()
        report = StepReport(
            step=step,
            loss=nll * (1 - 0.25 * (1 - weights.ess_ratio)),
            nll=nll,
            accuracy=float(np.clip(1 - nll / 3, 0, 1)),
            grad_norm=float(0.4 + 2 * np.exp(-5 * progress) + 0.1 * rng.random()),
            learning_rate=5e-4,
            num_tokens=BATCH * 9,
            num_padded=12,
            num_positions=BATCH * 20,
            seconds={"score": 0.05, "forward": 0.11, "backward": 0.2, "optimizer": 0.04, "total": 0.42},
        )
        metrics.append(step, flatten(report, weights))
        ledger.append(step, groups, weights)
        noise = 0.8 * noise + NOISE * rng.standard_normal(len(OLD_TASKS))
        if step % 15 == 0:
            metrics.evaluated(step, flatten(None, None, evaluations(progress, forgets, learns, noise)))
    metrics.close()
    ledger.close()
    fields = {"status": "succeeded", "finished_at": 1.7e9 + NUM_STEPS * 0.42, **record}
    write_job(directory, job_record(name, gamma_max, **fields))
    return directory


def weigh_batch(
    row_N: np.ndarray, distance_R: FloatArray, progress: float, gamma_max: float, rng: np.random.Generator
) -> tuple[Weights, list[Group]]:
    """Log-ratios rise with distance from the start as the policy moves; gamma falls to hold ESS/n >= .3."""
    ratio_N = distance_R[row_N] * progress * 2 + 0.3 * progress * rng.standard_normal(BATCH)
    gamma = gamma_max * min(1.0, progress / 0.1)
    bound = "warmup" if progress < 0.1 else "cap"
    while gamma > 0 and ess(np.exp(gamma * ratio_N)) < 0.3:
        gamma, bound = 0.98 * gamma, "ess"
    raw_N = np.exp(gamma * ratio_N)
    values_N = BATCH * raw_N / raw_N.sum()
    weights = Weights(
        values_N,
        gamma=gamma if gamma_max else None,
        beta=None,
        ess_ratio=ess(values_N),
        bound_by=bound if gamma_max else "none",
        metrics={"largest_share": float(values_N.max() / BATCH), "log_ratio_std": float(ratio_N.std())},
    )
    reference_N = -9 * (0.3 + distance_R[row_N])
    group = Group(
        prompt=0,
        row_N=row_N,
        num_tokens_N=np.full(BATCH, 9),
        length_N=np.full(BATCH, 20),
        payload=Handle(block=[], index_N=np.arange(BATCH)),
        log_policy_N=reference_N + 9 * ratio_N,
        log_reference_N=reference_N,
    )
    return weights, [group]


def ess(values_N: FloatArray) -> float:
    return float(values_N.sum() ** 2 / (len(values_N) * (values_N**2).sum()))


def evaluations(progress: float, forgets: float, learns: float, noise: FloatArray) -> dict[str, EvalReport]:
    new = float(np.clip(1 / (1 + np.exp(-12 * (progress * learns - 0.35))) - 0.015, 0, 1))
    scale = np.linspace(1.6, 0.2, len(OLD_TASKS))
    kept = [a - forgets * s * progress**1.5 for a, s in zip(OLD_TASKS.values(), scale, strict=True)]
    accuracies = np.clip(np.array(kept) + noise * min(1.0, 4 * progress), 0, 1)
    tasks = {
        task: EvalReport(nll=0.1 + 2 * (1 - a), token_accuracy=a, num_tokens=400, accuracy=float(a))
        for task, a in zip(OLD_TASKS, accuracies, strict=True)
    }
    mean = float(accuracies.mean())
    return {
        "validation": EvalReport(
            nll=0.3 + 2.3 * (1 - new), token_accuracy=0.4 + 0.6 * new, num_tokens=900, accuracy=new
        ),
        "retention": EvalReport(
            nll=0.1 + 2 * (1 - mean),
            token_accuracy=mean,
            num_tokens=2000,
            accuracy=mean,
            kl_nats=0.9 * forgets * progress,
            by_task=tasks,
        ),
    }


def job_record(name: str, gamma_max: float, **fields: object) -> JobRecord:
    weighted = {
        "likelihood": {
            "scheme": "ratio_power",
            "of": "initial_over_policy",
            "gamma": {"ess": {"floor": 0.3}},
        },
        "training": {"epochs": EPOCHS, "batch_size": BATCH},
    }
    plain = {"training": {"epochs": EPOCHS, "batch_size": BATCH}}
    method = (
        {"type": "weighted", "weighted": weighted}
        if gamma_max
        else {"type": "supervised", "supervised": plain}
    )
    config = {
        "model": "playground/moe",
        "training_file": "new-task.jsonl",
        "retention_file": "old-tasks.jsonl",
        "method": method,
    }
    return JobRecord(
        id=f"ftjob-{name}",
        name=name,
        config=config,
        model="playground/moe",
        picked={"learning_rate": 5e-4, "evaluate_every": 15, "checkpoint_every": 38},
        started_at=1.7e9,
        fine_tuned_model=f"ft:playground-moe:local:{name}:abc123",
        total_steps=NUM_STEPS,
        **fields,  # type: ignore[arg-type]
    )


def write_demo(root: Path) -> tuple[Path, Path]:
    write_training_file(root / "new-task.jsonl")
    sft = write_job_directory(root / "sft", gamma_max=0.0, forgets=0.45, learns=1.2, name="sft")
    weighted = write_job_directory(
        root / "weighted",
        gamma_max=1.0,
        forgets=0.2,
        learns=1.0,
        name="weighted",
        warnings=({"code": "starved_rows", "message": "4 rows were hardly learnt from.", "param": None},),
    )
    return sft, weighted


if __name__ == "__main__":
    from modeseek_ray.reports.html import write_comparison, write_report

    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    jobs = write_demo(target)
    for job in jobs:
        print(write_report(job, job / "report.html", texts=target / "new-task.jsonl"))
    print(write_comparison(jobs, target / "comparison.html"))

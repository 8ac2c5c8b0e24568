"""One contender in a process of its own: prints a JSON object with seconds, peak memory and losses.

    python -m tests.bench.train_step.contenders NAME MODEL_DIRECTORY CASE_AS_JSON

Seconds are of the counted steps; the peak is the process's resident memory over its whole life.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from modeseek_ray.types import Evidence, Objective, Sample, StepPlan
from tests.bench.train_step.workload import LEARNING_RATE, WARM_UP_STEPS, Case, make_samples


@dataclass
class Outcome:
    seconds: list[float] = field(default_factory=list)  # one per counted step
    cpu_seconds: list[float] = field(
        default_factory=list
    )  # of all threads; far below threads x seconds = disturbed
    losses: list[float] = field(default_factory=list)  # one per step, the warm-up included
    peak_bytes: int = 0
    log_probs: list[float] = field(default_factory=list)  # scorers: of the first batch's samples


class Clock:
    """Times a step: wall clock and CPU. Steps that do not count are measured and forgotten."""

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def start(self) -> None:
        self._started = time.perf_counter(), time.process_time()

    def stop(self, *, counts: bool) -> None:
        if counts:
            self._outcome.seconds.append(time.perf_counter() - self._started[0])
            self._outcome.cpu_seconds.append(time.process_time() - self._started[1])


def batches(case: Case) -> Iterator[tuple[bool, list[Sample]]]:
    """Each step's samples, and whether it counts."""
    samples = make_samples(case)
    for step in range(WARM_UP_STEPS + case.steps):
        yield step >= WARM_UP_STEPS, samples[step * case.batch_size : (step + 1) * case.batch_size]


def trl_sft(model: Path, case: Case) -> Outcome:
    """TRL's `SFTTrainer` with its defaults, but for gradient checkpointing, which is off: that is faster."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    outcome = Outcome()
    clock = Clock(outcome)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, _: Any, state: Any, __: Any, **___: Any) -> None:
            clock.stop(counts=state.global_step > WARM_UP_STEPS)

        def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, float], **____: Any) -> None:
            if "loss" in logs:
                outcome.losses.append(logs["loss"])

    torch.set_num_threads(case.threads)
    rows = [
        {"input_ids": s.token_ids_T.tolist(), "completion_mask": s.trained_T.astype(int).tolist()}
        for s in make_samples(case)
    ]
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(
            output_dir=str(model.parent / "trl"),
            per_device_train_batch_size=case.batch_size,
            max_steps=WARM_UP_STEPS + case.steps,
            max_length=case.length,
            completion_only_loss=True,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        callbacks=[Watch()],
    )
    trainer.train()
    return outcome


def our_sft(model: Path, case: Case) -> Outcome:
    """`TrainerRank.step` with weights of one: DeepSpeed ZeRO-2 on one rank."""
    return _our_steps(model, case, weighted=False)


def our_weighted(model: Path, case: Case) -> Outcome:
    """Score, weigh by policy_over_initial, step on the kept graph: all of it is timed."""
    return _our_steps(model, case, weighted=True)


def _our_steps(model: Path, case: Case, *, weighted: bool) -> Outcome:
    from actors.network import free_port
    from actors.trainer import TrainerRank, TrainerSpec
    from modeseek_ray.config import Resources, Training
    from modeseek_ray.weights import Weighting, weigh

    spec = TrainerSpec(
        model_path=str(model),
        objective=Objective(),
        training=Training(),
        resources=Resources(cpus_per_worker=float(case.threads), keep_graph="always" if weighted else "auto"),
        seed=0,
    )
    rank = TrainerRank(spec, 0, 1, "127.0.0.1", free_port())
    rank.setup()
    likelihood = {"scheme": "ratio_power", "of": "policy_over_initial", "gamma": 0.5}
    weighting = Weighting.model_validate({"likelihood": likelihood}) if weighted else Weighting()
    # What the reference pool has scored before training; here any numbers near the truth serve.
    expected = -np.log(case.vocabulary) * np.array([s.num_tokens for s in make_samples(case)])
    outcome, progress = Outcome(), 0.0
    clock = Clock(outcome)
    for step, (counts, samples) in enumerate(batches(case)):
        picks = [(0, i) for i in range(len(samples))]
        num_tokens_N = np.array([s.num_tokens for s in samples])
        reference_N = expected[step * case.batch_size : (step + 1) * case.batch_size]
        clock.start()
        values_N = np.ones(len(samples))
        if weighted:
            log_policy_N = rank.score(picks, samples)
            evidence = Evidence(log_policy_N, reference_N, num_tokens_N)
            values_N = weigh(evidence, weighting, progress=progress).values_N
        plan = StepPlan(step, values_N, float(num_tokens_N.sum()), LEARNING_RATE)
        report = rank.step(picks, plan, samples)
        clock.stop(counts=counts)
        outcome.losses.append(report.nll_sum / report.num_tokens)
        progress = (step + 1) / (WARM_UP_STEPS + case.steps)
    rank.close()
    return outcome


def our_scorer(model: Path, case: Case) -> Outcome:
    """`ReferenceModel.score`, as the reference pool runs it."""
    from actors.reference import ReferenceModel, ScoringSpec

    spec = ScoringSpec(
        str(model), micro_batch_tokens=case.tokens_per_step, cpus_per_worker=float(case.threads)
    )
    scorer = ReferenceModel(spec)
    return _timed_scores(
        case, lambda samples: scorer.score([(0, i) for i in range(len(samples))], samples).tolist()
    )


def bare_scorer(model: Path, case: Case) -> Outcome:
    """A transformers forward pass a sample at a time; its logits are reduced at once and kept nowhere."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(case.threads)
    causal_lm = AutoModelForCausalLM.from_pretrained(model).eval()

    @torch.inference_mode()
    def score(samples: list[Sample]) -> list[float]:
        sums = []
        for sample in samples:
            ids_T = torch.from_numpy(sample.token_ids_T).long()
            logits_TV = causal_lm(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
            log_prob_T = -F.cross_entropy(logits_TV, ids_T[1:], reduction="none")
            sums.append(float(log_prob_T[torch.from_numpy(sample.trained_T[1:])].double().sum()))
        return sums

    return _timed_scores(case, score)


def _timed_scores(case: Case, score: Callable[[list[Sample]], list[float]]) -> Outcome:
    outcome = Outcome()
    clock = Clock(outcome)
    for counts, samples in batches(case):
        clock.start()
        log_probs = score(samples)
        clock.stop(counts=counts)
        outcome.log_probs = outcome.log_probs or log_probs
    return outcome


CONTENDERS: dict[str, Callable[[Path, Case], Outcome]] = {
    "trl_sft": trl_sft,
    "our_sft": our_sft,
    "our_weighted": our_weighted,
    "bare_scorer": bare_scorer,
    "our_scorer": our_scorer,
}


def main(name: str, model: str, case: str) -> None:
    sizes = Case(**json.loads(case))
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS=str(sizes.threads), HF_HUB_OFFLINE="1")
    outcome = CONTENDERS[name](Path(model), sizes)
    outcome.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps(asdict(outcome)))


if __name__ == "__main__":
    main(*sys.argv[1:])

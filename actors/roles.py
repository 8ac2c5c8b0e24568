"""What the driver asks of others: async protocols, and nothing about who answers.

`pools.py` implements them over worker processes (Ray actors, or objects in this process);
unit tests implement them with small fakes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from modeseek_ray.types import (
    Completion,
    EvalReport,
    Group,
    IntArray,
    Prompt,
    StepPlan,
    StepReport,
    Weights,
)

Desired = Literal["run", "cancel", "pause"]


class Source(Protocol):
    """Where groups come from: rows of a data set, or fresh samples. One item = one global batch."""

    def __aiter__(self) -> AsyncIterator[list[Group]]: ...

    def state(self) -> Mapping[str, Any]:
        """The cursor behind the last batch handed out: JSON-serialisable, exact to resume from."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def observe(self, groups: Sequence[Group], weights: Weights) -> None:
        """What the samples of the batch counted, which may decide what is handed out later."""
        ...

    def figures(self) -> Mapping[str, float]:
        """What there is to say of the batch handed out last, by flat names."""
        ...


class Scorer(Protocol):
    """A frozen model: how likely were these samples?"""

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups in the same order with `log_reference_N` filled in."""
        ...

    async def close(self) -> None: ...


class Trainer(Protocol):
    """The policy, sharded over ranks."""

    async def remember_start(self, probes: Sequence[Group]) -> None:
        """Keep what exact KL to pi_0 needs on these rows too. Await before `load` and before the first step."""
        ...

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with `log_policy_N`. May keep the graph for the next `step` on the same groups."""
        ...

    async def begin(self, groups: Sequence[Group], parts: Sequence[IntArray] | None = None) -> list[Group]:
        """`score`, and keep what inner steps are compared with until the next `begin`.

        Per-token log-probabilities (and R2's routes) stay on the rank that computed them, so `step`
        may be handed any part of these samples. `parts` are the ones it will be handed, as positions in
        the batch: each is then shared out evenly among the ranks. Fills `log_policy_N`, and `sum_delta_N` of
        the ratio that the objective's `delta_of` names, where its denominator is known.
        """
        ...

    async def step(self, groups: Sequence[Group], plan: StepPlan) -> StepReport:
        """One optimizer step over the global batch; `plan.values_N` is in the order of the groups' samples."""
        ...

    async def evaluate(self, groups: Sequence[Group], *, kl: bool = False) -> EvalReport:
        """Loss, greedy accuracy and entropy of the current policy; `kl` needs `remember_start` of the same groups."""
        ...

    async def distance_from_start(self) -> float:
        """Norm of theta - theta_0 over all trained parameters (with LoRA, of the merged weights)."""
        ...

    async def save(self, directory: Path) -> None:
        """Write every rank's shard and RNG into `directory`. Await before the next `step`, which mutates them."""
        ...

    async def load(self, directory: Path) -> str | None:
        """Continue from `save`. Returns what is not exact about it, as a sentence; None where all is."""
        ...

    async def export(self, directory: Path) -> None:
        """Write Hugging Face safetensors (merged, and the adapter beside it with LoRA)."""
        ...

    async def close(self) -> None: ...


class Generator(Protocol):
    """Writes samples: N completions a prompt, with the log-probabilities they were drawn from."""

    @property
    def version(self) -> int:
        """Of the weights that write now; 0 = the starting model's."""
        ...

    async def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[list[Completion]]:
        """The completions of each prompt, in order. The same (job, prompt, round) gives the same requests."""
        ...

    async def close(self) -> None: ...


class WeightChannel(Protocol):
    """Trainer to generator: versioned, all or nothing, verified by log-probabilities."""

    async def sync(self, version: int) -> Mapping[str, float]:
        """Make every engine write with the trainer's weights from now on, as `version`.

        Awaits requests in flight; none is written by two versions. Returns figures: seconds, bytes,
        and the largest difference of a canary's log-probabilities between the two engines. Raises
        `NumericsError`, both numbers in it, when that is over the tolerance.
        """
        ...

    def compare_samples(self, groups: Sequence[Group]) -> None:
        """Hold the trainer's log-probabilities of samples against those their engine recorded.

        Of those alone that the weights of now wrote and the trainer has scored. Raises `NumericsError`, as `sync`.
        """
        ...


class Journal(Protocol):
    """The job's memory: events, metrics, the per-sample ledger, checkpoints."""

    async def message(
        self, text: str, *, level: Literal["info", "warn", "error"] = "info", **data: Any
    ) -> None: ...

    async def section(self, name: str, *, deadline_s: float) -> None:
        """Say what is being done now and when to worry."""
        ...

    async def record(
        self, step: int, groups: Sequence[Group], weights: Weights, report: StepReport, total_steps: int
    ) -> None: ...

    async def skipped(self, step: int, figures: Mapping[str, float], total_steps: int) -> None:
        """A batch had no sample to train on; the weights stayed as they were."""
        ...

    async def evaluated(
        self, step: int, reports: Mapping[str, EvalReport], figures: Mapping[str, float] | None = None
    ) -> None:
        """`figures` are of the model as a whole, by flat names."""
        ...

    async def checkpoint(self, step: int, directory: Path, metrics: Mapping[str, float]) -> None:
        """Commit a checkpoint that is complete on disk."""
        ...

    async def forget(self, checkpoints: Sequence[Path]) -> None:
        """List these no more. Await before their files are removed."""
        ...

    async def desired(self) -> Desired:
        """What the user wants of this job now. Asked once per step."""
        ...

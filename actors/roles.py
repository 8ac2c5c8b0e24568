"""What the driver asks of others: async protocols, and nothing about who answers.

`pools.py` implements them over worker processes (Ray actors, or objects in this process);
unit tests implement them with small fakes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from modeseek_ray.types import EvalReport, Group, Prompt, StepPlan, StepReport, Weights

Desired = Literal["run", "cancel", "pause"]


class Source(Protocol):
    """Where groups come from: rows of a data set, or fresh samples. One item = one global batch."""

    def __aiter__(self) -> AsyncIterator[list[Group]]: ...

    def state(self) -> Mapping[str, Any]:
        """The cursor behind the last batch handed out: JSON-serialisable, exact to resume from."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...


class Scorer(Protocol):
    """A frozen model: how likely were these samples?"""

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups in the same order with `log_reference_N` filled in."""
        ...

    async def close(self) -> None: ...


class Trainer(Protocol):
    """The policy, sharded over ranks."""

    async def remember_start(self, retention: Sequence[Group]) -> None:
        """Keep what exact KL to pi_0 needs on these rows. Await before `load` and before the first step."""
        ...

    async def score(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups with `log_policy_N`. May keep the graph for the next `step` on the same groups."""
        ...

    async def step(self, groups: Sequence[Group], plan: StepPlan) -> StepReport:
        """One optimizer step over the global batch; `plan.values_N` is in the order of the groups' samples."""
        ...

    async def evaluate(self, groups: Sequence[Group], *, kl: bool = False) -> EvalReport:
        """Loss and greedy accuracy of the current policy; `kl` needs `remember_start` of the same groups."""
        ...

    async def save(self, directory: Path) -> None:
        """Write every rank's shard and RNG into `directory`. Await before the next `step`, which mutates them."""
        ...

    async def load(self, directory: Path) -> None: ...

    async def export(self, directory: Path) -> None:
        """Write Hugging Face safetensors (merged, and the adapter beside it with LoRA)."""
        ...

    async def close(self) -> None: ...


class Generator(Protocol):
    """Writes samples: N completions a prompt, with the log-probabilities they were drawn from."""

    async def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[Group]: ...

    async def close(self) -> None: ...


class WeightChannel(Protocol):
    """Trainer to generator: versioned, all or nothing, verified by log-probabilities."""

    async def sync(self, trainer: Trainer, generator: Generator) -> int: ...


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

    async def evaluated(self, step: int, reports: Mapping[str, EvalReport]) -> None: ...

    async def checkpoint(self, step: int, directory: Path, metrics: Mapping[str, float]) -> None:
        """Commit a checkpoint that is complete on disk."""
        ...

    async def desired(self) -> Desired:
        """What the user wants of this job now. Asked once per step."""
        ...

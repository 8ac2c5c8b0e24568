"""Where an online job's groups come from: prompts answered by the generator, graded, and kept on disk.

    round  one global batch: P prompts x N samples, written by one or a few versions of the weights

A round is sampled, graded and stored by a task of its own. With `max_staleness` 0 the task starts
when the batch before it has been trained on and the weights were handed over; with k > 0 up to k
rounds are under way meanwhile, and samples that have become older than that are left out.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.answers import Answerer
from actors.roles import Journal
from actors.rollouts import Rollout, RolloutStore, by_prompt
from actors.sources import Put
from modeseek_ray import config
from modeseek_ray.errors import StorageError
from modeseek_ray.types import Group, Handle, IntArray, Prompt, Sample, Weights
from modeseek_ray.weights import PromptLedger, draw_prompts
from modeseek_ray.weights.steering import Steering

_SHOWN_TEXT = 400  # characters of a sampled text in an event


@dataclass(frozen=True)
class PromptOrder:
    """Which prompts a round asks: shuffled epochs, one after the other, a pure function of (seed, position).

    >>> order = PromptOrder(num_prompts=3, seed=0)
    >>> sorted(order.take(0, 3)), len(order.take(2, 4))
    ([0, 1, 2], 4)
    """

    num_prompts: int
    seed: int

    def take(self, start: int, count: int) -> list[int]:
        """Positions `start` to `start + count` of the endless order."""
        epochs = range(start // self.num_prompts, -(-(start + count) // self.num_prompts))
        order = np.concatenate(
            [np.random.default_rng([self.seed, epoch]).permutation(self.num_prompts) for epoch in epochs]
        )
        first = start - epochs[0] * self.num_prompts
        return [int(i) for i in order[first : first + count]]


@dataclass
class Round:
    """What one round gave."""

    number: int
    written: list[Rollout]  # every sample
    kept: list[Rollout]  # without groups whose rewards are all the same
    tied: int  # how many groups that left out
    seconds: dict[str, float] = field(default_factory=dict)  # by part; empty = read from disk


class RolloutSource:
    """`roles.Source` over a generator. `figures` describes the batch that was handed out last."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        settings: config.Rollout,
        answerer: Answerer,
        store: RolloutStore,
        put: Put,
        journal: Journal,
        *,
        rounds: int,
        seed: int,
        steering: Steering = "low_is_unmastered",
    ) -> None:
        """`steering`: how to read small weights, where `settings.steer` draws prompts by them."""
        self._prompts = prompts
        self._settings = settings
        self._answerer = answerer
        self._store = store
        self._put = put
        self._journal = journal
        self._rounds = rounds
        self._order = PromptOrder(len(prompts), seed)
        self._steering = steering
        self._ledger = PromptLedger.empty(len(prompts))
        self._position = {prompt.ordinal: i for i, prompt in enumerate(prompts)}
        self._handed_out = 0
        self._figures: dict[str, float] = {}

    async def __aiter__(self) -> AsyncIterator[list[Group]]:
        under_way: deque[asyncio.Task[Round]] = deque()
        started = self._handed_out
        try:
            while self._handed_out < self._rounds:
                # The batch to hand out, and as many beyond it as may be stale.
                ahead = min(self._rounds, self._handed_out + 1 + self._settings.max_staleness)
                while started < ahead:
                    under_way.append(asyncio.create_task(self._write(started)))
                    started += 1
                waiting = time.monotonic()
                batch = await under_way.popleft()
                self._handed_out += 1
                groups = self._groups(batch)
                self._figures["rollout.wait_s"] = time.monotonic() - waiting
                await self._tell(batch)
                yield groups
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    def figures(self) -> Mapping[str, float]:
        return self._figures

    def recent(self, count: int) -> list[Sample]:
        """Samples of the newest round that was handed out: what to check an export with."""
        for number in reversed(range(self._handed_out)):
            rollouts = self._store.read(number, self._prompts)
            if rollouts:
                return [_sample(r, -1) for r in rollouts[:count]]
        return []

    def observe(self, groups: Sequence[Group], weights: Weights) -> None:
        """Remember what each prompt's samples counted. Rounds that are under way were chosen before."""
        if self._settings.steer > 0:
            row_N = np.concatenate([group.row_N for group in groups])
            position_N = np.array([self._position[int(row)] for row in row_N])
            self._ledger = self._ledger.add(position_N, weights.values_N)

    def state(self) -> Mapping[str, Any]:
        steered = {"ledger": self._ledger.state()} if self._settings.steer > 0 else {}
        return {"round": self._handed_out, "data": self._identity(), **steered}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand behind the round that `state` was taken after. Raises `StorageError` for other prompts."""
        if state["data"] != self._identity():
            raise StorageError(
                f"the checkpoint's rounds are those of {state['data']}, but this job has {self._identity()}.",
                mend="Resume with the same prompts, rollout and seed, or start a new job.",
            )
        self._handed_out = int(state["round"])
        if "ledger" in state:
            self._ledger = PromptLedger.of_state(state["ledger"])

    def _identity(self) -> dict[str, int]:
        return {
            "prompts": len(self._prompts),
            "seed": self._order.seed,
            "prompts_per_round": self._settings.prompts_per_round,
            "samples_per_prompt": self._settings.samples_per_prompt,
        }

    # --- writing a round

    async def _write(self, number: int) -> Round:
        """Sample, grade, store; or read what an earlier attempt stored and may still be trained on."""
        stored = await asyncio.to_thread(self._store.read, number, self._prompts)
        if stored is not None and all(self._is_fresh(r, number) for r in stored):
            return Round(number, stored, *self._without_ties(stored))
        seconds: dict[str, float] = {}
        size = min(self._settings.prompts_per_round, len(self._prompts))
        asked = self._choose(number, size)
        written = await self._answer(asked, number, seconds)
        kept, tied = self._without_ties(written)
        if tied and self._settings.ties == "resample":
            others = PromptOrder(len(self._prompts), self._order.seed + 1).take(number * size, size + tied)
            fresh = list(dict.fromkeys(i for i in others if i not in asked))[:tied]
            written += await self._answer(fresh, number, seconds)
            kept, tied = self._without_ties(written)
        await asyncio.to_thread(self._store.write, number, written)
        return Round(number, written, kept, tied, seconds)

    def _choose(self, number: int, size: int) -> list[int]:
        """Which prompts a round asks, none twice: in shuffled epochs, or by what they weighed so far."""
        if self._settings.steer == 0:
            return list(dict.fromkeys(self._order.take(number * size, size)))
        rng = np.random.default_rng([self._order.seed, number])
        drawn = draw_prompts(self._ledger, size, rng, self._settings.steer, steering=self._steering)
        return [int(i) for i in drawn]

    async def _answer(
        self, positions: Sequence[int], round_: int, seconds: dict[str, float]
    ) -> list[Rollout]:
        rollouts, spent = await self._answerer.answer([self._prompts[i] for i in positions], round_)
        for part, value in spent.items():
            seconds[part] = seconds.get(part, 0.0) + value
        return rollouts

    def _is_fresh(self, rollout: Rollout, number: int) -> bool:
        return 0 <= number - rollout.completion.weight_version <= self._settings.max_staleness

    def _without_ties(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], int]:
        """Samples of groups that tell something, and how many groups do not."""
        if self._settings.ties == "keep":
            return list(rollouts), 0
        kept: list[Rollout] = []
        tied = 0
        for group in by_prompt(rollouts):
            rewards = {r.grade.reward for r in group} - {None}
            if len(rewards) > 1:
                kept += group
            else:
                tied += 1
        return kept, tied

    # --- handing it out

    def _groups(self, batch: Round) -> list[Group]:
        """Groups of the samples that may be trained on. All of a round's samples are one block."""
        graded = [r for r in batch.kept if r.grade.reward is not None]
        fresh = [r for r in graded if self._is_fresh(r, batch.number)]
        asked = by_prompt(fresh)
        samples = [_sample(r, group) for group, members in enumerate(asked) for r in members]
        block = self._put(samples)
        ends = np.cumsum([len(members) for members in asked], dtype=np.int64)
        groups = [
            _group(samples, np.arange(end - len(members), end), block)
            for end, members in zip(ends, asked, strict=True)
        ]
        self._figures = self._describe(batch, fresh, len(graded) - len(fresh))
        return groups

    def _describe(self, batch: Round, fresh: Sequence[Rollout], stale: int) -> dict[str, float]:
        """Of all that was written, ties included: what the policy is worth. Of what is left out: how much."""
        rewards = [r.grade.reward for r in batch.written if r.grade.reward is not None]
        lengths = [r.completion.num_tokens for r in batch.written]
        figures = {
            "rollout.written": float(len(batch.written)),
            "rollout.samples": float(len(fresh)),
            "rollout.tied_groups": float(batch.tied),
            "rollout.failed_samples": float(len(batch.written) - len(rewards)),
            "rollout.stale_samples": float(stale),
            "rollout.reused": float(not batch.seconds),
            "rollout.tokens": float(sum(lengths)),
            **{f"rollout.{part}_s": value for part, value in batch.seconds.items()},
        }
        if rewards:
            figures |= {
                "rollout.reward": float(np.mean(rewards)),
                "rollout.reward_std": float(np.std(rewards)),
            }
        if lengths:
            cut = [r.completion.finish_reason == "length" for r in batch.written]
            figures |= {
                "rollout.mean_tokens": float(np.mean(lengths)),
                "rollout.cut_share": float(np.mean(cut)),
            }
        if fresh:
            ages = [batch.number - r.completion.weight_version for r in fresh]
            figures["rollout.staleness"] = float(np.mean(ages))
        return figures

    async def _tell(self, batch: Round) -> None:
        """Show one question with its answers side by side."""
        if not batch.written:
            return
        group = by_prompt(batch.written)[0]
        shown = [
            {"text": r.text[:_SHOWN_TEXT], "reward": r.grade.reward, "error": r.grade.error}
            for r in group[:8]
        ]
        question = self._answerer.text_of(group[0].prompt.token_ids_T)[-_SHOWN_TEXT:]
        reward = self._figures.get("rollout.reward", float("nan"))
        await self._journal.message(
            f"Round {batch.number + 1}: {len(batch.written)} samples, mean reward {reward:.3f}.",
            prompt=question,
            rollouts=shown,
        )


def _sample(rollout: Rollout, group: int) -> Sample:
    token_ids_T = rollout.token_ids_T
    written = rollout.completion.num_tokens
    trained_T = np.arange(len(token_ids_T)) >= len(token_ids_T) - written
    log_behavior_T = np.zeros(len(token_ids_T), dtype=np.float32)
    log_behavior_T[trained_T] = rollout.completion.log_prob_T
    return Sample(
        row=rollout.prompt.ordinal,
        token_ids_T=token_ids_T,
        trained_T=trained_T,
        prior=float(rollout.prompt.reference.get("weight", 1.0)),
        reward=rollout.grade.reward,
        group=group,
        log_behavior=float(rollout.completion.log_prob_T.astype(np.float64).sum()),
        log_behavior_T=log_behavior_T,
        task=str(rollout.prompt.reference.get("task", "")),
        weight_version=rollout.completion.weight_version,
        routes_TLK=rollout.completion.routes_TLK,
    )


def _group(samples: Sequence[Sample], index_N: IntArray, block: Any) -> Group:
    chosen = [samples[i] for i in index_N]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(s, name) for s in chosen])

    return Group(
        prompt=chosen[0].group,
        row_N=column("row"),
        num_tokens_N=column("num_tokens"),
        length_N=column("length"),
        payload=Handle(block=block, index_N=index_N),
        prior_N=column("prior").astype(np.float64),
        is_replay_N=np.zeros(len(chosen), dtype=bool),
        rewards_N=column("reward").astype(np.float64),
        log_behavior_N=column("log_behavior"),
        weight_version_N=column("weight_version"),
    )

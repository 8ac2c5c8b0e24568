"""Rounds of an online job: written once, kept on disk, never staler than allowed; the generator is a fake."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.answers import Answerer
from actors.rollout_source import PromptOrder, RolloutSource
from actors.rollouts import RolloutStore
from modeseek_ray.config import Rollout
from modeseek_ray.errors import StorageError
from modeseek_ray.rewards import Grade, GradeItem, GraderError
from modeseek_ray.types import Completion, Group, Prompt, Weights

PROMPTS = [Prompt(i, np.array([10 + i], dtype=np.int32), {"task": "t", "weight": 2.0}) for i in range(7)]


class FakeGenerator:
    """Writes one token that names prompt, round and sample; takes as long as it is told."""

    def __init__(self, samples: int, delays: Sequence[float] = ()) -> None:
        self.version = 0
        self.asked: list[tuple[int, tuple[int, ...]]] = []
        self._samples = samples
        self._delays = list(delays)

    async def sample(self, prompts: Sequence[Prompt], *, round_: int) -> list[list[Completion]]:
        version = self.version
        self.asked.append((round_, tuple(p.ordinal for p in prompts)))
        await asyncio.sleep(self._delays.pop() if self._delays else 0)
        return [[self._completion(p, i, round_, version) for i in range(self._samples)] for p in prompts]

    def _completion(self, prompt: Prompt, index: int, round_: int, version: int) -> Completion:
        routes = np.full((2, 1, 2), index, dtype=np.uint8)
        token = 100 * round_ + 10 * prompt.ordinal + index
        return Completion(
            np.array([token, 3], dtype=np.int32),
            np.array([-1.0, -0.5], dtype=np.float32),
            "stop",
            version,
            seed=2**63 + token,
            routes_TLK=routes,
        )

    async def close(self) -> None: ...


class FakeGrader:
    """Rewards by sample number, unless told that some prompts tie or some samples fail."""

    def __init__(self, *, tied: Sequence[int] = (), failing: bool = False) -> None:
        self._tied, self._failing = tied, failing

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        return [self._grade(int(item.text.split()[0])) for item in items]

    def _grade(self, token: int) -> Grade:
        prompt, index = token // 10 % 10, token % 10
        if self._failing and index == 0:
            return Grade(None, "the judge is away")
        return Grade(1.0 if prompt in self._tied else float(index))

    async def close(self) -> None: ...


class Digits:
    def decode(self, token_ids_T: Any, *, skip_special: bool = False) -> str:
        return " ".join(str(int(t)) for t in token_ids_T)


class Messages:
    def __init__(self) -> None:
        self.data: list[dict[str, Any]] = []

    async def message(self, text: str, *, level: str = "info", **data: Any) -> None:
        self.data.append(data)


def make(
    directory: Path,
    generator: FakeGenerator,
    *,
    grader: FakeGrader | None = None,
    rounds: int = 5,
    **rollout: Any,
) -> RolloutSource:
    chosen = Rollout(**{"samples_per_prompt": 2, "prompts_per_round": 3, **rollout})
    return RolloutSource(
        PROMPTS,
        chosen,
        Answerer(generator, grader or FakeGrader(), Digits(), max_failed_share=chosen.max_failed_share),
        RolloutStore(directory),
        lambda block: block,
        Messages(),  # type: ignore[arg-type]
        rounds=rounds,
        seed=0,
    )


async def train(
    source: RolloutSource, generator: FakeGenerator, delay: Any = lambda: 0.0
) -> list[list[Group]]:
    """What the driver does: take a batch, train, hand the weights over."""
    batches = []
    async for groups in source:
        batches.append(groups)
        await asyncio.sleep(delay())
        generator.version += 1
    return batches


def tokens(groups: Sequence[Group]) -> list[int]:
    return [int(g.payload.block[i].token_ids_T[1]) for g in groups for i in g.payload.index_N]


def test_epochs_follow_each_other_and_ask_everything() -> None:
    order = PromptOrder(7, seed=3)
    assert sorted(order.take(0, 7)) == sorted(order.take(7, 7)) == list(range(7))
    assert order.take(0, 7) != order.take(7, 7)
    assert order.take(0, 5) + order.take(5, 6) == order.take(0, 11)


def test_a_round_becomes_groups(tmp_path: Path) -> None:
    generator = FakeGenerator(2)
    source = make(tmp_path, generator, rounds=1)
    ((first, *others),) = asyncio.run(train(source, generator))
    assert len(others) == 2
    sample = first.payload.block[first.payload.index_N[1]]
    ordinal = sample.row
    assert sample.token_ids_T.tolist() == [10 + ordinal, 10 * ordinal + 1, 3]
    assert sample.trained_T.tolist() == [False, True, True]
    assert sample.log_behavior_T.tolist() == [0.0, -1.0, -0.5]
    assert sample.routes_TLK.shape == (2, 1, 2)
    assert first.rewards_N is not None and first.rewards_N.tolist() == [0.0, 1.0]
    assert first.log_behavior_N is not None and first.log_behavior_N.tolist() == [-1.5, -1.5]
    assert first.prior_N is not None and first.prior_N.tolist() == [2.0, 2.0]
    assert source.figures()["rollout.reward"] == 0.5


def test_ties_are_left_out_but_count_in_the_mean_reward(tmp_path: Path) -> None:
    generator = FakeGenerator(2)
    source = make(tmp_path, generator, grader=FakeGrader(tied=range(7)), rounds=1)
    assert asyncio.run(train(source, generator)) == [[]]
    figures = source.figures()
    assert figures["rollout.tied_groups"] == 3 and figures["rollout.reward"] == 1.0


def test_kept_ties_are_trained_on(tmp_path: Path) -> None:
    generator = FakeGenerator(2)
    (groups,) = asyncio.run(
        train(make(tmp_path, generator, grader=FakeGrader(tied=range(7)), rounds=1, ties="keep"), generator)
    )
    assert len(groups) == 3


def test_tied_questions_are_replaced_by_others(tmp_path: Path) -> None:
    generator = FakeGenerator(2)
    asked = PromptOrder(7, 0).take(0, 3)
    source = make(tmp_path, generator, grader=FakeGrader(tied=asked[:1]), rounds=1, ties="resample")
    (groups,) = asyncio.run(train(source, generator))
    assert [len(prompts) for _, prompts in generator.asked] == [3, 1]
    assert set(generator.asked[1][1]).isdisjoint(asked) and len(groups) == 3
    again = make(tmp_path, FakeGenerator(2), grader=FakeGrader(tied=asked[:1]), rounds=1, ties="resample")
    (same,) = asyncio.run(train(again, FakeGenerator(2)))
    assert tokens(same) == tokens(groups)


def test_prompts_that_weigh_little_are_asked_more(tmp_path: Path) -> None:
    """Prompt 3 weighs next to nothing, the others a lot: steered wholly, it is in every later round."""
    generator = FakeGenerator(2)
    source = make(tmp_path, generator, rounds=12, steer=1.0)

    async def train_and_tell() -> None:
        async for groups in source:
            rows_N = np.concatenate([g.row_N for g in groups])
            values_N = np.where(rows_N == 3, 1e-3, 50.0)
            source.observe(groups, Weights(values_N, None, None, 1.0, "none"))
            generator.version += 1

    asyncio.run(train_and_tell())
    asked = [prompts for _, prompts in generator.asked]
    first = next(i for i, prompts in enumerate(asked) if 3 in prompts)
    assert all(3 in prompts for prompts in asked[first:]) and first < 11
    other = make(tmp_path / "other", again := FakeGenerator(2), rounds=13, steer=1.0)
    other.restore(source.state())  # 12 rounds: the ledger comes with the checkpoint
    asyncio.run(train(other, again))
    assert 3 in again.asked[0][1]


def test_failing_samples_are_left_out_and_too_many_stop_the_job(tmp_path: Path) -> None:
    generator = FakeGenerator(3)
    failing = FakeGrader(failing=True)
    source = make(tmp_path, generator, grader=failing, rounds=1, samples_per_prompt=3, max_failed_share=0.4)
    (groups,) = asyncio.run(train(source, generator))
    assert [len(g) for g in groups] == [2, 2, 2] and source.figures()["rollout.failed_samples"] == 3
    with pytest.raises(GraderError, match="the judge is away"):
        asyncio.run(
            train(make(tmp_path / "other", generator, grader=failing, max_failed_share=0.1), generator)
        )


def test_a_resumed_job_reads_what_was_written(tmp_path: Path) -> None:
    """Rounds after the checkpoint, already on disk, are not written again; the batches are the same."""
    generator = FakeGenerator(2)
    source = make(tmp_path, generator)
    whole = asyncio.run(train(source, generator))
    resumed, fresh = make(tmp_path, again := FakeGenerator(2)), 2
    resumed.restore({**source.state(), "round": fresh})
    again.version = fresh
    rest = asyncio.run(train(resumed, again))
    assert again.asked == [] and resumed.figures()["rollout.reused"] == 1.0
    for before, after in zip(whole[fresh:], rest, strict=True):
        assert tokens(before) == tokens(after)
        np.testing.assert_array_equal(
            [s.routes_TLK for s in before[0].payload.block], [s.routes_TLK for s in after[0].payload.block]
        )


def test_rounds_of_other_prompts_are_refused(tmp_path: Path) -> None:
    source = make(tmp_path, FakeGenerator(2))
    other = make(tmp_path, FakeGenerator(2), samples_per_prompt=4)
    with pytest.raises(StorageError, match="start a new job"):
        other.restore(source.state())


@settings(max_examples=40, deadline=None)
@given(
    staleness=st.integers(0, 3),
    sampling=st.lists(st.floats(0, 0.004), max_size=8),
    training=st.lists(st.floats(0, 0.004), min_size=8, max_size=8),
)
def test_no_sample_is_older_than_allowed(
    staleness: int, sampling: list[float], training: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever takes how long: every round once, in order, and never staler than `max_staleness`."""
    generator = FakeGenerator(2, sampling)
    source = make(tmp_path_factory.mktemp("rounds"), generator, max_staleness=staleness, rounds=8)
    batches = asyncio.run(train(source, generator, training.copy().pop))
    assert sorted(r for r, _ in generator.asked) == list(range(8))
    asked = dict(generator.asked)
    for trained_at, groups in enumerate(batches):
        versions = np.concatenate([g.weight_version_N for g in groups if g.weight_version_N is not None])
        assert (versions >= trained_at - staleness).all() and (versions <= trained_at).all()
        assert len(versions) == 2 * len(asked[trained_at])  # nothing dropped either


def test_samples_that_became_too_old_are_dropped_and_counted(tmp_path: Path) -> None:
    """A generator that does not take the new weights: from the second round on its samples are stale."""
    generator = FakeGenerator(2)
    source = make(tmp_path, generator, rounds=2)

    async def forget_to_sync() -> list[tuple[int, float]]:
        return [(len(groups), source.figures()["rollout.stale_samples"]) async for groups in source]

    assert asyncio.run(forget_to_sync()) == [(3, 0.0), (0, 6.0)]


def test_all_rounds_are_one_file_another_job_can_train_on(tmp_path: Path, tiny_dense: Path) -> None:
    from modeseek_ray.data.loading import load_samples
    from modeseek_ray.data.tokenizer import ChatTokenizer

    generator = FakeGenerator(2)
    store = RolloutStore(tmp_path)
    asyncio.run(train(make(tmp_path, generator, rounds=2), generator))
    path = store.gathered(tmp_path / "rollouts.parquet", 2)
    samples = load_samples(path, ChatTokenizer(tiny_dense), max_length=None)
    assert len(samples) == 12 and len({s.group for s in samples}) == 6
    assert samples[0].log_behavior == -1.5 and {s.reward for s in samples} == {0.0, 1.0}


def test_a_round_is_on_the_disk_with_its_name_when_it_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename lasts through a power cut once its directory is flushed, and not before."""
    synced: list[tuple[str, bool]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, (tmp_path / "rollouts" / "round-000003.parquet").exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    RolloutStore(tmp_path / "rollouts").write(3, [])
    assert synced[-1] == ("rollouts", True)
    assert (tmp_path.name, False) in synced  # the directory itself is new

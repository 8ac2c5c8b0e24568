"""Routing replay in the trainer's passes: R3 and R2, on ZeRO-3, with kept graphs, with recomputation.

What routes are is tested in tests/modeseek_ray/routing; here, that each pass of the trainer takes
the ones it should.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modeseek_ray.errors import DataError, ModelError
from modeseek_ray.types import Objective, Sample
from tests.actors import ranks as inside
from tests.actors.ranks import Start, Trainer, plan_for, relative_difference
from tests.actors.test_trainer_ratios import HALVES, VALUES, run

EVERYTHING = [np.arange(8)]
R3 = Objective(routing_replay="R3")
LAYOUTS = [
    (1, {"zero_stage": 2}),  # graphs kept
    (1, {"zero_stage": 2, "keep_graph": "never"}),
    (
        1,
        {"zero_stage": 2, "gradient_checkpointing": True},
    ),  # kept, and recomputed after other micro-batches ran
    (2, {"zero_stage": 3}),
    (2, {"zero_stage": 3, "gradient_checkpointing": True}),
]
NAMES = ["kept", "again", "recomputed", "zero-3", "zero-3-recomputed"]


@pytest.fixture
def live(start: Start, samples: list[Sample], tiny_moe: Path) -> list[np.ndarray]:
    """The experts that tiny_moe asks on the samples."""
    found: list[np.ndarray] = start(model=tiny_moe).inside(inside.live_routes, samples)[0]
    return found


def carrying(samples: Sequence[Sample], routes: Sequence[np.ndarray]) -> list[Sample]:
    return [
        dataclasses.replace(s, routes_TLK=r.astype(np.uint8)) for s, r in zip(samples, routes, strict=True)
    ]


def others(routes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of four experts the two that were not asked."""
    return [
        np.argsort([[(row == e).any() for e in range(4)] for row in r.reshape(-1, 2)], axis=1, kind="stable")[
            :, :2
        ].reshape(r.shape)
        for r in routes
    ]


@pytest.mark.parametrize(("world_size", "options"), LAYOUTS, ids=NAMES)
def test_own_routes_change_no_bit_and_others_do(
    start: Start,
    samples: list[Sample],
    tiny_moe: Path,
    live: list[np.ndarray],
    world_size: int,
    options: dict[str, Any],
) -> None:
    def train(objective: Objective, batch: list[Sample]) -> tuple[str, float, dict[str, np.ndarray]]:
        trainer = start(model=tiny_moe, world_size=world_size, objective=objective, **options)
        trainer.inside(inside.capture_gradients)
        [report] = run(trainer, batch, EVERYTHING, rate=1e-3).reports
        return trainer.sha256(), report.loss, trainer.inside(inside.captured_gradients)[0]

    plain = train(Objective(), samples)
    own = train(R3, carrying(samples, live))
    assert own[:2] == plain[:2]
    forced = train(R3, carrying(samples, others(live)))
    assert abs(forced[1] - plain[1]) > 1e-4
    router = next(name for name in forced[2] if name.endswith("mlp.gate.weight"))
    assert np.abs(forced[2][router]).max() > 1e-6, "gate values are live: routers learn under replay"
    assert relative_difference(plain[2], forced[2]) > 1e-2


def test_forced_routes_give_one_gradient_on_every_layout(
    start: Start, samples: list[Sample], tiny_moe: Path, live: list[np.ndarray]
) -> None:
    found = []
    for world_size, options in LAYOUTS:
        trainer = start(model=tiny_moe, world_size=world_size, objective=R3, **options)
        trainer.inside(inside.capture_gradients)
        run(trainer, carrying(samples, others(live)), EVERYTHING)
        found.append(trainer.inside(inside.captured_gradients)[0])
    for other in found[1:]:
        assert relative_difference(found[0], other) < 1e-6


@pytest.mark.parametrize(("world_size", "options"), [LAYOUTS[0], LAYOUTS[4]], ids=[NAMES[0], NAMES[4]])
def test_r2_replays_what_the_policy_asked_when_the_batch_began(
    start: Start,
    samples: list[Sample],
    tiny_moe: Path,
    live: list[np.ndarray],
    world_size: int,
    options: dict[str, Any],
) -> None:
    """R2 over inner steps is R3 with the routes that were live at the beginning; live routing is not."""
    hashes = []
    for replay, batch in (("R2", samples), ("R3", carrying(samples, live)), (None, samples)):
        trainer = start(
            model=tiny_moe,
            world_size=world_size,
            objective=Objective(routing_replay=replay),  # type: ignore[arg-type]
            **options,
        )
        run(trainer, batch, [*HALVES, *HALVES], rate=3e-2)
        hashes.append(trainer.sha256())
    assert hashes[0] == hashes[1]
    assert hashes[2] != hashes[0]


def test_r2_does_not_step_on_graphs_that_were_routed_live(
    start: Start, samples: list[Sample], tiny_moe: Path
) -> None:
    """Scored again after the weights have moved, then stepped on: the routes are still those of `begin`."""
    hashes = []
    for keep_graph in ("auto", "never"):
        trainer = start(model=tiny_moe, objective=Objective(routing_replay="R2"), keep_graph=keep_graph)
        run(trainer, samples, [*HALVES, *HALVES], rate=3e-2)
        trainer.score(samples)
        trainer.step(samples, plan_for(samples, VALUES, step=4))
        hashes.append(trainer.sha256())
    assert hashes[0] == hashes[1]


def test_scoring_follows_the_samples_routes_and_evaluation_does_not(
    start: Start, samples: list[Sample], tiny_moe: Path, live: list[np.ndarray]
) -> None:
    forced = carrying(samples, others(live))
    plain_N = start(model=tiny_moe).score(samples)
    trainer = start(model=tiny_moe, objective=R3)
    assert np.abs(trainer.score(forced) - plain_N).max() > 1e-3
    rows = trainer.per_sample("evaluate", forced, False)
    np.testing.assert_allclose(np.concatenate([part.nll_N for _, part in rows]), -plain_N, rtol=1e-6)


class TestFigures:
    """Two tokens of sample 0 ask other experts, none in common: one in both layers, one in the first alone."""

    @pytest.fixture
    def batch(self, samples: list[Sample], live: list[np.ndarray]) -> list[Sample]:
        routes = [r.copy() for r in live]
        different = others(live)
        routes[0][1] = different[0][1]
        routes[0][2, 0] = different[0][2, 0]
        routes[1] = routes[1][..., ::-1]  # another order is the same set
        batch = carrying(samples, routes)
        open_routes = routes[2].astype(np.int8)
        open_routes[0] = -1
        batch[2] = dataclasses.replace(batch[2], routes_TLK=open_routes)
        return batch

    def expected(self, batch: list[Sample]) -> dict[str, float]:
        num_tokens = sum(s.length - 1 for s in batch) - 1  # one position of sample 2 is left open
        return {
            "routes/changed_token_layers": 3 / (2 * num_tokens),
            "routes/changed_tokens": 2 / num_tokens,
            "routes/overlap": 1 - 3 / (2 * num_tokens),
        }

    def figures(self, trainer: Trainer, batch: list[Sample]) -> dict[str, float]:
        [report] = run(trainer, batch, EVERYTHING).reports
        return {
            k: v
            for k, v in report.figures.items()
            if k.startswith(("routes/changed", "routes/overlap", "mismatch"))
        }

    def test_live_against_the_samplers(self, start: Start, tiny_moe: Path, batch: list[Sample]) -> None:
        for replay in (None, "R2"):
            objective = Objective(routing_replay=replay)  # type: ignore[arg-type]
            trainer = start(model=tiny_moe, world_size=2, objective=objective)
            assert self.figures(trainer, batch) == pytest.approx(self.expected(batch))

    @pytest.mark.parametrize("zero_stage", [2, 3])
    def test_under_replay_a_second_pass_measures_them(
        self, start: Start, tiny_moe: Path, batch: list[Sample], zero_stage: int
    ) -> None:
        """And what replay has mended: with the routes the sampler took, trainer and sampler agree."""
        trainer = start(model=tiny_moe, objective=R3, micro_batch_size=8, zero_stage=zero_stage)
        [forward] = trainer.inside(inside.token_log_probs, batch)
        sampled = [
            dataclasses.replace(s, log_behavior_T=log_prob_T)
            for s, log_prob_T in zip(batch, forward, strict=True)
        ]
        assert "routes/changed_tokens" not in self.figures(trainer, sampled)
        expected_sha256 = trainer.sha256()
        comparing = start(
            model=tiny_moe, objective=R3, micro_batch_size=8, zero_stage=zero_stage, compare_routes=True
        )
        figures = self.figures(comparing, sampled)
        assert {k: figures[k] for k in self.expected(batch)} == pytest.approx(self.expected(batch))
        assert figures["mismatch/max_abs_delta"] == 0
        assert figures["mismatch_live/max_abs_delta"] > 1e-4
        assert comparing.sha256() == expected_sha256, (
            "looking changes nothing, kept graphs on ZeRO-3 least of all"
        )


class TestRefused:
    def test_samples_without_routes(
        self, start: Start, samples: list[Sample], tiny_moe: Path, live: list[np.ndarray]
    ) -> None:
        batch = carrying(samples, live)
        batch[4] = dataclasses.replace(batch[4], routes_TLK=None, is_replay=True)
        trainer = start(model=tiny_moe, objective=R3)
        run(trainer, batch, EVERYTHING)  # a replay row was never sampled: live
        batch[3] = dataclasses.replace(batch[3], routes_TLK=None)
        with pytest.raises(DataError, match="row 3 does not carry routes"):
            trainer.step(batch, plan_for(batch, VALUES))

    @pytest.mark.parametrize("replay", ["R2", "R3"])
    def test_a_dense_model(self, start: Start, replay: Any) -> None:
        with pytest.raises(ModelError, match="MoE"):
            start(objective=Objective(routing_replay=replay))

"""Ranks that share sequences against one rank that holds them whole: same losses, gradients, scores, routes."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.commands.preflight import preflight
from actors.sources import probe_groups
from actors.trainer import TrainerSpec
from modeseek_ray.config import Lora, Resources, Training, parse_config
from modeseek_ray.data.problems import Problems
from modeseek_ray.data.report import DataReport, FileReport
from modeseek_ray.errors import ConfigError
from modeseek_ray.types import EvalReport, Mismatch, Objective, RatioClip, Sample
from modeseek_ray.weights import Evidence, Weighting, weigh
from tests.actors import ranks as inside
from tests.actors.conftest import random_samples
from tests.actors.ranks import Ranks, Start, Trainer, plan_for, relative_difference
from tests.actors.test_trainer_ratios import HALVES, VALUES, run
from tests.actors.test_trainer_routes import carrying, others
from tests.conftest import save_tiny

LORA = Training(lora=Lora(rank=4, alpha=8.0))
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
DEEPSEEK = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
}  # fmt: skip
SHARED = {"world_size": 2, "sequence_parallel": 2}
EVERYTHING = [np.arange(8)]


@pytest.fixture(scope="module")
def long_samples() -> list[Sample]:
    """Eight of 5 to 19 tokens, odd lengths among them: in some the trained half lies on one rank alone."""
    samples = random_samples(8, seed=3)
    assert len({s.length % 2 for s in samples}) == 2
    return samples


def tiny(directory: Path, family: str, **changes: Any) -> Path:
    """A random model of another family, as small as `tiny_dense`."""
    import transformers

    config = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    return save_tiny(directory, config, getattr(transformers, f"{family}ForCausalLM"), **changes)


def near_policy_weights(trainer: Trainer, samples: Sequence[Sample], log_start_N: np.ndarray) -> np.ndarray:
    """`mode_seeking` with gamma from an ESS floor, on what the trainer scores."""
    weighting = Weighting.model_validate(
        {
            "likelihood": {
                "scheme": "ratio_power",
                "of": "policy_over_initial",
                "gamma": {"ess": {"floor": 0.3, "max": 1.0, "warmup": 0.0}},
            }
        }
    )
    evidence = Evidence(
        log_policy_N=trainer.score(samples),
        log_reference_N=log_start_N,
        num_tokens_N=np.array([s.num_tokens for s in samples]),
    )
    weights = weigh(evidence, weighting)
    assert weights.gamma is not None and 0 < weights.gamma <= 1
    return weights.values_N


def course(trainer: Trainer, samples: list[Sample], steps: int = 2) -> dict[str, Any]:
    """Steps under weights from an ESS floor, gradients of the last; what a job would see of them."""
    trainer.inside(inside.capture_gradients)
    log_start_N = trainer.score(samples) + np.linspace(-1.0, 1.0, len(samples))  # as if a start had differed
    losses, scores, values = [], [], []
    for step in range(steps):
        values_N = near_policy_weights(trainer, samples, log_start_N)
        scores.append(trainer.score(samples))
        values.append(values_N)
        losses.append(trainer.loss(samples, plan_for(samples, values_N, step=step)))
    return {
        "losses": losses,
        "scores": np.array(scores),
        "weights": np.array(values),
        "gradients": trainer.inside(inside.captured_gradients)[0],
        "parameters": trainer.inside(inside.parameters)[0],
    }


def agree(found: dict[str, Any], expected: dict[str, Any], *, parameters: float = 1e-6) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-6)
    np.testing.assert_allclose(found["weights"], expected["weights"], rtol=1e-5)
    assert relative_difference(expected["gradients"], found["gradients"]) < 1e-6
    assert relative_difference(expected["parameters"], found["parameters"]) < parameters


class TestSteps:
    @pytest.mark.parametrize(
        "options",
        [
            {"zero_stage": 0},
            {"zero_stage": 1},
            {"zero_stage": 2},  # graphs kept
            {"zero_stage": 2, "keep_graph": "never"},
            {"zero_stage": 2, "gradient_checkpointing": True},
            {"zero_stage": 3},
            {"zero_stage": 3, "gradient_checkpointing": True},
            {"zero_stage": 3, "training": LORA},
        ],
        ids=["0", "1", "2-kept", "2-again", "2-recomputed", "3", "3-recomputed", "3-lora"],
    )
    def test_two_ranks_are_one(
        self, start: Start, long_samples: list[Sample], options: dict[str, Any]
    ) -> None:
        training = options.get("training", Training())
        expected = course(start(micro_batch_size=8, training=training), long_samples)
        agree(course(start(**SHARED, **options), long_samples), expected)

    @pytest.mark.parametrize("aggregation", ["sequence", "sum"])
    def test_whole_samples_count_however_they_are_cut(
        self, start: Start, long_samples: list[Sample], aggregation: Any
    ) -> None:
        """A sample's length and its clipped ratio are the whole sample's, and so is a sampler's mismatch."""
        sampled = [
            dataclasses.replace(s, log_behavior_T=np.linspace(-6.0, -5.0, s.length).astype(np.float32))
            for s in long_samples
        ]
        objective = Objective(
            aggregation=aggregation,
            token_factor="eaft",
            clip=RatioClip("ppo", 0.02, 0.02, "sequence"),
            mismatch=Mismatch("tis", high=2.0, level="sequence"),
            delta_of="policy_over_data",
        )
        whole = start(objective=objective)
        expected = run(whole, sampled, [*HALVES, *HALVES])
        parameters = whole.inside(inside.parameters)[0]
        shared = start(objective=objective, **SHARED)
        found = run(shared, sampled, [*HALVES, *HALVES])
        for one, other in zip(found.groups, expected.groups, strict=True):
            np.testing.assert_allclose(one.log_policy_N, other.log_policy_N, rtol=1e-6)  # type: ignore[arg-type]
            np.testing.assert_allclose(one.sum_delta_N, other.sum_delta_N, rtol=1e-4)  # type: ignore[arg-type]
        for report, other_report in zip(found.reports, expected.reports, strict=True):
            assert report.num_tokens == other_report.num_tokens
            assert report.loss == pytest.approx(other_report.loss, rel=1e-5)
            assert report.entropy == pytest.approx(other_report.entropy, rel=1e-6)
            assert report.figures == pytest.approx(other_report.figures, rel=1e-3, abs=1e-6)
        assert any(r.figures["ratio/clipped_high"] > 0 for r in found.reports)
        assert relative_difference(parameters, shared.inside(inside.parameters)[0]) < 1e-5

    def test_bfloat16(self, start: Start, long_samples: list[Sample]) -> None:
        """Another attention kernel rounds elsewhere; nothing more."""
        num_tokens_N = np.array([s.num_tokens for s in long_samples])
        expected_N = start(dtype="bfloat16").score(long_samples)
        trainer = start(dtype="bfloat16", **SHARED)
        off_N = (trainer.score(long_samples) - expected_N) / num_tokens_N
        assert np.abs(off_N).max() < 3e-3
        losses = [trainer.loss(long_samples, plan_for(long_samples, step=i)) for i in range(4)]
        assert losses[-1] < losses[0]

    def test_a_sample_shorter_than_the_group_and_one_of_them_alone(self, start: Start) -> None:
        """Of two tokens the second rank has padding alone: it learns from nothing, and waits for nobody."""
        short = [
            Sample(row=0, token_ids_T=np.array([7, 9], dtype=np.int32), trained_T=np.array([False, True]))
        ]
        one = start()
        one.inside(inside.capture_gradients)
        expected = one.score(short), one.loss(short, plan_for(short))
        gradients = one.inside(inside.captured_gradients)[0]
        for zero_stage in (2, 3):
            two = start(**SHARED, zero_stage=zero_stage)
            two.inside(inside.capture_gradients)
            np.testing.assert_allclose(two.score(short), expected[0], rtol=1e-6)
            assert two.loss(short, plan_for(short)) == pytest.approx(expected[1], rel=1e-6)
            assert relative_difference(gradients, two.inside(inside.captured_gradients)[0]) < 1e-6


class TestGroupsBesideEachOther:
    """Two groups of two ranks: different samples, unequal numbers of micro-batches."""

    @pytest.fixture
    def four(self) -> Iterator[Ranks]:
        ranks = Ranks(4)
        yield ranks
        ranks.stop()

    def test_four_ranks_are_one(
        self, four: Ranks, start: Start, long_samples: list[Sample], tiny_dense: Path
    ) -> None:
        long = Sample(row=90, token_ids_T=np.arange(5, 86, dtype=np.int32), trained_T=np.arange(81) >= 9)
        batch = [long, *[s for s in long_samples if s.length < 13]]
        alone = start(micro_batch_size=8)
        expected = [alone.loss(batch, plan_for(batch, VALUES[: len(batch)], step=i)) for i in range(2)]
        parameters = alone.inside(inside.parameters)[0]
        for zero_stage in (2, 3):
            resources = Resources(trainers=4, sequence_parallel=2, zero_stage=zero_stage, micro_batch_size=1)
            spec = TrainerSpec(
                str(tiny_dense), Objective(), Training(), resources, 0, persistence_threshold=0
            )
            trainer = four.start(spec, 4)
            assert len({len(share) for share in trainer.split(batch)}) == 2
            losses = [trainer.loss(batch, plan_for(batch, VALUES[: len(batch)], step=i)) for i in range(2)]
            np.testing.assert_allclose(losses, expected, rtol=1e-6)
            assert relative_difference(parameters, trainer.inside(inside.parameters)[0]) < 1e-5
            trainer.close()


class TestRoutes:
    """Of an MoE model: replayed, recorded, counted and balanced over the whole sequence."""

    @pytest.mark.parametrize(
        "options",
        [{"zero_stage": 2}, {"zero_stage": 2, "gradient_checkpointing": True}, {"zero_stage": 3}],
        ids=["2", "2-recomputed", "3"],
    )
    def test_replayed(
        self, start: Start, long_samples: list[Sample], tiny_moe: Path, options: dict[str, Any]
    ) -> None:
        live = start(model=tiny_moe).inside(inside.live_routes, long_samples)[0]
        for replay, batch in (("R3", carrying(long_samples, others(live))), ("R2", long_samples)):
            objective = Objective(routing_replay=replay)  # type: ignore[arg-type]
            one = start(model=tiny_moe, objective=objective, zero_stage=2)
            one.inside(inside.capture_gradients)
            expected = run(one, batch, [*HALVES, *HALVES])
            gradients = one.inside(inside.captured_gradients)[0]
            two = start(model=tiny_moe, objective=objective, **SHARED, **options)
            two.inside(inside.capture_gradients)
            found = run(two, batch, [*HALVES, *HALVES])
            for report, other in zip(found.reports, expected.reports, strict=True):
                assert report.loss == pytest.approx(other.loss, rel=1e-5)
                assert report.figures == pytest.approx(other.figures, rel=1e-3, abs=1e-6)
            assert relative_difference(gradients, two.inside(inside.captured_gradients)[0]) < 1e-5

    def test_recorded(self, start: Start, long_samples: list[Sample], tiny_moe: Path) -> None:
        """Each sample's routes are put together in its own order, and compared with those it carries."""
        live = start(model=tiny_moe).inside(inside.live_routes, long_samples)[0]
        trainer = start(model=tiny_moe, **SHARED)
        for routes_of_rank in trainer.inside(inside.live_routes, long_samples):
            for found, expected in zip(routes_of_rank, live, strict=True):
                np.testing.assert_array_equal(found, expected)
        [report] = run(trainer, carrying(long_samples, live), EVERYTHING).reports
        assert report.figures["routes/changed_tokens"] == 0

    def test_balancing_loss_and_load(self, start: Start, long_samples: list[Sample], tiny_moe: Path) -> None:
        objective = Objective(router_aux_loss_coef=0.1)
        seen = []
        for options in ({}, SHARED, {**SHARED, "gradient_checkpointing": True, "zero_stage": 3}):
            trainer = start(model=tiny_moe, objective=objective, micro_batch_size=8, **options)
            trainer.inside(inside.capture_gradients)
            [report] = run(trainer, long_samples, EVERYTHING).reports
            seen.append((report.loss, dict(report.figures), trainer.inside(inside.captured_gradients)[0]))
        (loss, figures, gradients), *rest = seen
        assert figures["routes/balancing_loss"] > 0
        for other_loss, other_figures, other in rest:
            assert other_loss == pytest.approx(loss, rel=1e-6)
            assert other_figures == pytest.approx(figures, rel=1e-5, abs=1e-6)
            assert relative_difference(gradients, other) < 1e-6


class TestStart:
    """What is measured against pi_0."""

    @pytest.mark.parametrize("training", [Training(), LORA], ids=["frozen copy", "adapters off"])
    def test_kl_in_steps_and_on_probes(
        self, start: Start, long_samples: list[Sample], training: Training
    ) -> None:
        """The probes are looked at in other micro-batches than they were remembered in."""
        objective = Objective(kl_direction="forward", sample_kl=True, delta_of="policy_over_initial")

        async def look(trainer: Trainer) -> tuple[list[EvalReport], list[float], np.ndarray]:
            pool = trainer.pool()
            groups = probe_groups(long_samples, lambda block: block)
            await pool.remember_start(groups)
            kls = []
            for step in range(3):
                begun = await pool.begin(groups)
                plan = plan_for(long_samples, VALUES, step=step, rate=1e-2, kl_coefficient=0.5)
                kls.append((await pool.step(begun, plan)).kl_nats)
            evaluated = [await pool.evaluate(part, kl=True) for part in (groups, groups[:3], groups[3:])]
            distance_N = np.concatenate([g.distance_N for g in await pool.begin(groups)])  # type: ignore[misc]
            return evaluated, kls, distance_N  # type: ignore[return-value]

        expected, kls, distance_N = asyncio.run(look(start(objective=objective, training=training)))
        for options in ({"zero_stage": 2}, {"zero_stage": 3}):
            trainer = start(objective=objective, training=training, **SHARED, **options)
            found, other_kls, other_distance_N = asyncio.run(look(trainer))
            np.testing.assert_allclose(other_kls, kls, rtol=1e-3, atol=1e-8)
            np.testing.assert_allclose(other_distance_N, distance_N, rtol=1e-3)
            for one, other in zip(found, expected, strict=True):
                for name in ("nll", "token_accuracy", "entropy"):
                    assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5)
                assert one.kl_nats == pytest.approx(other.kl_nats, rel=1e-3)
                assert one.kl_reverse_nats == pytest.approx(other.kl_reverse_nats, rel=1e-3)
                assert one.num_tokens == other.num_tokens

    def test_canary_and_distance(self, start: Start) -> None:
        sequences = [np.arange(5, 5 + length, dtype=np.int32) for length in (2, 7, 12)]
        [expected] = start().each("canary", sequences)
        trainer = start(**SHARED)
        for found in trainer.each("canary", sequences):
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5)
        assert trainer.each("distance_from_start") == [0.0, 0.0]


class TestModels:
    """Heads that do not divide evenly, masks that are not plain causality."""

    @pytest.mark.parametrize(
        ("family", "changes"),
        [
            ("Qwen3", {"num_key_value_heads": 1}),  # one head for all: both ranks need it
            ("Qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}),  # three over two ranks
            ("Mistral", {"sliding_window": 4}),
            ("Gemma3", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
            ("DeepseekV3", DEEPSEEK),  # keys wider than values
        ],
        ids=["one-kv-head", "three-kv-heads", "sliding-window", "alternating", "latent"],
    )
    def test_the_model_is_the_same(
        self,
        start: Start,
        long_samples: list[Sample],
        tmp_path: Path,
        family: str,
        changes: dict[str, Any],
    ) -> None:
        model = tiny(tmp_path / "model", family, **changes)
        expected = course(start(model=model, micro_batch_size=8), long_samples, steps=1)
        for zero_stage in (2, 3):
            trainer = start(model=model, **SHARED, zero_stage=zero_stage)
            # AdamW's first step is of the size of the rate however small a gradient: rounding shows more in it.
            agree(course(trainer, long_samples, steps=1), expected, parameters=1e-5)

    def test_each_rank_computes_its_part_alone(self, start: Start, long_samples: list[Sample]) -> None:
        """Positions that go through an MLP, and through the head, in one pass over a micro-batch of all samples."""
        longest = max(s.length for s in long_samples)
        [whole] = start(micro_batch_size=8).inside(inside.positions_seen, long_samples)
        parts = start(micro_batch_size=8, **SHARED).inside(inside.positions_seen, long_samples)
        assert whole["mlp"] == 8 * longest
        assert [p["mlp"] for p in parts] == [8 * -(-longest // 2)] * 2
        assert sum(p["head"] for p in parts) == whole["head"] == sum(s.num_tokens for s in long_samples)
        for part in parts:  # what the backward pass keeps; the head's weights and the mask do not shrink
            assert part["saved_bytes"] < 0.6 * whole["saved_bytes"]

    def test_limits_are_on_a_ranks_own_part(self, start: Start) -> None:
        """Two samples of 40 in one micro-batch of 40 positions a rank."""
        samples = [
            Sample(row=i, token_ids_T=np.arange(5, 45, dtype=np.int32), trained_T=np.arange(40) > 3)
            for i in range(2)
        ]
        for options, expected in (({}, 2), (SHARED, 1)):
            trainer = start(micro_batch_size=None, micro_batch_tokens=40, **options)
            assert set(trainer.inside(inside.num_micro_batches, samples)) == {expected}

    def test_a_checkpoint_and_an_export(
        self, start: Start, long_samples: list[Sample], tmp_path: Path
    ) -> None:
        trainer = start(**SHARED, zero_stage=3)
        trainer.loss(long_samples, plan_for(long_samples))
        trainer.each("save", str(tmp_path / "state"))
        trainer.each("export", str(tmp_path / "model"))
        expected = trainer.loss(long_samples, plan_for(long_samples, step=1))
        sha256 = trainer.sha256()
        trainer = start(**SHARED, zero_stage=3)
        trainer.each("load", str(tmp_path / "state"))
        assert trainer.loss(long_samples, plan_for(long_samples, step=1)) == expected
        assert trainer.sha256() == sha256
        again = start(model=tmp_path / "model")
        assert again.loss(long_samples, plan_for(long_samples)) == pytest.approx(expected, rel=1e-6)


class TestRefused:
    def test_trainers_that_do_not_make_groups(self) -> None:
        with pytest.raises(ValueError, match="set trainers to a multiple of it, not to 3"):
            Resources(trainers=3, sequence_parallel=2)

    def test_heads_before_anything_starts(self, tiny_dense: Path) -> None:
        """Four heads: not over three ranks."""
        training = FileReport("a.jsonl", "training", Problems("a.jsonl"), rows=8, samples=8)
        training.tokens, training.trained_tokens, training.lengths = 80, 40, [10] * 8
        data = DataReport({"training": training})
        for size, fits in ((2, True), (3, False), (4, True)):
            config = parse_config(
                {
                    "model": "playground/dense",
                    "training_file": "a.jsonl",
                    "resources": {"trainers": size, "sequence_parallel": size},
                }
            )
            if fits:
                preflight(config, data, tiny_dense, has_behavior=False)
                continue
            with pytest.raises(ConfigError, match="4 attention heads do not divide") as refused:
                preflight(config, data, tiny_dense, has_behavior=False)
            assert refused.value.param == "resources.sequence_parallel"

    @pytest.mark.parametrize(
        ("family", "changes", "why"),
        [
            (
                "Qwen3",
                {"num_attention_heads": 3, "num_key_value_heads": 3},
                "3 attention heads do not divide",
            ),
            ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "layers of conv"),
            ("Llama", {"rope_parameters": DYNAMIC}, "scales its positions by the length of a pass"),
            ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "computes attention by eager"),
        ],
        ids=["heads", "convolution", "dynamic positions", "eager"],
    )
    def test_models_at_set_up(
        self, start: Start, tmp_path: Path, family: str, changes: dict[str, Any], why: str
    ) -> None:
        model = tiny(tmp_path / "model", family, **changes)
        with pytest.raises(ConfigError, match=why) as refused:
            start(model=model, **SHARED)
        assert refused.value.param == "resources.sequence_parallel"

    def test_a_model_whose_positions_meet_unseen(self, ranks: Ranks, tiny_dense: Path) -> None:
        """What no configuration says shows in the numbers: here each position is handed its left neighbour's."""
        resources = Resources(trainers=2, sequence_parallel=2)
        spec = TrainerSpec(str(tiny_dense), Objective(), Training(), resources, 0)
        with pytest.raises(ConfigError, match="something else from a sequence in parts"):
            ranks.start(spec, 2, before=inside.shift_positions)

"""Dtypes, adapters, regularisers, kept graphs, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from modeseek_ray.config import Lora, Training
from modeseek_ray.errors import ConfigError, NumericsError
from modeseek_ray.types import Objective, Sample
from tests.actors import ranks as inside
from tests.actors.ranks import Start, plan_for, relative_difference

LORA = Training(lora=Lora(rank=4, alpha=8.0))


def own_log_probs(model_path: Path, samples: list[Sample], dtype: torch.dtype) -> np.ndarray:
    """The model's own logits, softmax in float64, one sample at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype).eval()
    sums = []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids_T.astype(np.int64))
        with torch.no_grad():
            log_prob = model(ids[None]).logits[0].double().log_softmax(-1)
        sums.append(sum(float(log_prob[t - 1, ids[t]]) for t in np.flatnonzero(sample.trained_T)))
    return np.array(sums)


class TestDtypes:
    @pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
    def test_bfloat16_keeps_a_float32_master_copy(
        self, start: Start, samples: list[Sample], zero_stage: int
    ) -> None:
        """A rate of 1e-6 is below bfloat16's resolution at 1 (4e-3): without a master copy nothing would move."""
        trainer = start(zero_stage=zero_stage, dtype="bfloat16")
        losses = [trainer.loss(samples, plan_for(samples, step=i, rate=1e-6)) for i in range(3)]
        before = trainer.inside(inside.parameters)[0]["model.norm.weight"]
        assert set(before) == {1.0}, "the norm's weight starts at one and is still rounded to it"
        losses += [trainer.loss(samples, plan_for(samples, step=i, rate=1e-3)) for i in range(3, 9)]
        after = trainer.inside(inside.parameters)[0]["model.norm.weight"]
        assert (after != 1.0).any(), "six steps of 1e-3 add up to more than bfloat16's resolution"
        assert losses[-1] < losses[0]

    def test_bfloat16_scores_as_transformers_does(
        self, start: Start, samples: list[Sample], tiny_dense: Path
    ) -> None:
        """Only weights and activations are bfloat16: not the softmax, and not the rotary frequencies."""
        trainer = start(dtype="bfloat16")
        num_tokens_N = np.array([s.num_tokens for s in samples])
        off = trainer.score(samples) - own_log_probs(tiny_dense, samples, torch.bfloat16)
        assert np.abs(off / num_tokens_N).max() < 2e-3
        frequencies = trainer.inside(inside.rotary_frequencies)[0]
        np.testing.assert_allclose(frequencies, 10_000.0 ** -(np.arange(4) / 4), rtol=1e-6)

    def test_gradient_checkpointing_changes_nothing(self, start: Start, samples: list[Sample]) -> None:
        found = []
        for on in (False, True):
            for zero_stage in (2, 3):
                trainer = start(gradient_checkpointing=on, zero_stage=zero_stage, world_size=2)
                assert trainer.inside(inside.recomputes) == [on, on]
                trainer.score(samples)
                trainer.step(samples, plan_for(samples))
                found.append(trainer.inside(inside.parameters)[0])
        for other in found[1:]:
            assert relative_difference(found[0], other) < 1e-6


class TestKeptGraph:
    def test_is_used_for_the_same_samples_alone(self, start: Start, samples: list[Sample]) -> None:
        trainer = start()
        trainer.score(samples)
        report = trainer.step(samples, plan_for(samples))[0]
        assert report.seconds["score"] > 0
        trainer.score(samples[:4])
        fresh = start()
        fresh.step(samples, plan_for(samples))
        expected = fresh.loss(samples, plan_for(samples, step=1))
        trainer = start()
        trainer.step(samples, plan_for(samples))
        trainer.score(samples[:4])  # another batch's graph must not be taken for this one's
        assert trainer.loss(samples, plan_for(samples, step=1)) == expected

    def test_zero_3_scores_again_unless_told_to_keep(self, start: Start, samples: list[Sample]) -> None:
        reference = start(zero_stage=2)
        reference.score(samples)
        expected = reference.loss(samples, plan_for(samples))
        reference_parameters = reference.inside(inside.parameters)[0]
        for size in (2, None):  # four micro-batches: again; one: kept
            trainer = start(zero_stage=3, micro_batch_size=size)
            trainer.score(samples)
            assert trainer.loss(samples, plan_for(samples)) == pytest.approx(expected, rel=1e-6)
            assert relative_difference(reference_parameters, trainer.inside(inside.parameters)[0]) < 1e-5
        stubborn = start(zero_stage=3, micro_batch_size=2, keep_graph="always")
        with pytest.raises(ConfigError, match="ZeRO-3 cannot keep the graphs of 4 micro-batches"):
            stubborn.score(samples)

    def test_dropout_acts_in_the_step_alone(
        self, start: Start, samples: list[Sample], tiny_dense: Path, tmp_path: Path
    ) -> None:
        noisy = inside.with_config(tiny_dense, tmp_path / "noisy", attention_dropout=0.5)
        clean = start()
        expected_N = clean.score(samples)
        trainer = start(model=noisy)
        np.testing.assert_array_equal(trainer.score(samples), expected_N)
        loss = trainer.loss(samples, plan_for(samples))
        assert abs(loss - -expected_N.sum() / sum(s.num_tokens for s in samples)) > 1e-4
        with pytest.raises(ConfigError, match="dropout"):
            start(model=noisy, keep_graph="always")


class TestLora:
    @pytest.mark.parametrize("zero_stage", [2, 3])
    def test_reference_is_the_adapter_off(
        self, start: Start, samples: list[Sample], tiny_moe: Path, zero_stage: int
    ) -> None:
        training = Training(lora=Lora(rank=4, alpha=8.0, target_experts=True))
        trainer = start(model=tiny_moe, training=training, zero_stage=zero_stage, world_size=2)
        assert 0 < trainer.info["trainable_parameters"] < 0.5 * trainer.info["parameters"]
        before_N = trainer.score(samples)
        np.testing.assert_allclose(trainer.score(samples, "score_reference"), before_N, rtol=1e-6)
        losses = [trainer.loss(samples, plan_for(samples, step=i, rate=1e-2)) for i in range(5)]
        assert losses[-1] < losses[0] - 0.1
        np.testing.assert_allclose(trainer.score(samples, "score_reference"), before_N, rtol=1e-6)
        assert (trainer.score(samples) - before_N).sum() > 1

    def test_what_does_not_fit_is_refused(self, start: Start) -> None:
        with pytest.raises(ConfigError, match="no expert matrices"):
            start(training=Training(lora=Lora(target_experts=True)))
        with pytest.raises(ConfigError, match="q_proj") as caught:
            start(training=Training(lora=Lora(target_modules=["query"])))
        assert caught.value.param == "method.weighted.training.lora.target_modules"

    def test_a_model_without_adapter_has_no_reference(self, start: Start, samples: list[Sample]) -> None:
        with pytest.raises(ConfigError, match="adapters"):
            start().score(samples, "score_reference")


class TestObjective:
    @pytest.mark.parametrize("lora", [None, LORA.lora])
    @pytest.mark.parametrize("direction", ["forward", "reverse"])
    def test_kl_is_exact_and_holds_the_policy_back(
        self, start: Start, samples: list[Sample], lora: Lora | None, direction: str
    ) -> None:
        objective = Objective(kl_direction=direction)  # type: ignore[arg-type]
        courses = {}
        for coefficient in (0.0, 10.0):
            trainer = start(objective=objective, training=Training(lora=lora))
            plans = [plan_for(samples, step=i, rate=1e-2, kl_coefficient=coefficient) for i in range(6)]
            courses[coefficient] = [trainer.step(samples, plan)[0] for plan in plans]
        free, held = courses[0.0], courses[10.0]
        assert free[0].kl_sum == pytest.approx(0, abs=1e-5)
        assert 0 < held[-1].kl_sum < 0.75 * free[-1].kl_sum
        nll = free[-1].nll_sum / free[-1].num_tokens
        assert free[-1].loss == pytest.approx(nll, rel=1e-6), "a coefficient of zero adds nothing"
        expected = (held[-1].nll_sum + 10.0 * held[-1].kl_sum) / held[-1].num_tokens
        assert held[-1].loss == pytest.approx(expected, rel=1e-6)

    def test_token_factor_multiplies_each_tokens_loss(self, start: Start, samples: list[Sample]) -> None:
        """dft: c = p, so that the loss is -sum p log p over the trained tokens."""
        trainer = start(objective=Objective(token_factor="dft"))
        one_token = [dataclasses.replace(s, trained_T=np.arange(s.length) == s.length - 1) for s in samples]
        log_prob_N = trainer.score(one_token)
        loss = trainer.loss(one_token, plan_for(one_token))
        assert loss == pytest.approx(-(np.exp(log_prob_N) * log_prob_N).sum() / 8, rel=1e-6)

    def test_temperature_divides_the_logits(self, start: Start, samples: list[Sample]) -> None:
        cold = start().score(samples)
        hot = start(objective=Objective(temperature=1e6)).score(samples)
        uniform = -np.log(261) * np.array([s.num_tokens for s in samples])
        np.testing.assert_allclose(hot, uniform, rtol=1e-5)
        assert np.abs(cold - uniform).max() > 1e-3


class TestNonfinite:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
    def test_names_step_and_rows_and_changes_nothing(
        self, start: Start, samples: list[Sample], zero_stage: int, dtype: str
    ) -> None:
        trainer = start(world_size=2, zero_stage=zero_stage, dtype=dtype)
        before = trainer.sha256()
        plan = plan_for(samples, np.where(np.arange(8) == 3, np.inf, 1.0), step=7)
        with pytest.raises(NumericsError, match="step 7: the gradient of row"):
            trainer.step(samples, plan)
        assert trainer.sha256() == before

    def test_a_log_probability_that_is_not_a_number(self, start: Start, samples: list[Sample]) -> None:
        others = {int(t) for s in samples if s.row != 2 for t in s.token_ids_T}
        token_id = next(int(t) for t in samples[2].token_ids_T if int(t) not in others)
        trainer = start(world_size=2)
        trainer.inside(inside.poison, token_id)
        with pytest.raises(NumericsError, match=r"step 0: the log-probability of row\(s\) 2 is not finite"):
            trainer.step(samples, plan_for(samples))

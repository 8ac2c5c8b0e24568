"""Preference weights: closed forms, plain PyTorch DPO's gradient, and TRL's formula for the loss."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modeseek_ray.config import parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.objectives.loss import weighted_loss_sum
from modeseek_ray.types import Evidence
from modeseek_ray.weights import Facts, Weighting, check_weighting, needs, weigh


def evidence(log_policy: list[float], log_reference: list[float], rewards: list[float], group: list[int]):
    return Evidence(
        log_policy_N=np.array(log_policy),
        log_reference_N=np.array(log_reference),
        num_tokens_N=np.ones(len(group)),
        rewards_N=np.array(rewards),
        group_N=np.array(group),
    )


def dpo(beta: float = 0.1) -> Weighting:
    return Weighting.model_validate({"preset": "dpo", "reward": {"beta": beta}})


def test_one_pair_by_hand() -> None:
    """At the start the margin is 0 and sigma(0) = 1/2; n/P = 2, so v = +-beta. The loss is ln 2."""
    start = weigh(evidence([-3, -5], [-3, -5], [1, 0], [0, 0]), dpo(0.3))
    assert start.values_N == pytest.approx([0.3, -0.3])
    assert start.loss == pytest.approx(math.log(2))
    # log w = 1 and -1, beta 1/2: m = 1, sigma(-1) = 1/(1+e), v = +-2 * 1/2 * sigma(-1).
    later = weigh(evidence([-2, -6], [-3, -5], [1, 0], [0, 0]), dpo(0.5))
    assert later.values_N == pytest.approx(np.array([1, -1]) / (1 + math.e))
    assert later.loss == pytest.approx(math.log(1 + math.exp(-1)))
    assert later.metrics["preference_accuracy"] == 1.0
    assert later.metrics["preference_margin"] == pytest.approx(1.0)


def test_of_several_answers_the_best_and_the_worst_make_the_pair() -> None:
    """Prompt 0: rewards 1, 3, 3, 0 pair rows 1 and 3. Prompt 1 ties, prompt 2 has one answer: no pair."""
    weights = weigh(evidence([0.0] * 7, [0.0] * 7, [1, 3, 3, 0, 5, 5, 9], [0, 0, 0, 0, 1, 1, 2]), dpo(1.0))
    assert weights.values_N == pytest.approx([0, 3.5, 0, -3.5, 0, 0, 0])  # n/P = 7, times 1/2
    assert weights.metrics["pairs"] == 1


def test_without_a_pair_nothing_is_learnt() -> None:
    weights = weigh(evidence([0.0, 0.0], [0.0, 0.0], [1, 1], [0, 0]), dpo())
    assert weights.values_N.tolist() == [0, 0]
    assert weights.loss == 0.0


def test_far_margins_stay_finite() -> None:
    weights = weigh(evidence([1e4, -1e4, -1e4, 1e4], [0.0] * 4, [1, 0, 1, 0], [0, 0, 1, 1]), dpo(1.0))
    assert weights.values_N == pytest.approx([0, 0, 2, -2])
    assert weights.loss == pytest.approx(1e4)


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_gradient_and_loss_are_those_of_dpo(beta: float) -> None:
    """Five pairs of unequal length in a table of logits: our step's gradient against autograd through DPO."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 5, 1, 2, 7, 4, 2, 2, 6, 1]
    sample_M = torch.repeat_interleave(torch.arange(10), torch.tensor(lengths))
    logits_MV = torch.randn(sum(lengths), 11, generator=generator, dtype=torch.float64, requires_grad=True)
    target_M = torch.randint(11, (sum(lengths),), generator=generator)
    log_reference_N = -3 * torch.rand(10, generator=generator, dtype=torch.float64) * torch.tensor(lengths)

    log_prob_M = F.log_softmax(logits_MV, dim=1).gather(1, target_M[:, None])[:, 0]
    log_policy_N = torch.zeros(10, dtype=torch.float64).index_add(0, sample_M, log_prob_M)
    log_ratio_N = log_policy_N - log_reference_N
    # TRL, DPOTrainer, loss_type "sigmoid", f-divergence reverse_kl: -logsigmoid(beta * delta_score), averaged.
    plain = -F.logsigmoid(beta * (log_ratio_N[0::2] - log_ratio_N[1::2])).mean()
    (expected,) = torch.autograd.grad(plain, logits_MV, retain_graph=True)

    weights = weigh(
        Evidence(
            log_policy_N=log_policy_N.detach().numpy(),
            log_reference_N=log_reference_N.numpy(),
            num_tokens_N=np.array(lengths),
            rewards_N=np.array([1.0, 0.0] * 5),
            group_N=np.repeat(np.arange(5), 2),
        ),
        dpo(beta),
    )
    ours = weighted_loss_sum(
        log_prob_M, sample_M, torch.from_numpy(weights.values_N), None, torch.tensor(lengths), "sum", 10.0
    )
    (found,) = torch.autograd.grad(ours, logits_MV)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert weights.loss == pytest.approx(plain.item(), rel=1e-12)


def test_loss_is_trl_s_on_the_same_log_probabilities() -> None:
    """TRL's own loss code, with a model that answers the log-probabilities ours are given."""
    from trl import DPOTrainer

    pairs, length = 4, 6
    generator = torch.Generator().manual_seed(1)
    completion_mask = torch.ones(2 * pairs, length + 1, dtype=torch.long)
    completion_mask[:, :2] = 0
    shifted = completion_mask[:, 1:]
    log_prob = -3 * torch.rand(2 * pairs, length, generator=generator, dtype=torch.float64) * shifted
    chosen_ref, rejected_ref = (
        -9 * torch.rand(pairs, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    zeros = torch.zeros_like(log_prob)
    answer = SimpleNamespace(log_probs=log_prob, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x, gather=lambda x: x),
        beta=0.3,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        f_divergence_type="reverse_kl",
        label_smoothing=0.0,
        ld_alpha=None,
        precompute_ref_logps=True,
        use_weighting=False,
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(2 * pairs, length + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * pairs, length + 1, dtype=torch.long),
        "completion_mask": completion_mask,
        "ref_chosen_logps": chosen_ref,
        "ref_rejected_logps": rejected_ref,
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **_: answer, inputs, return_outputs=False)

    # TRL's batch is all chosen, then all rejected.
    summed, reference = log_prob.sum(1), torch.cat([chosen_ref, rejected_ref])
    ours = weigh(
        evidence(
            summed.tolist(), reference.tolist(), [1.0] * pairs + [0.0] * pairs, [*range(pairs), *range(pairs)]
        ),
        dpo(0.3),
    )
    assert ours.loss == pytest.approx(theirs.item(), rel=1e-12)
    assert ours.metrics["preference_accuracy"] == trainer._metrics["train"]["rewards/accuracies"][0]


def test_what_it_looks_at_and_what_it_refuses() -> None:
    assert needs(dpo()) == {"rewards", "policy", "initial"}
    batch = Weighting.model_validate({"reward": {"scheme": "preference", "scope": "batch"}})
    assert [p.param for p in check_weighting(batch)] == ["method.weighted.reward.scope"]
    replay = check_weighting(dpo(), Facts(replay_share=0.1))
    assert [p.param for p in replay] == ["method.weighted.training.replay_share"]


def test_openai_s_block() -> None:
    knobs = {"beta": 0.3, "batch_size": 4, "n_epochs": 2, "learning_rate_multiplier": "auto"}
    config = parse_config(
        {
            "model": "m",
            "training_file": "t",
            "method": {"type": "dpo", "dpo": {"hyperparameters": knobs}},
        }
    )
    assert (config.weighting.reward.scheme, config.weighting.reward.beta) == ("preference", 0.3)
    assert (config.training.aggregation, config.training.batch_size, config.training.epochs) == ("sum", 8, 2)
    plain = parse_config({"model": "m", "training_file": "t", "method": {"type": "dpo"}})
    assert (plain.weighting.reward.beta, plain.training.batch_size) == (0.1, "auto")
    for beta in (0.0, -1.0, "high"):
        with pytest.raises(ConfigError, match="method.dpo.hyperparameters.beta|beta must be"):
            parse_config(
                {
                    "model": "m",
                    "training_file": "t",
                    "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": beta}}},
                }
            )

"""Token factors against a plain rendering from full logits, and at points a person can work out."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from modeseek_ray.errors import ConfigError
from modeseek_ray.objectives.factors import FACTORS, TokenEvidence, token_factor
from modeseek_ray.objectives.logprobs import token_scores
from modeseek_ray.objectives.parameters import TOKEN_FACTORS

M, D, V = 50, 8, 61


def evidence_and_logits() -> tuple[TokenEvidence, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Evidence as the product computes it, and float64 logits of policy, pi_0 and inner-loop start."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator)
    hidden, reference, start = torch.randn(3, M, D, generator=generator)
    reference, start = hidden + 0.3 * reference, hidden + 0.1 * start
    target = torch.randint(V, (M,), generator=generator)
    scores = token_scores(hidden.requires_grad_(), weight, target, statistics=True)
    evidence = TokenEvidence(
        scores.log_prob_M,
        top_entropy_M=scores.top_entropy_M,
        log_reference_M=token_scores(reference, weight, target).log_prob_M,
        log_start_M=token_scores(start, weight, target).log_prob_M,
    )
    logits = (hidden.double() @ weight.double().t()).detach()
    return (
        evidence,
        logits,
        reference.double() @ weight.double().t(),
        start.double() @ weight.double().t(),
        target,
    )


def plain(name: str) -> torch.Tensor:
    """The same factor from full probabilities, written as in the papers."""
    _, logits, reference, start, target = evidence_and_logits()
    rows = torch.arange(M)
    p, p_0, p_start = (F.softmax(z, dim=1)[rows, target] for z in (logits, reference, start))
    if name == "dft":
        return p
    if name == "psft":
        return (p / p_start) * (p / p_start <= 1.28)
    if name == "eaft":
        top = F.softmax(logits, dim=1).topk(20, dim=1).values
        top = top / top.sum(1, keepdim=True)
        return -(top * top.log()).sum(1) / math.log(20)
    if name == "infosft":
        return p * torch.clamp(1 - torch.log(p / (1 - p)) / math.log(0.93 / 0.07), min=0)
    if name == "talr":
        return torch.clamp(p ** (1 / 1.5), min=0.01)
    return torch.clamp(p / p_0, 0.2, 5.0)


@pytest.mark.parametrize("name", list(FACTORS))
def test_factor_equals_its_plain_rendering(name: str) -> None:
    factor_M = token_factor(name, evidence_and_logits()[0], {"tau": 1.5} if name == "talr" else {})
    assert factor_M is not None and not factor_M.requires_grad
    torch.testing.assert_close(factor_M.double(), plain(name), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters", "log_prob", "expected"),
    [
        ("dft", {}, math.log(0.25), 0.25),
        ("dft", {"gamma": 0.5}, math.log(0.25), 0.5),
        ("infosft", {}, math.log(0.5), 0.5),  # logit 0: p itself
        ("infosft", {}, math.log(0.93), 0.0),
        ("infosft", {}, 0.0, 0.0),  # p = 1: held already
        ("infosft", {}, -1e4, 0.0),  # p = 0: p log p
        ("ratio_token", {"gamma": 2.0}, math.log(0.75), 2.25),  # (.75 / .5)^2
        ("ratio_token", {}, math.log(0.05), 0.2),
        ("talr", {"tau": 2.0}, math.log(0.25), 0.5),  # .25^(1/2)
        ("talr", {"tau": 2.0}, -50.0, 0.01),
        ("psft", {}, math.log(0.6), 1.2),  # .6 / .5
        ("psft", {}, math.log(0.7), 0.0),  # 1.4 > 1.28
    ],
)
def test_closed_forms(name: str, parameters: dict[str, float], log_prob: float, expected: float) -> None:
    half = torch.tensor([math.log(0.5)])
    evidence = TokenEvidence(torch.tensor([log_prob]), log_reference_M=half, log_start_M=half)
    factor_M = token_factor(name, evidence, parameters)
    assert factor_M is not None
    assert factor_M.item() == pytest.approx(expected, abs=2e-6)


def test_none_computes_nothing() -> None:
    assert token_factor("none", TokenEvidence(torch.zeros(2)), {}) is None


def test_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="dtf.*Choose one of none, dft"):
        token_factor("dtf", TokenEvidence(torch.zeros(2)), {})


@pytest.mark.parametrize("name", ["psft", "eaft", "ratio_token", "talr"])
def test_missing_evidence_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"token factor {name} needs"):
        token_factor(name, TokenEvidence(torch.zeros(2)), {})


def test_names_and_defaults_are_those_of_the_configuration() -> None:
    assert {"none", *FACTORS} == set(TOKEN_FACTORS)
    for name, function in FACTORS.items():
        keywords = {
            k: p.default for k, p in inspect.signature(function).parameters.items() if k != "evidence"
        }
        assert keywords == TOKEN_FACTORS[name]().model_dump(exclude={"scheme"})

"""What a user may write, what is refused with which path, and what presets stand for."""

from __future__ import annotations

import json
import math
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import ValidationError

from modeseek_ray.config import parse_config
from modeseek_ray.errors import ConfigError
from modeseek_ray.weights import (
    PRESETS,
    Evidence,
    Facts,
    Weighting,
    check_weighting,
    kl_coefficient,
    needs,
    observe,
    preset_fields,
    resolve,
    weigh,
)


def job(**weighted: Any) -> dict[str, Any]:
    return {"model": "m", "training_file": "f", "method": {"type": "weighted", "weighted": weighted}}


def ratio(**fields: Any) -> dict[str, Any]:
    return {"likelihood": {"scheme": "ratio_power", **fields}}


@pytest.mark.parametrize(
    ("weighted", "path"),
    [
        (ratio(gamma={"ess": {"floor": 3.0}}), "likelihood.gamma.ess.floor"),
        (ratio(gamma={"ess": {"flor": 0.3}}), "likelihood.gamma.ess.flor"),
        (ratio(gamma={"es": {"floor": 0.3}}), "likelihood.gamma"),
        (ratio(gamma={"ess": {"floor": 0.3}, "schedule": {}}), "likelihood.gamma"),
        (ratio(gamma="0.5"), "likelihood.gamma"),
        (ratio(gamma=True), "likelihood.gamma"),
        (ratio(gamma=-0.1), "likelihood.gamma"),
        (ratio(gamma=math.nan), "likelihood.gamma"),
        (ratio(of="policy_over_nothing"), "likelihood.of"),
        ({"likelihood": {"gamma": 0.5}}, "likelihood.scheme"),
        ({"likelihood": {"scheme": "ratio_powr"}}, "likelihood.scheme"),
        ({"reward": {"scheme": "exponential", "beta": 0.0}}, "reward.beta"),
        ({"reward": {"scheme": "exponential", "beta": {"ess": {"floor": 1.0}}}}, "reward.beta.ess.floor"),
        ({"reward": {"scheme": "top_k", "share": 0.0}}, "reward.share"),
        ({"token": {"scheme": "dft", "gama": 1.0}}, "token.gama"),
        ({"kl": {"direction": "sideways"}}, "kl.direction"),
        ({"guards": {"cap": 1.0}}, "guards.cap"),
        ({"preset": "mode_seaking"}, "preset"),
        ({"prest": "sft"}, "prest"),
    ],
)
def test_errors_name_the_path(weighted: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(job(**weighted))
    assert caught.value.param == f"method.weighted.{path}"
    assert caught.value.mend


@pytest.mark.parametrize(
    ("body", "mend"),
    [
        (job(**ratio(gamma={"ess": {"flor": 0.3}})), "Did you mean `floor`?"),
        (job(training={"epoch": 3}), "Did you mean `epochs`?"),
        ({**job(), "trainingfile": "x"}, "Did you mean `training_file`?"),
        (job(token={"scheme": "dft", "gama": 1.0}), "Did you mean `gamma`?"),
        (job(likelihood={"scheme": "ratio_powr"}), "Did you mean `ratio_power`?"),
        (job(preset="anchord"), "Did you mean `anchored`?"),
        (job(guards={"cap": 1.0}), "Choose a number above 1."),
        (job(kl={"direction": "sideways"}), "Choose 'forward' or 'reverse'."),
        ({**job(), "resources": {"expert_parallel": True}}, "Set that above 1, or drop it."),
        ({"model": "m"}, "Add it."),
    ],
)
def test_errors_say_how_to_mend_them(body: dict[str, Any], mend: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(body)
    assert caught.value.mend == mend


def test_unknown_scheme_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="uniform, ratio_power, linear"):
        parse_config(job(likelihood={"scheme": "ratio_powr"}))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_print_and_read_back(name: str) -> None:
    weighting = Weighting.model_validate({"preset": name})
    spelt_out = resolve(weighting)
    assert Weighting.model_validate(spelt_out) == weighting
    assert Weighting.model_validate_json(json.dumps(spelt_out)) == weighting
    # A preset is its fields and nothing else: the same without the name weighs the same.
    by_fields = Weighting.model_validate(preset_fields(name))
    assert resolve(by_fields) == {k: v for k, v in spelt_out.items() if k != "preset"}
    assert not [p for p in check_weighting(weighting, Facts(inner_steps=8)) if p.severity == "error"]
    rng = np.random.default_rng(0)
    evidence = Evidence(
        rng.normal(-5, 1, 12),
        rng.normal(-5, 1, 12),
        rng.integers(1, 4, 12),
        log_behavior_N=rng.normal(-5, 1, 12),
        rewards_N=rng.normal(size=12),
        group_N=np.repeat([0, 1, 2], 4),
    )
    assert np.isfinite(weigh(evidence, weighting).values_N).all()


def test_the_user_wins_over_the_preset() -> None:
    one_field = Weighting.model_validate({"preset": "anchored", "likelihood": {"length_exponent": 0.5}})
    assert one_field.likelihood.of == "initial_over_policy"
    assert one_field.likelihood.length_exponent == 0.5
    assert one_field.likelihood.gamma.ess.floor == 0.3
    other_scheme = Weighting.model_validate({"preset": "rwr", "reward": {"scheme": "top_k"}})
    assert (other_scheme.reward.scheme, other_scheme.reward.share) == ("top_k", 0.25)
    added = Weighting.model_validate({"preset": "dft", "guards": {"mix": 0.1}})
    assert (added.token.scheme, added.guards.mix) == ("dft", 0.1)
    whole = Weighting.model_validate({"preset": "anchored", "likelihood": {"gamma": {"ess": {"floor": 0.5}}}})
    assert (whole.likelihood.gamma.ess.floor, whole.likelihood.gamma.ess.max) == (0.5, 1.0)


def test_a_section_object_is_as_good_as_its_fields() -> None:
    section = Weighting.model_validate({"reward": {"scheme": "top_k", "share": 0.5}}).reward
    assert Weighting(preset="top_k", reward=section).reward.share == 0.5
    assert Weighting(preset="rwr", reward=section).reward.scheme == "top_k"


def test_json_schema_describes_every_scheme() -> None:
    schema = Weighting.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for name in PRESETS:
        validator.validate(resolve(Weighting.model_validate({"preset": name})))
    assert not validator.is_valid(ratio(gamma={"ess": {"floor": 2.0}}))
    assert not validator.is_valid({"reward": {"scheme": "expnential"}})
    assert schema["$defs"]["LikelihoodRatioPower"]["properties"]["of"]["description"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, set()),
        ({"preset": "rwr"}, {"rewards"}),
        ({"preset": "flow"}, {"initial"}),
        ({"preset": "dft"}, set()),
        ({"preset": "mode_seeking"}, {"policy", "initial"}),
        (ratio(gamma=0.0), set()),
        (ratio(of="policy_over_data"), {"policy", "behavior"}),
        (ratio(of="policy"), {"policy"}),
        (ratio(approximation="first_order", length_exponent=0.0), {"sum_delta"}),
        (ratio(of="policy", gamma={"per_sample": {}}), {"policy", "initial"}),
        (ratio(of="policy", gamma={"per_sample": {"distance": "kl"}}), {"policy", "distance"}),
        ({"token": {"scheme": "talr"}}, {"policy"}),
        ({"preset": "iterative"}, {"initial", "behavior", "rewards"}),
        ({"preset": "iterative", "rounds": 3}, {"round", "behavior", "rewards"}),
        ({"token": {"scheme": "talr", "tau": 1.5}}, set()),
    ],
)
def test_needs(fields: dict[str, Any], expected: set[str]) -> None:
    assert needs(Weighting.model_validate(fields)) == expected


BUDGET = {"nats": 0.1, "max": 0.9}

IMPOSSIBLE = [
    (ratio(gamma=2.5), Facts(), "likelihood.gamma"),
    (ratio(gamma={"ess": {"floor": 0.3, "max": 3.0}}), Facts(), "likelihood.gamma.ess.max"),
    (ratio(gamma={"schedule": {"start": 0.0, "end": 2.5}}), Facts(), "likelihood.gamma.schedule.end"),
    (ratio(clip=[2.0, 1.0]), Facts(), "likelihood.clip"),
    ({"likelihood": {"scheme": "linear", "of": "policy"}}, Facts(), "likelihood.of"),
    (ratio(approximation="first_order"), Facts(), "likelihood.length_exponent"),
    (ratio(approximation="first_order", of="policy", length_exponent=0), Facts(), "likelihood.approximation"),
    (ratio(of="policy", gamma={"kl_budget": {"nats": 0.1}}), Facts(), "likelihood.gamma.kl_budget"),
    (
        {"likelihood": {"scheme": "linear", "gamma": {"per_sample": {}}}},
        Facts(),
        "likelihood.gamma.per_sample",
    ),
    ({**ratio(), "reward": {"scheme": "signed_advantage"}}, Facts(), "likelihood.scheme"),
    (
        {**ratio(of="policy_over_data", gamma=0.75), "reward": {"scheme": "alpha", "alpha": 0.25}},
        Facts(),
        "reward.alpha",
    ),
    ({"normalise": False, "guards": {"cap": 5.0}}, Facts(), "guards.cap"),
    ({"preset": "rwr"}, Facts(has_rewards=False), "reward.scheme"),
    (ratio(of="policy_over_data"), Facts(has_log_behavior=False), "likelihood.of"),
    ({"reward": {"scheme": "exponential", "scope": "group"}}, Facts(samples_per_prompt=1), "reward.scope"),
    ({"reward": {"scheme": "best_of_n", "n": 4}}, Facts(samples_per_prompt=2), "reward.n"),
    ({"preset": "bon"}, Facts(samples_per_prompt=2, smallest_rewarded_group=1), "reward.n"),  # 2, 2, 2, 1
    ({"reward": {"scheme": "best_of_n", "n": 4}}, Facts(samples_per_prompt=1, num_rows=3), "reward.n"),
    ({"reward": {"scheme": "linear"}}, Facts(smallest_reward=-1.0), "reward.scheme"),
    (ratio(gamma={"ess": {"floor": 0.3}}), Facts(batch_size=3), "likelihood.gamma.ess.floor"),
    (ratio(gamma={"ess": {"floor": 0.3}}), Facts(batch_size=64, num_rows=3), "likelihood.gamma.ess.floor"),
    (
        ratio(gamma={"ess": {"floor": 0.3}}),
        Facts(batch_size=6, replay_share=0.5),
        "likelihood.gamma.ess.floor",
    ),
    (
        {"reward": {"scheme": "exponential", "beta": {"ess": {"floor": 0.5}}, "scope": "group"}},
        Facts(samples_per_prompt=2, batch_size=64),
        "reward.beta.ess.floor",
    ),
    ({"preset": "psft"}, Facts(), "token.scheme"),
    ({"preset": "iterative"}, Facts(has_log_behavior=False), "likelihood.of"),
    ({"rounds": 2}, Facts(), "rounds"),
    ({"preset": "iterative", "rounds": 2, "reward": {"beta": [1.0, 2.0, 3.0]}}, Facts(), "reward.beta"),
    ({"reward": {"scheme": "exponential", "beta": [1.0, 2.0]}}, Facts(), "reward.beta"),
    (
        ratio(approximation="first_order", of="round_over_data", length_exponent=0),
        Facts(),
        "likelihood.approximation",
    ),
    (
        ratio(approximation="first_order", of="policy_over_data", length_exponent=0),
        Facts(has_log_behavior=True, has_token_logprobs=False),
        "likelihood.approximation",
    ),
    ({**ratio(), "rounds": 2}, Facts(), "rounds"),
]


@pytest.mark.parametrize(("fields", "facts", "path"), IMPOSSIBLE)
def test_impossible_weightings_are_refused_with_a_way_out(
    fields: dict[str, Any], facts: Facts, path: str
) -> None:
    problems = check_weighting(Weighting.model_validate(fields), facts)
    assert [p.param for p in problems if p.severity == "error"] == [f"method.weighted.{path}"]
    error = problems[0].error()
    assert isinstance(error, ConfigError) and error.mend and error.param == f"method.weighted.{path}"


def test_best_of_n_over_the_batch_asks_nothing_of_single_prompts() -> None:
    weighting = Weighting.model_validate({"reward": {"scheme": "best_of_n", "n": 4, "scope": "batch"}})
    facts = Facts(samples_per_prompt=1, smallest_rewarded_group=1, num_rows=64, batch_size=16)
    assert check_weighting(weighting, facts) == []


def test_weigh_refuses_what_is_impossible_in_itself() -> None:
    with pytest.raises(ConfigError, match=r"gamma 2.5 is above 2"):
        weigh(Evidence(np.zeros(2), np.zeros(2), np.ones(2)), Weighting.model_validate(ratio(gamma=2.5)))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        (ratio(of="policy_over_data", gamma=1.0), "zero_expected_gradient"),
        (ratio(of="policy", gamma=1.0), "collapse"),
        (ratio(of="policy_over_initial", gamma=1.5), "collapse"),
        (ratio(of="initial", length_exponent=0.5), "length_filter"),
        (ratio(of="policy", length_exponent=0.0), "length_filter"),
        (ratio(of="policy", gamma={"schedule": {"start": 0.2, "end": 1.0}}), "collapse"),
        (
            ratio(of="policy", gamma={"schedule": {"kind": "piecewise", "end": 0.2, "points": [[0.5, 1.2]]}}),
            "collapse",
        ),
        (ratio(of="policy", gamma={"ess": {"max": 2.0}}), "collapse"),
        (ratio(gamma={"ess": {}}), "collapse"),  # max is 1
        (
            ratio(of="policy", gamma={"bias_variance": {"bias_squared": 1.0, "variance_slope": 0.0}}),
            "collapse",
        ),
        (ratio(of="policy_over_data", gamma={"per_sample": {"max": 1.5}}), "zero_expected_gradient"),
        (ratio(gamma={"kl_budget": BUDGET}), "kl_not_measured"),
        ({**ratio(gamma={"kl_budget": BUDGET}), "kl": {"direction": "reverse"}}, "reverse_kl"),
    ],
)
def test_warnings(fields: dict[str, Any], code: str) -> None:
    problems = check_weighting(Weighting.model_validate(fields))
    assert [(p.severity, p.code) for p in problems] == [("warning", code)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        ratio(gamma={"ess": {"floor": 0.3, "max": 0.7}}),
        ratio(of="policy", gamma={"schedule": {"start": 0.9, "end": 0.0}}),
        {"preset": "anchored"},  # the other way round nothing collapses
        ratio(of="initial", gamma=7.0),  # static: not bounded
        {**ratio(gamma={"kl_budget": BUDGET}), "kl": {"direction": "forward", "coefficient": 0.0}},
        {"reward": {"scheme": "exponential", "beta": {"ess": {"floor": 0.3}}, "scope": "group"}},
    ],
)
def test_sound_weightings_have_no_problems(fields: dict[str, Any]) -> None:
    facts = Facts(batch_size=64, has_rewards=True, has_log_behavior=True, samples_per_prompt=8)
    assert check_weighting(Weighting.model_validate(fields), facts) == []


@pytest.mark.parametrize("points", [None, [[0.5, 0.1], [0.5, 0.2]], [[0.0, 0.1]], [[0.5, -0.1]]])
def test_bad_schedules(points: Any) -> None:
    with pytest.raises(ValidationError, match="points|negative"):
        Weighting.model_validate(ratio(gamma={"schedule": {"kind": "piecewise", "points": points}}))


def test_observe() -> None:
    from modeseek_ray.types import StepReport

    report = StepReport(0, 1.0, 1.0, 0.5, 1.0, 1e-3, 6, kl_nats=0.25)
    before = {"noise_std": 0.0}
    assert observe(before, report) == {"noise_std": 0.0, "kl_nats": 0.25}
    assert before == {"noise_std": 0.0}
    assert observe({}, StepReport(0, 1.0, 1.0, 0.5, 1.0, 1e-3, 6)) == {}
    with pytest.raises(TypeError, match="kl_nat"):
        observe({}, kl_nat=1.0)
    with pytest.raises(Exception, match="finite"):
        observe({}, kl_nats=math.inf)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([0.1], [0.5]),  # on the budget: unmoved
        ([0.15], [0.55]),  # half too far, rate .2: x 1.1
        ([9.0], [0.6]),  # however far: at most x 1.2
        ([0.05, 0.05], [0.45, 0.405]),  # half too near: x .9, and again
        ([0.0] * 3, [0.4, 0.32, 0.3]),  # min
        ([9.0] * 3, [0.6, 0.7, 0.7]),  # max
        ([None, 0.15], [0.5, 0.55]),  # a step that measured nothing moves nothing
    ],
)
def test_kl_coefficient_moves_towards_its_budget(measured: list[float | None], expected: list[float]) -> None:
    budget = {"nats": 0.1, "rate": 0.2, "min": 0.3, "max": 0.7}
    kl = Weighting.model_validate({"kl": {"direction": "forward", "coefficient": 0.5, "budget": budget}}).kl
    state: dict[str, Any] = {}
    found = []
    for nats in measured:
        state = observe(state, kl=kl, kl_nats=nats)
        found.append(kl_coefficient(kl, state))
    assert found == pytest.approx(expected)


def test_kl_coefficient_settles_where_the_budget_is_met() -> None:
    """A policy whose KL falls as 0.04 / coefficient meets 0.1 nats at a coefficient of 0.4."""
    kl = Weighting.model_validate({"kl": {"direction": "reverse", "budget": {"nats": 0.1}}}).kl
    state: dict[str, Any] = {}
    for _ in range(200):
        state = observe(state, kl=kl, kl_nats=0.04 / kl_coefficient(kl, state))
    assert kl_coefficient(kl, state) == pytest.approx(0.4, rel=1e-6)


def test_kl_coefficient_without_a_budget_is_the_number() -> None:
    kl = Weighting.model_validate({"kl": {"direction": "forward", "coefficient": 0.5}}).kl
    assert kl_coefficient(kl, observe({}, kl=kl, kl_nats=9.0)) == 0.5
    assert kl_coefficient(None, {}) == 0.0


@pytest.mark.parametrize(
    ("kl", "message"),
    [
        ({"coefficient": 0.0, "budget": {"nats": 0.1}}, "starts at 0, which is outside"),
        ({"budget": {"nats": 0.1, "min": 2.0, "max": 1.0}}, "min 2 is above max 1"),
        ({"budget": {"nats": 0.0}}, "greater than 0"),
    ],
)
def test_bad_kl_budgets(kl: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Weighting.model_validate({"kl": {"direction": "forward", **kl}})

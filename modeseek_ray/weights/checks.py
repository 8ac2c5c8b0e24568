"""What can be refused before anything runs: contradictions in a weighting, and with the data it is for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from modeseek_ray.errors import ConfigError
from modeseek_ray.weights import gamma as ways
from modeseek_ray.weights.control import NEARER_WITH_GAMMA, optimal_gamma
from modeseek_ray.weights.gamma import GAMMA_LIMIT
from modeseek_ray.weights.likelihood import FIRST_ORDER_RATIOS, REAL_RATIOS
from modeseek_ray.weights.registry import SIGNED
from modeseek_ray.weights.weighting import Weighting, first_order_ratio, needs, uses_likelihood

ROOT = "method.weighted"


@dataclass(frozen=True)
class Facts:
    """What is known of a job at submission. None = not known yet, and then not checked."""

    batch_size: int | None = None
    num_rows: int | None = None  # of the training file: a batch holds no more, whatever its size
    has_rewards: bool | None = None  # a `reward` on some row, or a grader
    has_log_behavior: bool | None = None  # the sampler's log-probabilities, or a behaviour model
    has_token_logprobs: bool | None = None  # the sampler's, one per trained token
    samples_per_prompt: int | None = None  # of the prompt that has most
    smallest_rewarded_group: int | None = None  # of the prompt with fewest rewarded samples, but any
    smallest_reward: float | None = None
    inner_steps: int = 1  # optimizer steps on one batch
    replay_share: float = 0.0


@dataclass(frozen=True)
class Problem:
    """One thing wrong, or worth knowing, with the path of the field and a way out."""

    severity: Literal["error", "warning"]
    code: str
    param: str
    message: str
    mend: str

    def error(self) -> ConfigError:
        return ConfigError(self.message, mend=self.mend, param=self.param, code=self.code)


def check_weighting(weighting: Weighting, facts: Facts | None = None) -> list[Problem]:
    """All problems, errors first. Without facts, only those of the weighting itself."""
    problems = _of_itself(weighting)
    if facts is not None:
        problems += _against_data(weighting, facts)
    return sorted(problems, key=lambda problem: problem.severity == "warning")


def refuse_impossible(weighting: Weighting) -> None:
    """Raise the first error that needs no facts."""
    for problem in _of_itself(weighting):
        if problem.severity == "error":
            raise problem.error()


def _of_itself(weighting: Weighting) -> list[Problem]:
    return [*_likelihood(weighting), *_reward(weighting), *_guards(weighting)]


def _error(param: str, message: str, mend: str, code: str = "invalid_config") -> Problem:
    return Problem("error", code, f"{ROOT}.{param}", message, mend)


def _warning(param: str, code: str, message: str, mend: str) -> Problem:
    return Problem("warning", code, f"{ROOT}.{param}", message, mend)


def _largest_gamma(gamma: Any) -> tuple[str, float] | None:
    """The largest gamma a setting can reach, and under which field."""
    match gamma:
        case ways.EssGamma():
            return "gamma.ess.max", gamma.ess.max
        case ways.PerSampleGamma():
            return "gamma.per_sample.max", gamma.per_sample.max
        case ways.ScheduleGamma():
            schedule = gamma.schedule
            name = max(("start", "end"), key=lambda field: getattr(schedule, field))
            between = max((value for _, value in schedule.points or []), default=0.0)
            most = getattr(schedule, name)
            return ("gamma.schedule.points", between) if between > most else (f"gamma.schedule.{name}", most)
        case ways.KlBudgetGamma():
            return "gamma.kl_budget.max", gamma.kl_budget.max
        case ways.BiasVarianceGamma():
            return "gamma.bias_variance", optimal_gamma(gamma.bias_variance)
        case ways.InverseMedianNllGamma() if gamma.inverse_median_nll.median_nats is not None:
            return "gamma.inverse_median_nll.median_nats", 1.0 / gamma.inverse_median_nll.median_nats
        case int() | float():
            return "gamma", float(gamma)
    return None


def _likelihood(weighting: Weighting) -> Iterator[Problem]:
    f = weighting.likelihood
    of, gamma = getattr(f, "of", None), getattr(f, "gamma", None)
    if of is None:
        if weighting.rounds > 1:
            yield _error("rounds", "without a likelihood ratio there are no rounds.", "Set rounds: 1.")
        return
    largest = _largest_gamma(gamma)
    if largest is not None and of != "initial" and largest[1] > GAMMA_LIMIT:
        field, value = largest
        yield _error(
            f"likelihood.{field}",
            f"gamma {value:g} is above {GAMMA_LIMIT:g}.",
            "Choose 0.3 to 0.7, or gamma: {ess: {floor: 0.3}}.",
        )
    if f.clip is not None and not 0 <= f.clip[0] < f.clip[1]:
        yield _error("likelihood.clip", f"{list(f.clip)} is not a range.", "Give 0 <= low < high.")
    if f.scheme == "linear" and of not in REAL_RATIOS:
        yield _error(
            "likelihood.of",
            f"linear needs a real ratio; {of!r} is none.",
            f"Choose {', '.join(REAL_RATIOS)}.",
        )
    first_order = getattr(f, "approximation", "exact") == "first_order"
    if first_order and of not in FIRST_ORDER_RATIOS:
        why = "whose policy is kept as sums, without tokens" if of in REAL_RATIOS else "which is no ratio"
        yield _error(
            "likelihood.approximation",
            f"first_order sums up token ratios, and there are none of {of}, {why}.",
            f"Choose of: {', '.join(FIRST_ORDER_RATIOS)}, or approximation: exact.",
        )
    if first_order and f.length_exponent != 0:
        yield _error(
            "likelihood.length_exponent",
            f"first_order approximates the sequence ratio, not its power 1/T^{f.length_exponent:g}.",
            "Set length_exponent: 0, or approximation: exact.",
        )
    if isinstance(gamma, ways.PerSampleGamma) and (first_order or f.scheme != "ratio_power"):
        yield _error(
            "likelihood.gamma.per_sample",
            "a gamma per sample needs exp(gamma L).",
            "Choose scheme: ratio_power with approximation: exact.",
        )
    if isinstance(gamma, ways.KlBudgetGamma) and of not in NEARER_WITH_GAMMA:
        yield _error(
            "likelihood.gamma.kl_budget",
            f"gamma does not steer the distance to the start with of: {of}.",
            f"Choose of: {', '.join(NEARER_WITH_GAMMA)}.",
        )
    if isinstance(gamma, ways.KlBudgetGamma):
        yield from _unmeasured_kl(weighting)
    if weighting.rounds > 1 and of != "round_over_data":
        yield _error("rounds", f"of: {of} knows no rounds.", "Set rounds: 1, or of: round_over_data.")
    yield from _collapses(f, of, largest)


def _unmeasured_kl(weighting: Weighting) -> Iterator[Problem]:
    """A budget on the forward KL hears nothing where the trainer measures none, or the other one."""
    if weighting.kl is None:
        yield _warning(
            "likelihood.gamma.kl_budget",
            "kl_not_measured",
            "nothing measures the KL to the start, so gamma stays at kl_budget.start.",
            "Add kl: {direction: forward, coefficient: 0}: 0 measures without pulling.",
        )
    elif weighting.kl.direction == "reverse":
        yield _warning(
            "likelihood.gamma.kl_budget",
            "reverse_kl",
            "the budget is of the forward KL(pi_0 || pi), and kl.direction: reverse measures KL(pi || pi_0).",
            "Set kl.direction: forward, or read kl_budget.nats as nats of the reverse KL.",
        )


def _collapses(f: Any, of: str, largest: tuple[str, float] | None) -> Iterator[Problem]:
    """What becomes of a ratio at gamma 1 and above, if the setting can get there."""
    field, reached = largest or ("gamma", 0.0)
    if reached >= 1 and of == "policy_over_data":
        beyond = "" if reached == 1 else ", and beyond it points away from the data"
        yield _warning(
            f"likelihood.{field}",
            "zero_expected_gradient",
            f"policy_over_data at gamma 1 has zero expected gradient{beyond}.",
            "Keep gamma below 1.",
        )
    if reached >= 1 and of in ("policy", "policy_over_initial"):
        target = "mu" if of == "policy" else "mu/pi_0"
        yield _warning(
            f"likelihood.{field}",
            "collapse",
            f"{of} at gamma {reached:g} collapses to argmax {target}.",
            "Keep gamma below 1, or stop early.",
        )
    if of in ("policy", "initial") and f.length_exponent < 1:
        yield _warning(
            "likelihood.length_exponent",
            "length_filter",
            f"{of} with length_exponent {f.length_exponent:g} filters by length: long answers lose.",
            "Set length_exponent: 1.",
        )


def _reward(weighting: Weighting) -> Iterator[Problem]:
    g, f = weighting.reward, weighting.likelihood
    if g.scheme in SIGNED and uses_likelihood(weighting):
        yield _error(
            "likelihood.scheme",
            f"{g.scheme} is used as it is: it takes no likelihood factor.",
            "Set likelihood: {scheme: uniform}, or choose another reward scheme.",
        )
    betas = getattr(g, "beta", None)
    if isinstance(betas, list) and len(betas) != weighting.rounds:
        yield _error(
            "reward.beta",
            f"a list of {len(betas)} for {weighting.rounds} rounds: a list has one beta for each round.",
            f"Set rounds: {len(betas)}, give {weighting.rounds} numbers, or one number for all rounds.",
        )
    if g.scheme == "preference" and g.scope == "batch":
        yield _error(
            "reward.scope",
            "a pair is two answers to the same prompt.",
            "Set scope: group.",
        )
    if g.scheme == "alpha" and getattr(f, "of", None) == "policy_over_data":
        gamma = f.gamma
        if isinstance(gamma, int | float) and abs(gamma - (1 - g.alpha)) < 1e-9:
            yield _error(
                "reward.alpha",
                "alpha and policy_over_data at gamma = 1 - alpha have the same fixed point: it counts twice.",
                "Drop one of them.",
            )


def _guards(weighting: Weighting) -> Iterator[Problem]:
    guards = weighting.guards
    if not weighting.normalise and guards.cap is not None and "cap" in guards.model_fields_set:
        yield _error(
            "guards.cap",
            "the cap keeps a mean of one, which normalise: false gives up.",
            "Drop guards.cap and use likelihood.clip, or set normalise: true.",
        )


def _against_data(weighting: Weighting, facts: Facts) -> Iterator[Problem]:
    g, wanted = weighting.reward, needs(weighting)
    if "rewards" in wanted and facts.has_rewards is False:
        yield _error(
            "reward.scheme",
            f"{g.scheme} needs rewards, and neither a row nor a grader gives any.",
            "Give every row preferred_output and non_preferred_output."
            if g.scheme == "preference"
            else "Add a `reward` field to the rows or a grader, or drop `reward`.",
            code="no_rewards",
        )
    if "behavior" in wanted and facts.has_log_behavior is False:
        yield _error(
            "likelihood.of",
            f"{weighting.likelihood.of} needs to know how likely the data were to their author.",
            "Give `logprobs` with every row, or name a behavior_model, or choose another `of`.",
            code="no_logprobs",
        )
    if first_order_ratio(weighting) == "policy_over_data" and facts.has_token_logprobs is False:
        yield _error(
            "likelihood.approximation",
            "first_order of policy_over_data needs the sampler's log-probability of every token; a row's sum, or a"
            " behavior_model, does not say them.",
            "Give `logprobs` as a list, one number per trained token, or choose approximation: exact.",
        )
    if g.scheme == "preference" and facts.replay_share > 0:
        yield _error(
            "training.replay_share",
            "preference weights are made for pairs alone; replay rows are none.",
            "Set it to 0, or use kl: {direction: forward} to stay near the start.",
        )
    if weighting.token.scheme == "psft" and facts.inner_steps == 1:
        yield _error(
            "token.scheme",
            "psft compares with the start of the inner loop: with one inner step it is plain SFT.",
            "Drop it, or choose dft.",
        )
    samples = facts.samples_per_prompt
    if getattr(g, "scope", None) == "group" and samples is not None and samples < 2:
        yield _error(
            "reward.scope",
            "no prompt has more than one sample: within its group every row gets weight 1.",
            "Set scope: batch, or sample several answers per prompt.",
        )
    if g.scheme == "best_of_n":
        yield from _best_of_n(g, facts)
    if g.scheme == "linear" and facts.smallest_reward is not None and facts.smallest_reward < 0:
        yield _error(
            "reward.scheme",
            f"linear needs rewards >= 0; the smallest is {facts.smallest_reward:g}.",
            "Choose exponential, or shift the rewards.",
        )
    yield from _floors(weighting, facts)


def _best_of_n(g: Any, facts: Facts) -> Iterator[Problem]:
    """Every prompt needs N rewarded samples, as every batch does where rewards are compared over it."""
    if _by_group(g, facts):
        fewest, where = facts.smallest_rewarded_group, "of the prompt that has fewest"
        fewest = facts.samples_per_prompt if fewest is None else fewest
    else:
        fewest, where = _new_rows(facts), "of a batch"
    if fewest is not None and fewest < g.n:
        yield _error(
            "reward.n",
            f"best of {g.n} from the {fewest} rewarded samples {where}.",
            f"Set reward.n to {fewest}, or give every prompt {g.n} rewarded samples."
            if fewest > 1
            else f"Give every prompt {g.n} rewarded samples, or drop the rows of those that have fewer.",
        )


def _by_group(g: Any, facts: Facts) -> bool:
    """Whether rewards are compared within prompts, as far as is known: `auto` does where a prompt has several."""
    samples = facts.samples_per_prompt
    return g.scope == "group" or (g.scope == "auto" and samples is not None and samples > 1)


def _new_rows(facts: Facts) -> int | None:
    """Most rows of a batch that are no replay; None where neither its size nor the file's is known."""
    sizes = [] if facts.num_rows is None else [facts.num_rows]
    if facts.batch_size is not None:
        sizes.append(round(facts.batch_size * (1 - facts.replay_share)))
    return max(1, min(sizes)) if sizes else None


def _floors(weighting: Weighting, facts: Facts) -> Iterator[Problem]:
    """An ESS ratio never falls below 1 / (rows compared), so a floor down there does nothing."""
    new_rows = _new_rows(facts)
    gamma, beta = getattr(weighting.likelihood, "gamma", None), getattr(weighting.reward, "beta", None)
    floors: list[tuple[str, float, int | None]] = []
    if isinstance(gamma, ways.EssGamma):
        floors.append(("likelihood.gamma.ess.floor", gamma.ess.floor, new_rows))
    if isinstance(gamma, ways.PerSampleGamma):
        floors.append(("likelihood.gamma.per_sample.floor", gamma.per_sample.floor, new_rows))
    if isinstance(beta, ways.EssBeta):
        rows = facts.samples_per_prompt if _by_group(weighting.reward, facts) else new_rows
        floors.append(("reward.beta.ess.floor", beta.ess.floor, rows))
    for param, floor, rows in floors:
        if rows is not None and floor <= 1 / rows:
            yield _error(
                param,
                f"a floor of {floor:g} cannot bind: over {rows} rows the ratio is at least {1 / rows:.3g}.",
                "Raise the floor, or the number of rows (of the file, batch_size, samples per prompt).",
                code="floor_cannot_bind",
            )

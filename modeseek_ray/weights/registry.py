"""Every scheme by name: `SCHEMES[section][name]` is a plain function. One function and one line here add one.

A package of your own adds a scheme without touching this one, through an entry point of the group
`modeseek_ray.weightings` named `<section>.<name>`:

    [project.entry-points."modeseek_ray.weightings"]
    "reward.square_root" = "my_package:square_root"

Positional parameters are what the function looks at, by name: `log_ratio_N` (likelihood) and any
column of `Evidence`; `rewards_N` and `scope` (reward). Keyword defaults are its configuration. It
returns log f or log g, one number per row; -inf means zero.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from modeseek_ray.strict import Strict, section
from modeseek_ray.types import FloatArray
from modeseek_ray.weights import likelihood, reward
from modeseek_ray.weights.preference import preference

Scheme = Callable[..., FloatArray]
ENTRY_POINT_GROUP = "modeseek_ray.weightings"

SCHEMES: dict[str, dict[str, Scheme]] = {
    "likelihood": {
        "uniform": likelihood.uniform,
        "ratio_power": likelihood.ratio_power,
        "linear": likelihood.linear,
    },
    "reward": {
        "uniform": reward.uniform,
        "linear": reward.linear,
        "exponential": reward.exponential,
        "clipped_exponential": reward.clipped_exponential,
        "alpha": reward.alpha,
        "power": reward.power,
        "threshold": reward.threshold,
        "top_k": reward.top_k,
        "advantage": reward.advantage,
        "best_of_n": reward.best_of_n,
        "first_order": reward.first_order,
        "signed_advantage": reward.signed_advantage,
        "preference": preference,
    },
}

SIGNED = frozenset({"signed_advantage", "preference"})  # rewards whose values are weights, not logs


@cache
def positionals(scheme: Scheme) -> tuple[str, ...]:
    """Names of what a scheme looks at."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(scheme).parameters.values() if p.kind in kinds)


@cache
def keywords(scheme: Scheme) -> tuple[str, ...]:
    """Names of what configures it."""
    return tuple(
        p.name
        for p in inspect.signature(scheme).parameters.values()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    )


def _load_plug_ins() -> None:
    """Add the schemes of other packages. One that cannot be loaded is warned about and left out."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        group, _, name = point.name.partition(".")
        try:
            if group not in SCHEMES or not name.isidentifier():
                raise ValueError(f"its name must be likelihood.<name> or reward.<name>, not {point.name!r}")
            if name in SCHEMES[group]:
                raise ValueError(f"there is already a {group} scheme {name!r}")
            scheme = point.load()
            section(group, name, scheme)
        except Exception as error:  # whatever another package's import raises
            warnings.warn(f"weighting plug-in {point.value} left out: {error}", RuntimeWarning, stacklevel=2)
        else:
            SCHEMES[group][name] = scheme


_load_plug_ins()


def _base(group: str, scheme: Scheme) -> type[Strict]:
    """The fields that go with what a scheme looks at."""
    if group == "likelihood" and "log_ratio_N" in positionals(scheme):
        return likelihood.Ratio
    if group == "reward" and "rewards_N" in positionals(scheme):
        return reward.Rewarded
    return Strict


SECTIONS: dict[str, dict[str, type[Strict]]] = {
    group: {name: section(group, name, scheme, _base(group, scheme)) for name, scheme in schemes.items()}
    for group, schemes in SCHEMES.items()
}


def scheme_of(group: str, configured: Any) -> Scheme:
    """The function a section names."""
    return SCHEMES[group][configured.scheme]

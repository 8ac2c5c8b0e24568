"""What workers are told before they import torch, as libgomp itself understands it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from actors.environments import generator_environment, scorer_environment, trainer_environment
from actors.generator import GeneratorSpec, Sampling
from modeseek_ray.config import Resources

SPEC = GeneratorSpec(
    model_path="a-model", sampling=Sampling(samples_per_prompt=1, max_tokens=1), cpus_per_worker=2
)


@pytest.mark.parametrize(
    "environment",
    [scorer_environment(2), trainer_environment(Resources(cpus_per_worker=2)), generator_environment(SPEC)],
    ids=["scorer", "trainer", "generator"],
)
@pytest.mark.parametrize("inherited", ["ACTIVE", "PASSIVE"])
def test_threads_spin_for_a_moment_whatever_the_driver_was_told(
    environment: dict[str, str], inherited: str
) -> None:
    """Neither not at all nor for ever, which are what the two policies mean."""
    variables = {**os.environ, "OMP_WAIT_POLICY": inherited, **environment, "OMP_DISPLAY_ENV": "VERBOSE"}
    command = [sys.executable, "-c", "import torch"]
    shown = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=True)
    found = dict(re.findall(r"(\w+) = '(\w+)'", shown.stderr))
    assert (found["GOMP_SPINCOUNT"], found["OMP_NUM_THREADS"]) == ("10000", "2")

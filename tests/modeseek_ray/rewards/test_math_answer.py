from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import modeseek_ray
from modeseek_ray.rewards import Grade, GradeItem, SampleError
from modeseek_ray.rewards.math_answer import MathGrader, MathProcess
from modeseek_ray.rewards.parameters import MathAnswer

ENDLESS = r"\boxed{9^{9^{9^9}}}"


@pytest.fixture(scope="module")
def process() -> Iterator[MathProcess]:
    process = MathProcess()
    yield process
    process.stop()


@pytest.fixture
def grader(process: MathProcess) -> MathGrader:
    """With the module's one process: starting one takes a second."""
    return grader_with(process, timeout_s=60.0)


def grader_with(process: MathProcess, timeout_s: float) -> MathGrader:
    grader = MathGrader(MathAnswer(reference="{{ item.reference }}", timeout_s=timeout_s), processes=1)
    grader._processes = [process]
    return grader


def item(text: str, reference: str | float | None) -> GradeItem:
    return GradeItem(text, {} if reference is None else {"reference": reference}, 1)


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("1/2", "The answer is 0.5.", 1.0),
        ("1/2", r"Hence $x = \frac{2}{4}$.", 1.0),
        ("1/2", r"Thus \boxed{\frac12}, and not $\frac13$.", 1.0),
        (r"\frac12", "It is 1/2", 1.0),
        (0.5, "1/2", 1.0),  # a number in the row, not a string
        ("1/3", "0.333333", 1.0),  # six decimal places
        ("1/3", "0.3333", 0.0),
        ("x^2 + 1", r"\boxed{1 + x^2}", 1.0),
        ("(x+1)^2", r"\boxed{x^2 + 2x + 1}", 1.0),
        ("x^2 + 1", r"\boxed{1 + y^2}", 0.0),
        (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1.0),
        (r"$\sqrt{8}$", r"$2\sqrt{2}$", 1.0),
        ("1000", "about 1,000", 1.0),
        ("7", "I'd say 6, no: 7", 1.0),
        ("7", "I do not know", 0.0),
        ("7", "", 0.0),
    ],
)
async def test_equal_is_what_mathematics_calls_equal(
    grader: MathGrader, reference: str | float, text: str, expected: float
) -> None:
    assert await grader.grade([item(text, reference)]) == [Grade(expected)]


async def test_one_bad_sample_spoils_no_other(process: MathProcess) -> None:
    grader = grader_with(process, timeout_s=3.0)  # one comparison takes as long as it may
    good = item("42", "42")
    odd = [item("1", "?!"), item("1", None), item(ENDLESS, "7"), item("\ud800", "7"), item("$" * 5000, "7")]
    found = await grader.grade([good, *odd, good])
    assert [found[0], found[-1]] == [Grade(1.0)] * 2
    assert [grade.error for grade in found[1:4]] == [
        "the reference '?!' cannot be read as mathematics",
        "item.reference: there is no 'reference'",
        "the comparison took more than 3 s",
    ]
    assert found[4] == Grade(0.0)
    assert found[5] == Grade(0.0)


async def test_samples_are_shared_out_and_come_back_in_order() -> None:
    grader = MathGrader(MathAnswer(reference="{{ item.reference }}"), processes=2)
    found = await grader.grade([item(str(n), "3") for n in range(7)])
    assert [grade.reward for grade in found] == [0, 0, 0, 1, 0, 0, 0]
    pids = [process._process.pid for process in grader._processes if process._process]
    assert len(pids) == 2
    await grader.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_process_that_is_killed_is_one_sample_s_error(process: MathProcess) -> None:
    request = {"text": "1", "reference": "1", "float_rounding": 6, "strict": True, "timeout_s": 60.0}
    assert process.ask(request, timeout_s=60.0)
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(SampleError, match="ended its process"):
        process.ask(request, timeout_s=60.0)
    assert process.ask(request, timeout_s=60.0)


def test_no_comparison_outlives_the_one_who_asked() -> None:
    """kill -9 of the asker in the middle of an endless comparison; the kernel's alarm ends the worker."""
    code = (
        "import sys\n"
        "from modeseek_ray.rewards.math_answer import MathProcess\n"
        "process = MathProcess()\n"
        "request = {'reference': '7', 'float_rounding': 6, 'strict': True, 'timeout_s': 0.5}\n"
        "process.ask({**request, 'text': '7'}, timeout_s=60)\n"
        "print(process._process.pid, flush=True)\n"
        f"process.ask({{**request, 'text': {ENDLESS!r}}}, timeout_s=60)\n"
    )
    asker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        cwd=Path(modeseek_ray.__file__).parents[1],
    )
    assert asker.stdout is not None
    worker = psutil.Process(int(asker.stdout.readline()))
    time.sleep(0.3)
    asker.kill()
    asker.wait()
    psutil.wait_procs([worker], timeout=20)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

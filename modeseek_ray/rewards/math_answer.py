"""`math_answer`: is the answer's last expression the reference's? By the `math-verify` library.

N  samples handed to one call
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from modeseek_ray.rewards.grader import Grade, GradeItem, SampleError, failed
from modeseek_ray.rewards.parameters import MathAnswer
from modeseek_ray.rewards.template import parse_template

_START_TIMEOUT_S = 120.0  # a cold import on a busy machine
_MAX_PROCESSES = 4


class MathGrader:
    """1 or 0 per sample. A comparison that takes too long is that sample's error, and its process is killed."""

    def __init__(self, section: MathAnswer, *, processes: int | None = None) -> None:
        count = processes or max(1, min(_MAX_PROCESSES, (os.cpu_count() or 1) // 2))
        self._section = section
        self._text = parse_template(section.input)
        self._reference = parse_template(section.reference)
        self._processes = [MathProcess() for _ in range(count)]

    async def grade(self, items: Sequence[GradeItem]) -> list[Grade]:
        count = len(self._processes)
        shares = await asyncio.gather(
            *(
                asyncio.to_thread(self._share, process, items[k::count])
                for k, process in enumerate(self._processes)
                if k < len(items)
            )
        )
        return [shares[n % count][n // count] for n in range(len(items))]

    def _share(self, process: MathProcess, items: Sequence[GradeItem]) -> list[Grade]:
        return [self._one(process, item) for item in items]

    def _one(self, process: MathProcess, item: GradeItem) -> Grade:
        try:
            request = {
                "text": self._text.render(item),
                "reference": self._reference.render(item),
                **self._section.model_dump(include={"float_rounding", "strict", "timeout_s"}),
            }
            return Grade(float(process.ask(request, timeout_s=self._section.timeout_s)))
        except Exception as error:
            return failed(error, lowest=0.0)

    async def close(self) -> None:
        for process in self._processes:
            await asyncio.to_thread(process.stop)


class MathProcess:
    """One `math_worker`, started when first asked and again after it was killed. Asked by one thread at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any], *, timeout_s: float) -> bool:
        """Raises `SampleError` with the reason where there is no answer."""
        with self._lock:
            process = self._start()
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                answer = _read_line(process, timeout_s)
            except TimeoutError:
                self._end()
                raise SampleError(f"the comparison took more than {timeout_s:g} s") from None
            except OSError:
                self._end()
                raise SampleError(
                    f"the comparison ended its process (exit status {process.returncode})"
                ) from None
            if "error" in answer:
                raise SampleError(answer["error"])
            return bool(answer["equal"])

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            process = subprocess.Popen(
                [sys.executable, "-m", "modeseek_ray.rewards.math_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            self._process = process
            self._finalizer = weakref.finalize(self, _kill, process)  # also at the interpreter's exit
            try:
                _read_line(process, _START_TIMEOUT_S)
            except OSError as error:  # a TimeoutError is one
                self._end()
                raise SampleError(f"the process that compares mathematics did not start ({error})") from None
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._finalizer()
            self._process = None

    def stop(self) -> None:
        with self._lock:
            self._end()


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> dict[str, Any]:
    """One JSON line. Raises `TimeoutError`, or another `OSError` if the process is gone."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poll = select.poll()  # select() refuses descriptors above 1023
    poll.register(descriptor, select.POLLIN)
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"no answer within {timeout_s:g} s")
        piece = os.read(descriptor, 65536)
        if not piece:
            raise BrokenPipeError("it ended")
        line += piece
    answer: dict[str, Any] = json.loads(line)
    return answer

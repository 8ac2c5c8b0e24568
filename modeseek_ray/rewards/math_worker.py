"""A process that compares mathematics: `python -m modeseek_ray.rewards.math_worker`, JSON lines in and out.

A process of its own because a comparison may never end (`9^{9^{9^9}}` is one token away), may ask for all
the memory, and cannot be interrupted from within while it is in a single big-integer operation.

The text is untrusted. `math_verify` hands SymPy's `parse_expr`, which evaluates Python, nothing but digits
and operators; everything else goes through its LaTeX grammar.
"""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys
from typing import Any

MEMORY_BYTES = 2 * 2**30
_GRACE_S = 2.0  # after the asker's own time limit
_DELIMITERS = ("$", r"\(", r"\[", r"\boxed")


def compare(request: dict[str, Any]) -> dict[str, Any]:
    """`{"equal": bool}`, or `{"error": why}` where the reference is no mathematics.

    A reference is mathematics as a whole, with or without dollars around it; an answer is prose, from which
    the last `\\boxed{…}`, formula or number is taken.
    """
    from math_verify import parse, verify

    reference = request["reference"]
    whole = reference if any(mark in reference for mark in _DELIMITERS) else f"${reference}$"
    # No time limits of the library's own: they answer "not equal", and the asker wants to know.
    gold = parse(whole, parsing_timeout=None)
    if all(isinstance(part, str) for part in gold):  # the library keeps what it could not read as a string
        return {"error": f"the reference {reference[:50]!r} cannot be read as mathematics"}
    equal = verify(
        gold,
        parse(request["text"], parsing_timeout=None),
        float_rounding=request["float_rounding"],
        strict=request["strict"],
        timeout_seconds=None,
    )
    return {"equal": bool(equal)}


def main() -> None:
    logging.disable(logging.ERROR)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    compare({"reference": "1", "text": "1", "float_rounding": 6, "strict": True})  # load everything
    _say({"ready": True})
    for line in sys.stdin:  # ends when whoever asks is gone
        request = json.loads(line)
        # The kernel ends this process even if the asker died in the middle of an endless comparison.
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + _GRACE_S)
        try:
            answer = compare(request)
        except (Exception, RecursionError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(answer)


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Bytes that are almost right: seeds, cut and joined and sprinkled with what parsers stumble over.

Random but repeatable: input `i` of a target depends on nothing but the two.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

LONG = bool(os.environ.get("MODESEEK_FUZZ"))
CORPUS = Path(__file__).parents[1] / "corpus"

SPRINKLES = (
    b"NaN", b"-Infinity", b"1e999", b"-0", b"0.1e-400", b"9" * 40, b"9" * 5000, b"-9223372036854775808",
    b"9223372036854775808", rb"\ud800", rb"\udc00", rb"\ud83d\ude00", rb"\u0000", b"\0", b"\xff", b"\xef\xbb\xbf",
    b"\xed\xa0\x80", b"\r\n", b"\n", b"\r", b"\x0b", b"\xe2\x80\xa8", b"[" * 70, b"]" * 70, b"[" * 3000, b'{"a":' * 70,
    b"{}", b"[]", b'""', b"null", b"true", b",", b":", b'"', b"\\", b"/*", b"'", b" " * 100, b'"a":1,"a":2',
    b'{"role":"assistant","content":""}', b'"weight":-1', b'"logprobs":[0.1]', b'"reward":1e300', b"PAR1",
)  # fmt: skip


def inputs(target: str, seeds: Sequence[bytes], short: int, long: int) -> Iterator[bytes]:
    """First what once broke (`tests/corpus/TARGET`), then the seeds, then what is made of both."""
    kept = sorted((CORPUS / target).glob("*"))
    pool = [*(path.read_bytes() for path in kept), *seeds]
    yield from pool
    for i in range(long if LONG else short):
        yield mutated(random.Random(f"{target} {i}"), pool)


def mutated(rng: random.Random, pool: Sequence[bytes]) -> bytes:
    data = bytearray(rng.choice(pool))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4, 8))):
        at = rng.randint(0, len(data))
        end = min(len(data), at + rng.choice((0, 1, 1, 2, 8, 64)))
        match rng.randrange(6):
            case 0:
                data[at:end] = rng.choice(SPRINKLES)
            case 1:
                data[at:at] = rng.choice(SPRINKLES)
            case 2:
                data[at:end] = rng.randbytes(end - at)
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end] * rng.randint(1, 3)
            case _:
                other = rng.choice(pool)
                data[at:] = other[rng.randint(0, len(other)) :]
    return bytes(data)


def fuzz(target: str, seeds: Sequence[bytes], check: Callable[[bytes], None], short: int, long: int) -> int:
    """Run `check` on each input. The first that breaks it is written down, to be kept in the corpus."""
    count = 0
    for data in inputs(target, seeds, short, long):
        try:
            check(data)
        except BaseException as error:
            (CORPUS / target).mkdir(parents=True, exist_ok=True)
            path = CORPUS / target / f"{type(error).__name__}-{len(data)}-{count}"
            path.write_bytes(data)
            raise AssertionError(f"{target}: {path} breaks it: {error!r}") from error
        count += 1
    return count

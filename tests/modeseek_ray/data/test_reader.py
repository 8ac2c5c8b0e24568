"""Bad files: refused by kind and line, in bounded memory, and never with another exception."""

from __future__ import annotations

import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from modeseek_ray.data.check import inspect_file
from modeseek_ray.data.reader import MAX_DEPTH, MAX_LINE_BYTES, parse_line, read_records
from modeseek_ray.errors import DataError

GOOD = {"prompt": "a", "completion": "b"}
GOOD_LINE = json.dumps(GOOD).encode()


def nested(depth: int) -> bytes:
    return b'{"prompt": ' + b"[" * depth + b"]" * depth + b', "completion": "b"}'


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        (b'{"prompt": "a", ', "malformed_json", "at column 17"),
        (b"{'prompt': 'a'}", "malformed_json", "at column 2"),
        (GOOD_LINE + GOOD_LINE, "malformed_json", "Extra data"),
        (b'{"prompt": "a\x01", "completion": "b"}', "malformed_json", "control character"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "not_utf8", "byte 16 of the line"),
        (GOOD_LINE.decode().encode("utf-16"), "not_utf8", "UTF-16"),
        (b'["a", "b"]', "not_an_object", "a JSON array"),
        (b"3", "not_an_object", "a JSON number"),
        (b"null", "not_an_object", "a JSON null"),
        (nested(MAX_DEPTH), "too_deep", "deeper than 64"),
        (nested(500_000), "too_deep", "deeper than 64"),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "duplicate_key", "'prompt' appears twice"),
        (b'{"messages": [{"role": "user", "role": "user"}]}', "duplicate_key", "'role' appears twice"),
        (b'{"reward": NaN}', "not_finite", "NaN is not JSON"),
        (b'{"reward": -Infinity}', "not_finite", "-Infinity is not JSON"),
        (b'{"prompt": "\\ud800", "completion": "b"}', "lone_surrogate", "half of a character"),
        (b'{"prompt": "\\uDFFF", "completion": "b"}', "lone_surrogate", "half of a character"),
        (b'{"id": 123456789012345678901234567890}', "huge_integer", "does not fit 64 bits"),
        (b'{"id": ' + b"9" * 10_000 + b"}", "huge_integer", "999…"),
        (b'{"id": 9223372036854775808}', "huge_integer", "does not fit 64 bits"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(write_jsonl, line, kind, message):
    report = inspect_file(write_jsonl(GOOD, GOOD, line, GOOD))
    assert report.rows == 3
    assert report.problems.counts == {kind: 1}
    (problem,) = report.problems.examples
    assert problem.line == 3 and message in problem.message and problem.mend


def test_what_is_sound_is_read():
    assert parse_line(b'{"id": 9223372036854775807, "prompt": "\\ud83c\\udf89"}') == {
        "id": 2**63 - 1,
        "prompt": "🎉",
    }
    assert parse_line(nested(MAX_DEPTH - 1))["completion"] == "b"
    brackets = json.dumps({"prompt": "[" * 1000, "completion": "{" * 1000})
    assert parse_line(brackets.encode())["prompt"] == "[" * 1000


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n\r\n  \n" + GOOD_LINE + b"\r\n")
    assert list(read_records(path)) == [(0, GOOD), (3, GOOD)]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\r\n", b"   "])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    assert inspect_file(path).problems.counts == {"empty_file": 1}


def test_a_file_that_is_not_there_is_refused(tmp_path):
    assert inspect_file(tmp_path / "none.jsonl").problems.counts == {"unreadable": 1}


def test_a_line_of_100_mb_is_refused_without_being_held(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(GOOD_LINE + b'\n{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 10**6)
        file.write(b'", "completion": "b"}\n' + GOOD_LINE)
    tracemalloc.start()
    report = inspect_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.rows, dict(report.problems.counts)) == (2, {"line_too_long": 1})
    assert report.problems.examples[0].line == 2
    assert "95.4 MiB" in report.problems.examples[0].message
    assert peak < 3 * MAX_LINE_BYTES


def test_a_line_just_within_the_limit_is_read(tmp_path):
    path = tmp_path / "long.jsonl"
    frame = len(json.dumps({**GOOD, "prompt": ""}))
    for size, num_bad in ((MAX_LINE_BYTES, 0), (MAX_LINE_BYTES + 1, 1)):
        path.write_bytes(json.dumps({**GOOD, "prompt": "x" * (size - frame)}).encode() + b"\n" + GOOD_LINE)
        assert inspect_file(path).problems.counts.total() == num_bad


def test_every_problem_is_counted_and_twenty_of_each_kind_are_shown(write_jsonl):
    report = inspect_file(write_jsonl(*[b"{"] * 100, *[b"3"] * 5))
    assert report.problems.counts == {"malformed_json": 100, "not_an_object": 5}
    assert [p.line for p in report.problems.examples] == [*range(1, 21), *range(101, 106)]


def parquet(tmp_path, rows, name="rows.parquet"):
    path = tmp_path / name
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_parquet_reads_like_jsonl(tmp_path):
    rows = [
        {
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
            "reward": 0.5,
        },
        {"messages": [{"role": "assistant", "content": "b"}]},
    ]
    for name in ("rows.parquet", "file-without-suffix"):
        path = parquet(tmp_path, rows, name)
        assert [record for _, record in read_records(path)] == rows  # nulls are dropped
        assert inspect_file(path).rows == 2


def test_parquet_problems_are_numbered_by_record(tmp_path):
    rows = [{**GOOD, "reward": 0.0}] * 300 + [
        {**GOOD, "reward": float("nan")},
        {**GOOD, "reward": float("inf")},
    ]
    report = inspect_file(parquet(tmp_path, rows))
    assert report.problems.counts == {"not_finite": 2}
    assert [p.line for p in report.problems.examples] == [301, 302]


def test_parquet_with_types_json_has_not_is_refused(tmp_path):
    path = parquet(tmp_path, [{"prompt": b"bytes", "completion": "b"}])
    assert inspect_file(path).problems.counts == {"wrong_type": 1}


def test_a_file_that_only_ends_like_parquet_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(GOOD_LINE)
    assert inspect_file(path).problems.counts == {"bad_parquet": 1}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(
    "messages prompt completion reward weight group logprobs id task accept tools role content name".split()
)
MESSAGES = st.lists(st.dictionaries(NAMES, VALUES | st.just("assistant"), max_size=4) | VALUES, max_size=3)
RECORDS = st.dictionaries(NAMES | st.text(max_size=5), VALUES | MESSAGES, max_size=6)
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(st.lists(RECORDS.map(json.dumps).map(str.encode) | st.binary(max_size=60), max_size=4))
@example([b"\xff\xfe"])
@example([b"PAR1"])
@example([b"PAR1" + b"\0" * 20 + b"PAR1"])
def test_no_file_raises_anything_when_inspected(tmp_path, model_tokenizer, lines):
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(b"\n".join(lines))
    for role in ("training", "validation"):
        for tokenizer in (None, model_tokenizer):
            json.dumps(inspect_file(path, tokenizer, role=role, max_length=64).to_dict(), allow_nan=False)


@FUZZ
@given(st.binary(max_size=200))
def test_no_line_raises_anything_but_data_errors(line):
    try:
        record = parse_line(line)
    except DataError:
        return
    assert isinstance(record, dict)


@FUZZ
@given(st.data())
def test_no_damaged_parquet_raises_anything_when_inspected(tmp_path, data):
    path = parquet(tmp_path, [{**GOOD, "reward": float(i), "logprobs": [-1.0]} for i in range(5)])
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(4, len(content)))])
    inspect_file(path).to_dict()

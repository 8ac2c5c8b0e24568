"""Parsers of what users send, on inputs that are almost right: refused by name, or read; never anything else.

A few thousand inputs here, more than 10^5 by `make fuzz`. What broke one is kept in `tests/corpus` and
read first, each time.
"""

from __future__ import annotations

import io
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from modeseek_ray.config import parse_config
from modeseek_ray.data.loading import read_rows
from modeseek_ray.data.problems import Problems
from modeseek_ray.data.prompts import read_prompts
from modeseek_ray.data.reader import read_records
from modeseek_ray.errors import ConfigError, DataError, ModelError
from modeseek_ray.jobs.models import ModelInfo
from modeseek_ray.rewards.expression import FormulaError, parse_formula
from modeseek_ray.rewards.template import TemplateError, parse_template
from modeseek_ray.service.body import parse_json
from modeseek_ray.service.errors import RequestError
from tests.modeseek_ray.fuzzing import fuzz

pytestmark = pytest.mark.timeout(3600)

ROW_SEEDS = [
    b'{"prompt": "one plus one is", "completion": " two", "reward": 0.5, "group": "g", "id": 7, "weight": 1}\n' * 2,
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1}]}\n',
    b'{"prompt": "a", "completion": "b", "logprobs": [-0.5, -0.25]}\n{"prompt": "a", "completion": "b"}\r\n\r\n',
    b'{"input": {"messages": [{"role": "user", "content": "a"}]}, "preferred_output": [{"role": "assistant", '
    b'"content": "b"}], "non_preferred_output": [{"role": "assistant", "content": "c"}]}\n',
    b'\xef\xbb\xbf{"prompt": "\xe6\x97\xa5\xe6\x9c\xac", "reference": {"a": [1, 2.5, null, true]}}\n',
]  # fmt: skip
JOB_SEEDS = [
    json.dumps(job).encode()
    for job in (
        {"model": "m", "training_file": "f", "seed": 1, "suffix": "s", "metadata": {"a": "b"}},
        {"model": "m", "training_file": "f", "resources": {"trainers": 2, "zero_stage": 3, "gpus_per_worker": 1}},
        {"model": "m", "training_file": "f", "method": {"type": "weighted", "weighted": {
            "likelihood": {"scheme": "ratio_power", "gamma": {"ess": {"floor": 0.3, "max": 1.0}}},
            "reward": {"scheme": "exponential", "beta": 0.5, "scope": "group"}, "guards": {"cap": 10.0}}}},
        {"model": "m", "training_file": "f", "method": {"type": "online", "online": {"preset": "grpo", "grader": {
            "type": "string_check", "input": "{{ sample.output_text }}", "reference": "{{ item.a }}",
            "operation": "eq"}, "rollout": {"samples_per_prompt": 8}}}},
        {"model": "m", "training_file": "f", "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}},
    )
]  # fmt: skip


def test_the_body_parser() -> None:
    def check(body: bytes) -> None:
        with suppress(RequestError):
            value = parse_json(body)
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)  # strict, and fit to be sent
            assert json.loads(text.encode("utf-8")) == value
            assert all(-(2**63) < number < 2**63 for number in numbers(value))

    assert fuzz("body", JOB_SEEDS + ROW_SEEDS, check, 3000, 60_000) >= 3000


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for item in value.values() for n in numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    if isinstance(value, float):
        assert math.isfinite(value)
        return []
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def test_a_job_is_valid_or_refused_with_its_path() -> None:
    """What the parser lets through; schemas refuse the rest."""

    def check(body: bytes) -> None:
        try:
            value = parse_json(body)
        except RequestError:
            return
        with suppress(ConfigError):
            config = parse_config(value)
            again = json.loads(
                json.dumps(config.model_dump(mode="json", exclude_unset=True), allow_nan=False)
            )
            assert parse_config(again) == config

    assert fuzz("job", JOB_SEEDS, check, 500, 10_000) >= 500


@pytest.mark.parametrize("role", ["training", "replay", "validation", "retention", "prompts"])
def test_the_data_reader(tmp_path: Path, role: Any) -> None:
    path = tmp_path / "rows.jsonl"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        problems = Problems("rows.jsonl")
        with suppress(DataError):
            rows = read_prompts(path, problems) if role == "prompts" else read_rows(path, problems, role)
            for row in rows:
                repr(row).encode("utf-8", "strict")
        json.dumps([str(e.message) for e in problems.examples]).encode()
        for _, record in read_records(path):
            assert isinstance(record, dict | DataError)
            if isinstance(record, dict):
                json.dumps(record, ensure_ascii=False, allow_nan=False).encode("utf-8")

    assert fuzz("rows", ROW_SEEDS, check, 600, 10_000) >= 600


def test_parquet(tmp_path: Path) -> None:
    seeds = []
    tables = [
        pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], "reward": [0.5, None]}),
        pyarrow.table(
            {"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}
        ),
    ]
    for table in tables:
        for codec in ("none", "snappy", "zstd"):
            sink = io.BytesIO()
            pyarrow.parquet.write_table(table, sink, compression=codec)
            seeds.append(sink.getvalue())
    path = tmp_path / "rows.parquet"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        problems = Problems("rows.parquet")
        with suppress(DataError):
            for _row in read_rows(path, problems):
                pass

    assert fuzz("parquet", seeds, check, 300, 5_000) >= 300


def test_what_a_models_files_say(tmp_path: Path) -> None:
    config = {"architectures": ["A"], "vocab_size": 4, "num_hidden_layers": 1, "hidden_size": 5}
    config_seed = json.dumps(
        {**config, "max_position_embeddings": 64, "text_config": {"num_experts": 4}}
    ).encode()
    header = json.dumps({"w": {"dtype": "F32", "shape": [4, 5], "data_offsets": [0, 80]}}).encode()
    weights_seed = len(header).to_bytes(8, "little") + header + bytes(80)
    (tmp_path / "tokenizer.json").write_text("{}")

    def check(content: bytes) -> None:
        is_config = content[:1] in b'{"['
        (tmp_path / "config.json").write_bytes(content if is_config else config_seed)
        (tmp_path / "model.safetensors").write_bytes(weights_seed if is_config else content)
        with suppress(ModelError):
            json.dumps(str(ModelInfo.read(tmp_path)))

    assert fuzz("model", [config_seed, weights_seed], check, 1000, 20_000) >= 1000


def test_formulas_and_templates() -> None:
    seeds = [
        b"(a + 1) / 2 - b ** 2", b"min(a, b, 1) + max(a, exp(b)) * 0.5", b"-a ^ 2 ^ b % 3",
        b"{{ sample.output_text }} and {{ item.reference[0].x }}", b"{{item['a b']}} {{ sample.output_json.a }}",
    ]  # fmt: skip

    def check(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        with suppress(FormulaError):
            parse_formula(text, ("a", "b"))
        with suppress(TemplateError):
            parse_template(text)

    assert fuzz("expressions", seeds, check, 1000, 20_000) >= 1000

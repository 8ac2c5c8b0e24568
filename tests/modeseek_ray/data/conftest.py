"""A model directory, its tokenizer, and a way to write data files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modeseek_ray.data.tokenizer import ChatTokenizer
from tests.modeseek_ray.data.chat_models import CHATML, without_generation_blocks, write_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 positions, ChatML, byte-level BPE with some merges."""
    return write_model(tmp_path_factory.mktemp("model"), without_generation_blocks(CHATML))


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Write records (or raw lines) to a file, one per line."""

    def write(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
        return path

    return write


@pytest.fixture(scope="session")
def model_tokenizer(model_dir: Path) -> ChatTokenizer:
    return ChatTokenizer(model_dir)

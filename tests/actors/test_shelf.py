"""Tensors in a file come back as they were, and in memory where the file has no room."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import torch

from actors.shelf import Shelf

TENSORS = {
    "weights": torch.randn(1000),
    "half": torch.randn(7).bfloat16(),
    "none": torch.empty(0),
    "counts": torch.arange(5),
}


def test_they_come_back_bit_for_bit_in_any_order() -> None:
    shelf = Shelf()
    for name, tensor in TENSORS.items():
        shelf.put(name, tensor)
    for name in reversed(TENSORS):
        found = shelf.get(name)
        assert found.dtype == TENSORS[name].dtype and torch.equal(found, TENSORS[name])
    with pytest.raises(KeyError):
        shelf.get("another")


def test_later_changes_of_the_tensor_do_not_reach_it() -> None:
    shelf, tensor = Shelf(), torch.ones(3)
    shelf.put("a", tensor)
    tensor.zero_()
    assert torch.equal(shelf.get("a"), torch.ones(3))


def test_what_has_no_room_stays_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    shelf.put("before", torch.zeros(4))
    file: Any = shelf._file

    class Full:
        def write(self, data: Any) -> None:
            file.write(bytes(data)[:5])  # a part of it may have got there
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

    tensor = torch.ones(3)
    monkeypatch.setattr(shelf, "_file", Full())
    shelf.put("a", tensor)
    monkeypatch.setattr(shelf, "_file", file)
    shelf.put("after", torch.full((2,), 2.0))
    tensor.zero_()
    assert "no room" in caplog.text
    assert shelf.get("before").tolist() == [0] * 4
    assert shelf.get("a").tolist() == [1] * 3
    assert shelf.get("after").tolist() == [2, 2]

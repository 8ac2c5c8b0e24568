"""Tensors in a file come back as they were, and in memory where the file has no room."""

from __future__ import annotations

import resource
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

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


def kept(shelf: Shelf) -> dict[str, Tensor]:
    """Put there, changed where they came from, and read again."""
    for name, tensor in TENSORS.items():
        own = tensor.clone()
        shelf.put(name, own)
        own.zero_()
    return {name: shelf.get(name) for name in TENSORS}


def are_all_there(found: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_what_a_full_disk_refuses_stays_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every write to /dev/full is refused for want of space."""
    full = Path("/dev/full").open("r+b", buffering=0)  # noqa: SIM115 (the shelf's)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda buffering: full)
    assert are_all_there(kept(Shelf()))
    assert caplog.text.count("no room for it") == 3  # nothing is written of an empty one


def test_a_disk_that_fills_up_half_way_through_a_tensor(caplog: pytest.LogCaptureFixture) -> None:
    """The limit of a file's size, 2,000 bytes into the first of 4,000."""
    shelf = Shelf()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        found = kept(shelf)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert are_all_there(found)
    assert [r.args[0] for r in caplog.records] == ["weights"]  # type: ignore[index]


def test_a_tenth_of_the_disk_is_left_to_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """4,000 bytes more would leave less than a tenth free; 14 and 40 do not."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=100_000, free=13_999))
    assert are_all_there(kept(Shelf()))
    assert [r.args[0] for r in caplog.records] == ["weights"]  # type: ignore[index]

"""Samples dealt over ranks."""

from __future__ import annotations

import numpy as np
import pytest

from actors.dealing import deal_parts
from modeseek_ray.data.batching import deal


def test_parts_are_balanced_each_and_together() -> None:
    length_N = np.random.default_rng(0).integers(1, 100, 64)
    parts = np.array_split(np.random.default_rng(1).permutation(64), 8)
    shares = deal_parts(length_N, 4, parts, deal)
    assert sorted(np.concatenate(shares).tolist()) == list(range(64))
    totals = [length_N[share].sum() for share in shares]
    assert max(totals) < 1.05 * np.mean(totals)
    for part in parts:
        loads = [length_N[np.intersect1d(share, part)].sum() for share in shares]
        best = max(length_N[part].max(), length_N[part].sum() / 4)
        assert max(loads) <= 4 / 3 * best + 1
    whole = deal_parts(length_N, 4, [np.arange(64)], deal)
    assert [share.tolist() for share in whole] == [share.tolist() for share in deal(length_N, 4)]
    with pytest.raises(ValueError, match="the parts hold 60 samples, the batch 64"):
        deal_parts(length_N, 4, [np.arange(60)], deal)

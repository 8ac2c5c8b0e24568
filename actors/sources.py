"""Where groups come from: rows of a data set, in the cursor's order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from modeseek_ray.data.cursor import Cursor
from modeseek_ray.data.dataset import Dataset
from modeseek_ray.types import Group, Sample, Weights

Put = Callable[[list[Sample]], Any]


class DatasetSource:
    """Global batches of an offline data set.

    Each batch's samples become one block, put where workers can fetch it by reference; what the
    driver keeps are the small columns.
    """

    def __init__(self, dataset: Dataset, cursor: Cursor, put: Put) -> None:
        self._dataset = dataset
        self._cursor = cursor
        self._put = put

    async def __aiter__(self) -> AsyncIterator[list[Group]]:
        for index_N in self._cursor:
            block = self._put([self._dataset.samples[i] for i in index_N])
            yield self._dataset.groups(index_N, block)

    def state(self) -> Mapping[str, Any]:
        return self._cursor.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._cursor.restore(state)

    def observe(self, groups: Sequence[Group], weights: Weights) -> None:
        """The order of rows does not depend on what they count."""

    def figures(self) -> Mapping[str, float]:
        return {}


def probe_groups(samples: Sequence[Sample], put: Put) -> list[Group]:
    """A whole evaluation file as groups over one block, put once for the job's life."""
    dataset = Dataset(list(samples))
    return dataset.groups(dataset.all_indices(), put(dataset.samples))

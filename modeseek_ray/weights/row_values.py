"""One number for every row met so far, by row number: what the controller remembers of single rows.

A job may meet millions of rows and weighs a few at a time, so a step costs what its batch does: the
numbers lie in one array that grows geometrically, and `put` writes into it.

    R  row numbers up to the largest met (and room for more)     M  rows asked for or put
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from modeseek_ray.errors import NumericsError, StorageError
from modeseek_ray.types import FloatArray, IntArray

LARGEST_ROW = 2**26  # beyond, an array by row number is the wrong thing to keep
_ENCODED = "float64"  # the one key of the JSON form: base64 of little-endian doubles, NaN = never met


class RowValues(dict[str, Any]):
    """Numbers by row, NaN where there is none. To its holder it never changes: `put` gives the next one.

    The newest holds the array; one that was put upon remembers what it had there, and makes an array
    of its own if it is asked again (Baker 1991). So `weigh` stays pure and nothing is copied.

    A `dict` only so that `json` writes it, in its one item, which is made when asked for.

    >>> first = RowValues().put(np.array([0, 3]), np.array([0.5, 2.0]))
    >>> second = first.put(np.array([3]), np.array([4.0]))
    >>> first.at(np.array([3, 1])).tolist(), second.at(np.array([3])).tolist()
    ([2.0, nan], [4.0])
    """

    def __init__(self, values_R: FloatArray | None = None) -> None:
        super().__init__({_ENCODED: None})  # json leaves out the items of an empty dict
        self._values_R: FloatArray | None = np.zeros(0) if values_R is None else values_R
        self._later: RowValues | None = None
        self._undo: tuple[IntArray, FloatArray] = (np.zeros(0, np.int64), np.zeros(0))

    @classmethod
    def of(cls, state: Any) -> RowValues:
        """From controller state: itself, its JSON form, the older one (`{"7": 1.5}`), or None for no rows."""
        if isinstance(state, RowValues):
            return state
        if not state:
            return cls()
        if _ENCODED in state:
            try:
                return cls(np.frombuffer(base64.b64decode(state[_ENCODED]), "<f8").astype(np.float64))
            except (TypeError, ValueError) as error:
                raise StorageError(
                    f"the controller's numbers by row cannot be read: {error}.",
                    mend="Go on from an older checkpoint.",
                ) from error
        rows = np.array([int(row) for row in state], np.int64)
        return cls().put(rows, np.array(list(state.values()), np.float64))

    @staticmethod
    def can_number(row_M: IntArray) -> bool:
        return len(row_M) == 0 or bool(row_M.min() >= 0 and row_M.max() < LARGEST_ROW)

    def at(self, row_M: IntArray) -> FloatArray:
        """Each row's number."""
        values_R = self._array()
        found_M = np.full(len(row_M), np.nan)
        inside_M = (row_M >= 0) & (row_M < len(values_R))
        found_M[inside_M] = values_R[row_M[inside_M]]
        return found_M

    def put(self, row_M: IntArray, value_M: FloatArray) -> RowValues:
        """The same with these rows' numbers; of a row that is there twice, the last one."""
        if not self.can_number(row_M):
            raise NumericsError(
                f"row {row_M.max() if row_M.min() >= 0 else row_M.min()} is no number to remember a row by.",
                mend=f"Number rows from 0, below {LARGEST_ROW:,}.",
            )
        values_R = self._array()
        if len(row_M) and row_M.max() >= len(values_R):
            room = np.full(max(2 * len(values_R), int(row_M.max()) + 1) - len(values_R), np.nan)
            values_R = np.concatenate([values_R, room])
        before_M = values_R[row_M]
        values_R[row_M] = value_M
        later = RowValues(values_R)
        self._values_R, self._later, self._undo = None, later, (row_M, before_M)
        return later

    @property
    def known(self) -> FloatArray:
        """The numbers of all rows that have one, by row number."""
        values_R = self._array()
        return values_R[~np.isnan(values_R)]

    @property
    def values_R(self) -> FloatArray:
        """A copy, up to the last row that has a number."""
        values_R = self._array()
        met = np.flatnonzero(~np.isnan(values_R))
        return values_R[: met[-1] + 1 if len(met) else 0].copy()

    def _array(self) -> FloatArray:
        if self._values_R is None:
            behind: list[RowValues] = [self]
            while (later := behind[-1]._later) is not None and later._values_R is None:
                behind.append(later)
            newest = behind[-1]._later
            assert newest is not None and newest._values_R is not None
            values_R = newest._values_R.copy()
            for one in reversed(behind):
                values_R[one._undo[0]] = one._undo[1]
            self._values_R, self._later = values_R, None
        return self._values_R

    def items(self) -> Any:
        return {_ENCODED: base64.b64encode(self.values_R.astype("<f8").tobytes()).decode()}.items()

    def __iter__(self) -> Iterator[str]:
        return iter((_ENCODED,))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        mine_R, theirs_R = self.values_R, RowValues.of(other).values_R
        return np.array_equal(mine_R, theirs_R, equal_nan=True)

    def __ne__(self, other: object) -> bool:  # a dict's own compares the items it holds
        return not self == other

    __hash__ = None  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> RowValues:
        return RowValues(self.values_R)

    def __reduce__(self) -> tuple[Any, ...]:
        return RowValues, (self.values_R,)

"""Block tables of the requests that run, in one array: a row each, to which a step adds only what is new."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockTables:
    """Rows of block numbers. A table only grows while its request runs, so what was written of it stays as it is."""

    def __init__(self) -> None:
        self._rows = np.zeros((8, 16), dtype=np.int64)  # 0, the null block, behind the end of each table
        self._lengths = [0] * len(self._rows)  # of each table, as far as it is written

    def of(self, rows: Sequence[int], tables: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """Tables as they are now, [len(rows), longest], padded with 0. rows: whose each is."""
        if max(rows) >= len(self._lengths):
            self._grow(max(rows) + 1, 0)
        lengths = self._lengths
        for row, table in zip(rows, tables, strict=True):
            if len(table) != lengths[row]:
                self._extend(row, table)
        longest = max(map(lengths.__getitem__, rows))
        gathered: NDArray[np.int64] = self._rows[list(rows), :longest]
        return gathered

    def clear(self, row: int) -> None:
        """The row's request is not running any more."""
        if row < len(self._lengths):
            self._rows[row] = 0
            self._lengths[row] = 0

    def _extend(self, row: int, table: Sequence[int]) -> None:
        if len(table) > self._rows.shape[1]:
            self._grow(0, len(table))
        known = self._lengths[row]
        self._rows[row, known : len(table)] = table[known:]
        self._lengths[row] = len(table)

    def _grow(self, rows: int, width: int) -> None:
        old = self._rows
        self._rows = np.zeros(
            [max(size, 2 * need) for size, need in zip(old.shape, (rows, width), strict=True)], np.int64
        )
        self._rows[: old.shape[0], : old.shape[1]] = old
        self._lengths += [0] * (len(self._rows) - len(old))

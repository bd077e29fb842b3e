"""Where every sequence of a step keeps its past: built once per step, read by every layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AttentionPlan:
    """The sequences of one step, decodes first. Host arrays: a backend moves what it needs to its device.

    query_start_loc: [num_seqs + 1]: the new tokens of sequence i are rows query_start_loc[i] to query_start_loc[i + 1].
    seq_lens: [num_seqs]: tokens of sequence i once this step's are stored: the past and the new ones.
    block_tables: [num_seqs, max_blocks], padded with 0, the null block.
    slot_mapping: [num_tokens]: the slot that each new token's key and value go to.
    num_decodes: so many leading sequences have exactly one new token.
    """

    block_size: int
    query_start_loc: NDArray[np.int64]
    seq_lens: NDArray[np.int64]
    block_tables: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    num_decodes: int

    @classmethod
    def build(
        cls, block_size: int, starts: Sequence[int], counts: Sequence[int], tables: Sequence[Sequence[int]]
    ) -> "AttentionPlan":
        """For each sequence: its tokens that are cached already, its new tokens, and its block table."""
        block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table
        return cls.of(block_size, starts, counts, block_tables)

    @classmethod
    def of(
        cls, block_size: int, starts: Sequence[int], counts: Sequence[int], block_tables: NDArray[np.int64]
    ) -> "AttentionPlan":
        """The same of tables that are laid out already, [num_seqs, max_blocks], padded with 0."""
        num_new = np.asarray(counts, dtype=np.int64)
        query_start_loc = np.concatenate([[0], num_new.cumsum()])
        positions = token_positions(starts, query_start_loc)
        sequence = np.repeat(np.arange(len(block_tables)), num_new)
        slots = block_tables[sequence, positions // block_size] * block_size + positions % block_size
        seq_lens = np.asarray(starts, dtype=np.int64) + num_new
        num_decodes = int((num_new > 1).argmax()) if (num_new > 1).any() else len(block_tables)
        return cls(block_size, query_start_loc, seq_lens, block_tables, slots, num_decodes)

    @property
    def num_seqs(self) -> int:
        """Sequences in the step."""
        return len(self.seq_lens)

    def key_positions(
        self, first: int, last: int, num_new: int, window: int | None, num_sinks: int
    ) -> NDArray[np.int64]:
        """What sequences [first, last) look back on: [last - first, num_keys] positions, padded with -1.

        num_new: new tokens of each, at least. window, num_sinks: where they are given, only what some of the new tokens
        see: the last `window + num_new - 1` positions, and before these the first `num_sinks` of the sequence.
        """
        lens = self.seq_lens[first:last, None]
        longest = int(lens.max(initial=0))
        near = longest if window is None else min(longest, window + num_new - 1)
        if near + num_sinks >= longest:
            positions = np.arange(longest)[None]
            return np.where(positions < lens, positions, -1)
        recent = lens - near + np.arange(near)
        sinks = np.broadcast_to(np.arange(num_sinks), (len(lens), num_sinks))
        sinks = np.where(sinks < lens - near, sinks, -1)
        return np.concatenate([sinks, np.where(recent >= 0, recent, -1)], axis=1)

    def slots(self, first: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The slots of `positions` [seqs, num_keys] of the sequences from `first` on; the null slot where negative."""
        tables = self.block_tables[first : first + len(positions)]
        blocks = np.take_along_axis(tables, np.maximum(positions, 0) // self.block_size, axis=1)
        return np.where(positions >= 0, blocks * self.block_size + positions % self.block_size, 0)

    def all_slots(self, first: int, last: int) -> NDArray[np.int64]:
        """The slots of everything that sequences [first, last) hold: [last - first, longest]."""
        return self.slots(first, self.key_positions(first, last, 0, None, 0))


def token_positions(starts: Sequence[int], query_start_loc: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position of every new token, [num_tokens]: each sequence counts on from its start."""
    offsets = np.asarray(starts, dtype=np.int64) - query_start_loc[:-1]
    return np.repeat(offsets, np.diff(query_start_loc)) + np.arange(query_start_loc[-1])

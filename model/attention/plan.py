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
        num_new = np.asarray(counts, dtype=np.int64)
        block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int64)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table
        query_start_loc = np.concatenate([[0], num_new.cumsum()])
        positions = token_positions(starts, query_start_loc)
        sequence = np.repeat(np.arange(len(tables)), num_new)
        slots = block_tables[sequence, positions // block_size] * block_size + positions % block_size
        seq_lens = np.asarray(starts, dtype=np.int64) + num_new
        num_decodes = int((num_new > 1).argmax()) if (num_new > 1).any() else len(tables)
        return cls(block_size, query_start_loc, seq_lens, block_tables, slots, num_decodes)

    @property
    def num_seqs(self) -> int:
        """Sequences in the step."""
        return len(self.seq_lens)

    def slots(self, first: int, last: int) -> NDArray[np.int64]:
        """The slots of sequences [first, last): [last - first, longest], padded with slots of the null block."""
        lens = self.seq_lens[first:last]
        positions = np.arange(lens.max(initial=0))
        slots = self.block_tables[first:last, positions // self.block_size] * self.block_size
        slots += positions % self.block_size
        return np.where(positions < lens[:, None], slots, 0)


def token_positions(starts: Sequence[int], query_start_loc: NDArray[np.int64]) -> NDArray[np.int64]:
    """The position of every new token, [num_tokens]: each sequence counts on from its start."""
    offsets = np.asarray(starts, dtype=np.int64) - query_start_loc[:-1]
    return np.repeat(offsets, np.diff(query_start_loc)) + np.arange(query_start_loc[-1])

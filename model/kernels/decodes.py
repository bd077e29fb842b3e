"""The first kernel of a graph: of three numbers a sequence it makes all that the others read of a decode step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_SLOT = -1  # the key and value of a padding row are stored nowhere
ROWS = 128  # that a program takes


@triton.jit(do_not_specialize=["num_rows"])
def _place_decodes(
    numbers_ptr, drawn_ptr, tables_ptr, token_ids_ptr, positions_ptr, slots_ptr, lens_ptr,
    num_rows, stride, table_stride, BLOCK_SIZE: tl.constexpr, NO_SLOT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < num_rows
    number = tl.load(numbers_ptr + row, mask=there, other=0)
    position = tl.load(numbers_ptr + stride + row, mask=there, other=-1).to(tl.int64)
    block = tl.load(numbers_ptr + 2 * stride + row, mask=there, other=0)
    decodes = position >= 0
    is_unread = decodes & (number < 0)
    drawn = tl.load(drawn_ptr + (-1 - number), mask=is_unread, other=0)
    token_id = tl.where(is_unread, drawn, number.to(tl.int64))
    tl.store(tables_ptr + row.to(tl.int64) * table_stride + position // BLOCK_SIZE, block, mask=decodes)
    slot = block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE
    tl.store(token_ids_ptr + row, tl.where(decodes, token_id, 0), mask=there)
    tl.store(positions_ptr + row, tl.where(decodes, position, 0), mask=there)
    tl.store(slots_ptr + row, tl.where(decodes, slot, NO_SLOT), mask=there)
    tl.store(lens_ptr + row, tl.where(decodes, position + 1, 0).to(tl.int32), mask=there)


def place_decodes(
    numbers: Tensor,
    drawn: Tensor,
    tables: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    lens: Tensor,
    *,
    block_size: int,
) -> None:
    """Fill `token_ids`, `positions`, `slots` and `lens`, and write the block that each token goes to into its table.

    numbers: [3, any] int32, of which the first rows count: the token, or -1 - i where it is `drawn[i]`; its position,
    negative in a row that only pads the batch; its block. drawn: int64; tables: [rows, max_blocks] int32; the others
    [rows], lens in int32, the rest in int64.
    """
    rows = len(token_ids)
    _place_decodes[(triton.cdiv(rows, ROWS),)](
        numbers, drawn, tables, token_ids, positions, slots, lens, rows, numbers.stride(0), tables.stride(0),
        BLOCK_SIZE=block_size, NO_SLOT=NO_SLOT, ROWS=ROWS, num_warps=4,
    )  # fmt: skip


def place_decodes_torch(
    numbers: Tensor,
    drawn: Tensor,
    tables: Tensor,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor,
    lens: Tensor,
    *,
    block_size: int,
) -> None:
    """The twin of `place_decodes` in plain torch."""
    number, position, block = numbers[:, : len(token_ids)].long()
    decodes = position >= 0
    token = torch.where(number < 0, drawn[(-1 - number).clamp(min=0)], number)
    row = decodes.nonzero()[:, 0]
    tables[row, position[row] // block_size] = block[row].int()
    token_ids.copy_(torch.where(decodes, token, 0))
    positions.copy_(torch.where(decodes, position, 0))
    slots.copy_(torch.where(decodes, block * block_size + position % block_size, NO_SLOT))
    lens.copy_(torch.where(decodes, position + 1, 0))

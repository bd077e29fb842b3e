"""The memory of attention in the layout that the native CPU step reads; see `model/kernels/cpu/attention.h`."""

import math

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig

GROUP = 16  # keys side by side
ALIGNMENT = 64  # bytes of a cache line


class PackedPool:
    """Keys and values of every layer in bf16, in pairs of what one instruction multiplies and sums.

    A block is padded to whole groups of 16 slots, a head to a multiple of 16 numbers. Block 0 is the null block, as in
    `KVPool`; nothing is ever stored in it.

    keys: [num_layers, num_blocks + 1, num_kv_heads, groups, padded_dim / 2, 16, 2].
    values: [num_layers, num_blocks + 1, num_kv_heads, groups, 8, padded_dim, 2].
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int) -> None:
        self.block_size, self.num_blocks, self.head_dim = block_size, num_blocks, config.head_dim
        self.groups = -(-block_size // GROUP)
        self.padded_dim = padded(config.head_dim)
        shape = (config.num_layers, num_blocks + 1, config.num_kv_heads, self.groups)
        self.keys = _zeros((*shape, self.padded_dim // 2, GROUP, 2))
        self.values = _zeros((*shape, GROUP // 2, self.padded_dim, 2))

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these slots (block * block_size + offset), each [num_slots, num_kv_heads, head_dim]."""
        block, offset = slots // self.block_size, slots % self.block_size
        group, lane = offset // GROUP, offset % GROUP
        keys = self.keys[layer].movedim(-2, -4)[block, :, lane, group].flatten(2)
        values = self.values[layer].movedim(-1, -2)[block, :, group, lane // 2, lane % 2]
        return keys[..., : self.head_dim], values[..., : self.head_dim]


def padded(head_dim: int) -> int:
    """Numbers that a head takes in the cache."""
    return -(-head_dim // GROUP) * GROUP


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """From the system's own zeros: slots that were never used take no memory."""
    numbers = math.prod(shape)
    memory = np.zeros(2 * numbers + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + 2 * numbers]).view(torch.bfloat16).view(shape)

"""The memory of attention in the layouts that the native CPU step reads: `cache_bf16.h`, `cache_int8.h`."""

import math

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig

GROUP = 16  # tokens side by side
ALIGNMENT = 64  # bytes of a cache line
SIDE = {torch.bfloat16: 2, torch.int8: 4}  # numbers side by side: what one instruction multiplies and sums


class PackedPool:
    """Keys and values of every layer, in groups of 16 tokens for each head: one group is one piece of memory.

    A block is padded to whole groups, a head to a multiple of 16 numbers. Block 0 is the null block, as in `KVPool`;
    nothing is ever stored in it. In int8 each key and each value has a scale, which lies in its group.

    memory: [num_layers, num_blocks + 1, num_kv_heads, groups, group_bytes]; what follows are views of it, in which the
    first four are the same.
    keys: [..., padded_dim / side, 16, side]; values: [..., 16 / side, padded_dim, side], side as in `SIDE`.
    scales: [..., 2, 16] bf16, of keys and of values; None in bf16.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        self.block_size, self.num_blocks, self.head_dim = block_size, num_blocks, config.head_dim
        self.dtype, self.side, self.padded_dim = dtype, SIDE[dtype], padded(config.head_dim)
        self.groups, self.group_bytes = -(-block_size // GROUP), _group_bytes(config, dtype)
        self.memory = _zeros((config.num_layers, num_blocks + 1, config.num_kv_heads, self.groups, self.group_bytes))
        scales, keys, values = self.memory.split(_parts(config, dtype), dim=-1)
        side, dim = self.side, self.padded_dim
        self.keys = keys.view(dtype).unflatten(-1, (dim // side, GROUP, side))
        self.values = values.view(dtype).unflatten(-1, (GROUP // side, dim, side))
        self.scales = scales.view(torch.bfloat16).unflatten(-1, (2, GROUP)) if dtype == torch.int8 else None

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of these slots (block * block_size + offset), each [num_slots, num_kv_heads, head_dim]."""
        block, offset = slots // self.block_size, slots % self.block_size
        group, lane = offset // GROUP, offset % GROUP
        keys = self.keys[layer].movedim(-2, -4)[block, :, lane, group].flatten(2)
        values = self.values[layer].movedim(-1, -2)[block, :, group, lane // self.side, lane % self.side]
        if self.scales is not None:
            scales = self.scales[layer].movedim(-1, -3)[block, :, lane, group].float()  # [num_slots, num_kv_heads, 2]
            keys, values = keys * scales[..., :1], values * scales[..., 1:]
        return keys[..., : self.head_dim], values[..., : self.head_dim]


def padded(head_dim: int) -> int:
    """Numbers that a head takes in the cache."""
    return -(-head_dim // GROUP) * GROUP


def packed_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, padding and scales included."""
    return config.num_layers * config.num_kv_heads * -(-block_size // GROUP) * _group_bytes(config, dtype)


def _parts(config: ModelConfig, dtype: torch.dtype) -> list[int]:
    """Bytes of a group's scales, of its keys and of its values."""
    numbers = GROUP * padded(config.head_dim) * dtype.itemsize
    return [2 * GROUP * torch.bfloat16.itemsize if dtype == torch.int8 else 0, numbers, numbers]


def _group_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    return sum(_parts(config, dtype))


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """Bytes from the system's own zeros: slots that were never used take no memory."""
    size = math.prod(shape)
    memory = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(shape)

"""The memory of attention: the tensors that hold keys and values, and nothing else."""

import math

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig

# A slot of the null block: its key and value are zero for ever.
NULL_SLOT = 0
FP8 = torch.float8_e4m3fn
MAX_FP8 = 448.0  # what lies beyond is stored as this


class KVPool:
    """Keys and values of every layer, in slots. A block is `block_size` slots in a row; a slot holds one token.

    Block 0 is the null block: no request ever owns it and nothing is ever stored in it, so it stays zero. Whatever pads
    a batch points there, and what freed blocks still hold, NaN included, can never reach a result.

    keys, values: [num_layers, num_slots, num_kv_heads, head_dim], block 0 included. In fp8 they are rounded as they are
    stored, without a scale.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (config.num_layers, (num_blocks + 1) * block_size, config.num_kv_heads, config.head_dim)
        self.block_size, self.dtype = block_size, dtype
        self.keys = _zeros(shape, dtype, device)
        self.values = _zeros(shape, dtype, device)

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds: the null block's slots are none."""
        return self.keys.shape[1] - self.block_size

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [num_slots, num_kv_heads, head_dim]."""
        return self.keys[index], self.values[index]

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer's `slots` [n], each [n, num_kv_heads, head_dim]: for who reads one sequence."""
        keys, values = (_bytes_of(x[layer]).index_select(0, slots).view(x.dtype) for x in (self.keys, self.values))
        return keys, values

    def store(self, layer: int, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """Write new tokens into their slots. slot_mapping: [num_tokens]; k, v: [num_tokens, num_kv_heads, head_dim]."""
        for pool, new in ((self.keys, k), (self.values, v)):
            new = new.clamp(-MAX_FP8, MAX_FP8) if pool.dtype == FP8 else new
            _bytes_of(pool[layer]).index_copy_(0, slot_mapping, _bytes_of(new.to(pool.dtype)))


def _bytes_of(x: Tensor) -> Tensor:
    """The same memory, as what torch copies by index: it does not know how to for fp8."""
    return x.view(torch.uint8) if x.dtype == FP8 else x


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU from the system's own, so that slots which were never used take no memory.

    (`torch.zeros` writes them, which made 268 MB of an idle service with the embedded model.)
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize

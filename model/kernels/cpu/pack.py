"""Weights in the order and layout in which the native step reads them: one arena, on huge pages where there are any.

Huge pages took the rate at which two threads read weights from 24-30 GB/s to 36-41.
"""

import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.cpu.library import BF16, INT8, PANEL, Linear

INPUTS = 16  # a row of inputs is padded to a multiple of this
T = TypeVar("T", bound=Tensor | None)


@dataclass
class Matrix:
    """A linear map to be packed. weight: [out, in], int8 with one `scale` per output, or bf16; bias: [out] or None."""

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module) -> "Matrix":
        """The map of a `Linear`, `TiledLinear` or `Int8Linear`."""
        weight, bias = module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        weight, bias = weight.detach(), None if bias is None else bias.detach().float()
        if weight.dtype != torch.int8:
            return cls(weight.to(torch.bfloat16), None, bias)
        assert isinstance(module.scale, Tensor)
        return cls(weight, module.scale, bias)

    def map(self, rearrange: Callable[[Tensor], Tensor]) -> "Matrix":
        """With its outputs rearranged: `rearrange` works on the first dimension."""
        weight, scale, bias = (None if x is None else rearrange(x) for x in (self.weight, self.scale, self.bias))
        assert weight is not None
        return Matrix(weight, scale, bias)

    def padded(self) -> "Matrix":
        """Zeros up to whole panels of outputs."""
        return self.map(lambda x: pad_first(x, PANEL))


def interleave(gate_up: Matrix) -> Matrix:
    """[gate; up] with panels of both taking turns, so that one thread has a gate and its up at hand."""

    def rearrange(x: Tensor) -> Tensor:
        gate, up = (pad_first(half, PANEL).unflatten(0, (-1, PANEL)) for half in x.chunk(2))
        return torch.stack([gate, up], dim=1).flatten(0, 2)

    return gate_up.map(rearrange)


class Arena:
    """Memory for packed weights, and everything else that the structs of the step point to, kept alive with it."""

    def __init__(self, matrices: Iterable[tuple[int, int, torch.dtype]]) -> None:
        """matrices: (outputs, inputs, dtype) of everything that `pack` will be given, outputs in whole panels."""
        size = sum(outputs * up(inputs, INPUTS) * dtype.itemsize for outputs, inputs, dtype in matrices)
        # Private: pages that could be shared are never huge, unless the system was told so.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory = torch.frombuffer(memory, dtype=torch.uint8)
        self._used = 0
        self._kept: list[Tensor] = []

    def pack(self, matrix: Matrix) -> Linear:
        """Copy a map into the arena. Its outputs are padded to whole panels already."""
        weight, kind = matrix.weight, INT8 if matrix.scale is not None else BF16
        inputs = weight.shape[1]
        word = 4 // weight.itemsize  # inputs that are multiplied at once
        if inputs % INPUTS:
            weight = F.pad(weight, (0, -inputs % INPUTS))
        panels = weight.unflatten(1, (-1, word)).unflatten(0, (-1, PANEL)).transpose(1, 2)
        place = self._memory[self._used : self._used + panels.numel() * panels.itemsize]
        self._used += len(place)
        place.view(panels.dtype).view(panels.shape).copy_(panels)
        correction = None if matrix.scale is None else 128 * _row_sums(weight)
        return Linear(
            weight=place.data_ptr(),
            scale=self.keep(matrix.scale),
            bias=self.keep(matrix.bias),
            correction=self.keep(correction),
            inputs=inputs,
            stride=up(inputs, INPUTS) * weight.itemsize,
            panels=len(panels),
            dtype=kind,
        )

    def keep(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor that lives as long as the arena; nothing for nothing."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()


def release(*modules: nn.Module) -> None:
    """Give up the maps' own copies of their weights: they are packed."""
    for module in modules:
        weight = module.weight
        assert isinstance(weight, Tensor)
        weight.data = torch.empty(0, dtype=weight.dtype)


def _row_sums(weight: Tensor) -> Tensor:
    """The sum of each row, int32. Some rows at a time: torch would first make int32 of the whole."""
    return torch.cat([rows.sum(dim=1, dtype=torch.int32) for rows in weight.split(1024)])


def pad_first(x: Tensor, multiple: int) -> Tensor:
    """Zeros behind the first dimension, up to a multiple."""
    missing = -len(x) % multiple
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def up(count: int, multiple: int) -> int:
    """Rounded up to a multiple."""
    return -(-count // multiple) * multiple

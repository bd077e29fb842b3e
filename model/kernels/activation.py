"""The gated activation of an MLP: act(gate) * up, without writing act(gate) to memory."""

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

Activation = Literal["silu", "gelu", "gelu_tanh"]
BLOCK = 1024


@triton.jit
def _gated(wide_ptr, out_ptr, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < size
    gate = tl.load(wide_ptr + row * 2 * size + column, mask=there, other=0.0).to(tl.float32)
    up = tl.load(wide_ptr + row * 2 * size + size + column, mask=there, other=0.0).to(tl.float32)
    if KIND == "silu":
        gate = gate * tl.sigmoid(gate)
    elif KIND == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:  # the tanh form (Hendrycks and Gimpel 2016), by tanh(x) = 2 sigmoid(2x) - 1
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(out_ptr + row * size + column, (gate * up).to(out_ptr.dtype.element_ty), mask=there)


def gated(wide: Tensor, kind: Activation) -> Tensor:
    """wide: [num_tokens, 2 * intermediate_size], gate and up side by side, contiguous; returns [num_tokens,
    intermediate_size].
    """
    num_tokens, size = wide.shape[0], wide.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=wide.dtype, device=wide.device)
    _gated[(num_tokens, triton.cdiv(size, BLOCK))](wide, out, size, KIND=kind, BLOCK=BLOCK, num_warps=4)
    return out


def gated_torch(wide: Tensor, kind: Activation) -> Tensor:
    """The twin of `gated` in plain torch."""
    gate, up = wide.float().chunk(2, dim=-1)
    act = F.silu(gate) if kind == "silu" else F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none")
    return (act * up).to(wide.dtype)

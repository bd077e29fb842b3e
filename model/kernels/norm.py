"""RMSNorm behind a residual addition, in one pass over the row."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _add_rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, WIDE: tl.constexpr, HAS_X: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    there = column < SIZE
    place = row * SIZE + column
    total = tl.load(residual_ptr + place, mask=there, other=0.0)
    if HAS_X:
        # The stream is rounded as torch rounds it, so that the norm sees what the next addition will see.
        x = tl.load(x_ptr + place, mask=there, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + x).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + place, total, mask=there)
    total = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total) / SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (total * scale * weight).to(out_ptr.dtype.element_ty), mask=there)


def add_rms_norm(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to the residual stream, in place, and return its norm (Zhang and Sennrich 2019).

    x, residual: [num_tokens, hidden_size], contiguous; x None: nothing is added. weight: [hidden_size].
    """
    out = torch.empty_like(residual)
    size = residual.shape[-1]
    _add_rms_norm[(len(residual),)](
        residual if x is None else x, residual, weight, out, eps, SIZE=size, WIDE=triton.next_power_of_2(size),
        HAS_X=x is not None, num_warps=4 if size <= 4096 else 8,
    )  # fmt: skip
    return out


def add_rms_norm_torch(x: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The twin of `add_rms_norm` in plain torch."""
    if x is not None:
        residual += x
    return F.rms_norm(residual.float(), weight.shape, weight.float(), eps).to(residual.dtype)

"""A product of one row: what a single stream decodes with. All there is to it is reading the weights, once.

Libraries give it tiles of eight rows or more. A program of ours sums one or two channels over their whole depth. On an
H200, in a CUDA graph, against cuBLAS: 28,672 x 4,096 weights in bf16 55 us (4.2 TB/s) and 63 us, 1,024 x 2,048 3 us and
13 us; in int8 4,096 x 14,336 24 us, where tiles of tensor cores (`model.kernels.int8`) took 46 us.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = {1: 1024, 2: 4096, 4: 2048}  # weights of a channel that a program takes at a time, by the bytes of one
SHALLOW = 2048  # inputs; with fewer, a program takes two channels


@triton.jit(do_not_specialize=["num_channels"])
def _one_row_linear(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_channels,
    DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIECE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < num_channels
    row_ptr = weight_ptr + channel[:, None].to(tl.int64) * DEPTH
    products = tl.zeros([CHANNELS, PIECE], tl.float32)
    for first in range(0, DEPTH, PIECE):
        k = first + tl.arange(0, PIECE)
        x = tl.load(x_ptr + k, mask=k < DEPTH, other=0.0).to(tl.float32)
        weight = tl.load(row_ptr + k[None, :], mask=is_channel[:, None] & (k < DEPTH)[None, :], other=0)
        products += weight.to(tl.float32) * x[None, :]
    out = tl.sum(products, axis=1)
    if HAS_SCALE:
        out *= tl.load(scale_ptr + channel, mask=is_channel, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(out_ptr + channel, out.to(out_ptr.dtype.element_ty), mask=is_channel)


def one_row_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """x W^T * scale + bias, in x's dtype, summed in fp32.

    x: [1, in_features], contiguous; weight: [out_features, in_features], contiguous, in x's dtype or int8; scale: fp32
    [out_features]; bias: [out_features].
    """
    channels, depth = weight.shape
    size = weight.element_size()
    piece = min(triton.next_power_of_2(depth), PIECE[size])
    together = 1 if depth >= SHALLOW else 2
    out = torch.empty((1, channels), dtype=x.dtype, device=x.device)
    _one_row_linear[(triton.cdiv(channels, together),)](
        x, weight, out if scale is None else scale, out if bias is None else bias, out, channels,
        DEPTH=depth, CHANNELS=together, PIECE=piece, HAS_SCALE=scale is not None, HAS_BIAS=bias is not None,
        num_warps=8 if piece > 2048 else 4,
    )  # fmt: skip
    return out


def one_row_linear_torch(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The twin of `one_row_linear` in plain torch."""
    out = x.float() @ weight.float().t()
    if scale is not None:
        out = out * scale
    return (out if bias is None else out + bias).to(x.dtype)

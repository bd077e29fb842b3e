"""A product with int8 weights: what a decode step spends its time on is reading them, at best once.

Weights are widened on the way to the tensor cores; activations stay as they are, so nothing is lost but what the
weights' one scale an output channel loses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.tiles import padded

MAX_ROWS = 64  # of a tile; tiles of the same channels run side by side, and find the weights in the card's cache
CHANNELS = 64
DEPTH = 128


@triton.jit(do_not_specialize=["num_rows"])
def _int8_linear(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, num_rows, num_channels, depth,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, DEPTH: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    is_row, is_channel = row < num_rows, channel < num_channels
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        is_k = k < depth
        place = row[:, None].to(tl.int64) * depth + k[None, :]
        x = tl.load(x_ptr + place, mask=is_row[:, None] & is_k[None, :], other=0.0)
        place = channel[:, None].to(tl.int64) * depth + k[None, :]
        weight = tl.load(weight_ptr + place, mask=is_channel[:, None] & is_k[None, :], other=0)
        total += tl.dot(x, tl.trans(weight.to(x.dtype)), input_precision="ieee")
    out = total * tl.load(scale_ptr + channel, mask=is_channel, other=0.0)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    place = row[:, None].to(tl.int64) * num_channels + channel[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_channel[None, :])


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T * scale + bias, in x's dtype.

    x: [rows, in_features], contiguous; weight: int8 [out_features, in_features],
    contiguous; scale: fp32 [out_features]; bias: [out_features].
    """
    rows, depth = x.shape
    channels, tile = len(weight), min(padded(rows), MAX_ROWS)
    out = torch.empty((rows, channels), dtype=x.dtype, device=x.device)
    _int8_linear[(triton.cdiv(channels, CHANNELS), triton.cdiv(rows, tile))](
        x, weight, scale, out if bias is None else bias, out, rows, channels, depth,
        ROWS=tile, CHANNELS=CHANNELS, DEPTH=DEPTH, HAS_BIAS=bias is not None, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def int8_linear_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The twin of `int8_linear` in plain torch."""
    out = x.float() @ weight.float().t() * scale
    return (out if bias is None else out + bias).to(x.dtype)

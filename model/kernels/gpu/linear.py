"""Linear maps on a GPU: by cuBLAS, but for one row, and but for int8 weights, whose activations stay as they are."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels.int8 import int8_linear
from model.kernels.one_row import one_row_linear
from model.layers import Int8Linear, Linear

FEW_ROWS = 256  # a decode step; with more, computing takes longer than reading, and weights are widened beforehand


class DenseLinear(nn.Module):
    """A `Linear`, with a kernel of ours for one row. weight: [out_features, in_features]."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features]."""
        if len(x) == 1:
            return one_row_linear(x.contiguous(), self.weight, bias=self.bias)
        return F.linear(x, self.weight, self.bias)


class WeightInt8Linear(nn.Module):
    """An `Int8Linear` by our kernel. weight: int8 [out_features, in_features]; scale: fp32 [out_features]."""

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.contiguous())
        self.register_buffer("scale", linear.scale)
        self.bias = linear.bias
        self.weight: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features], in x's dtype."""
        if len(x) == 1:
            return one_row_linear(x.contiguous(), self.weight, self.scale, self.bias)
        if len(x) <= FEW_ROWS:
            return int8_linear(x.contiguous(), self.weight, self.scale, self.bias)
        out = F.linear(x, self.weight.to(x.dtype))  # whole numbers up to 127: each is one in bf16 too
        out *= self.scale  # in fp32, and no other copy of the result
        return out if self.bias is None else out.add_(self.bias)

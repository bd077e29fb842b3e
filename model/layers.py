"""The parts of a decoder that are not attention: linear maps, the norm, rotary positions, the gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T, without bias. weight: [out_features, in_features]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight)


class TiledLinear(nn.Module):
    """A `Linear` that multiplies `ROWS` rows at a time, zeros where there are fewer.

    The order in which a product's terms are added depends on the shape of the matrices: with one shape for all, a row's
    result does not depend on how many rows there are.
    """

    ROWS = 16

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, in_features] -> [rows, out_features]."""
        padded = F.pad(x, (0, 0, 0, -len(x) % self.ROWS))
        return torch.cat([F.linear(tile, self.weight) for tile in padded.split(self.ROWS)])[: len(x)]


class Int8Linear(nn.Module):
    """A `Linear` in int8: one scale per output channel of the weight, one per token of the activation.

    Scales per token, not per batch, so that a request's result does not depend on its neighbours; the integer sums
    are exact in any order.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127.0
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8).t().contiguous().t())
        self.register_buffer("scale", scale)
        self.weight: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features], in x's dtype."""
        x_scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 127.0
        quantized = (x / x_scale).round().to(torch.int8)
        return (torch._int_mm(quantized, self.weight.t()).float() * x_scale * self.scale).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019). weight: [hidden_size]."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; same shape and dtype out. The mean square is taken in fp32."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021): pair (i, i + head_dim/2) of a head turns by
    position * theta^(-2i/head_dim).
    """

    def __init__(self, head_dim: int, max_positions: int, theta: float) -> None:
        super().__init__()
        inverse_frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequency)
        cos, sin = angles.cos(), angles.sin()
        # The sign of the rotation's second term is folded into the table, so applying it is a roll and two products.
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)
        self.cos: Tensor
        self.sin: Tensor

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions: [num_tokens] -> the cosines and signed sines of those rows, [num_tokens, 1, head_dim]."""
        return self.cos[positions].unsqueeze(1).to(dtype), self.sin[positions].unsqueeze(1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the heads of x by their positions. x: [num_tokens, heads, head_dim]."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020), with gate and up in one product."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden_size, 2 * intermediate_size)
        self.down = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; same shape out."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out

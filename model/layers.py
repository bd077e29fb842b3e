"""The parts of a decoder that are not attention: linear maps, norms, the MLP, the mixture of experts."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


class Linear(nn.Module):
    """y = x W^T + b. weight: [out_features, in_features]; bias: [out_features] or None."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight, self.bias)


TILE_ROWS = 16
VECTOR_PAIR = 32  # numbers that torch's elementwise functions take at a time, at most


def in_row_tiles(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of rows to `TILE_ROWS` of them at a time, zeros where there are fewer. x: [rows, features].

    The order in which a product's terms are added depends on the shape of the matrices: with one shape for all, a row's
    result does not depend on how many rows there are.
    """
    padded = F.pad(x, (0, 0, 0, -len(x) % TILE_ROWS))
    return torch.cat([function(tile) for tile in padded.split(TILE_ROWS)])[: len(x)]


def in_whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply an elementwise function to rows padded to whole vectors. x: [rows, features].

    torch computes what is left behind the last pair of vectors in another way, with other last bits; behind rows of odd
    length it would depend on the number of rows what that is.
    """
    width = x.shape[-1]
    return function(F.pad(x, (0, -width % VECTOR_PAIR)))[:, :width]


class TiledLinear(nn.Module):
    """A `Linear` that multiplies its rows in tiles of one shape."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x: [rows, in_features] -> [rows, out_features]."""
        return in_row_tiles(lambda tile: F.linear(tile, self.weight, self.bias), x)


class Int8Linear(nn.Module):
    """A `Linear` in int8: one scale per output channel of the weight, one per token of the activation.

    Scales per token, not per batch, so that a request's result does not depend on its neighbours; the integer sums
    are exact in any order.
    """

    PIECE = 2**17  # weights quantized at a time: the head of a large vocabulary would take twice its memory again

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        dense, device = linear.weight.detach(), linear.weight.device
        # Input by input, as the product wants it; a transposed view would hold on to what it is a view of.
        weight = torch.empty_strided(dense.shape, (1, len(dense)), dtype=torch.int8, device=device)
        scale = torch.empty(len(dense), device=device)
        pieces = (x.split(max(1, self.PIECE // dense.shape[1])) for x in (dense, weight, scale))
        for rows, quantized, scales in zip(*pieces, strict=True):
            low, high = rows.aminmax(dim=1)
            scales.copy_(torch.maximum(-low, high).float().clamp(min=1e-12) / 127.0)
            quantized.copy_((rows.float() / scales[:, None]).round_().to(torch.int8))
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.weight: Tensor
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] -> [num_tokens, out_features], in x's dtype."""
        x_scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / 127.0
        quantized = (x / x_scale).round().to(torch.int8)
        product = torch._int_mm(quantized, self.weight.t()).float() * x_scale * self.scale
        return (product if self.bias is None else product + self.bias).to(x.dtype)


def replace_linears(root: nn.Module, replacement: Callable[[Any], nn.Module], kind: type[nn.Module] = Linear) -> None:
    """Replace every module of a kind under `root`. Each is gone before the next one is looked at."""
    for name, child in root.named_children():
        if isinstance(child, kind):
            setattr(root, name, replacement(child))
        else:
            replace_linears(child, replacement, kind)


class RMSNorm(nn.Module):
    """x / rms(x) * weight (Zhang and Sennrich 2019). weight: [hidden_size]. Gemma's 1 + weight is stored as such."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; same shape and dtype out. The mean square is taken in fp32."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias (Ba et al. 2016). weight, bias: [hidden_size]."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size]; same shape and dtype out."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def norm(config: ModelConfig) -> nn.Module:
    """The norm of a hidden state."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(config.hidden_size, config.norm_eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class MLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020), gate and up in one product; or, not gated, down(act(gate(x)))."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.activation_name = config.activation
        self.activation = ACTIVATIONS[config.activation]
        self.gate_up = Linear(config.hidden_size, (1 + self.gated) * intermediate_size, bias=config.mlp_bias)
        self.down = Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; same shape out."""
        wide = self.gate_up(x)
        if self.gated:
            gate, up = wide.chunk(2, dim=-1)
            wide = self.activation(gate) * up
        else:
            wide = self.activation(wide)
        out: Tensor = self.down(wide)
        return out


class MixtureOfExperts(nn.Module):
    """The weighted sum of the MLPs that a router chooses for each token (Shazeer et al. 2017; Jiang et al. 2024).

    The router stays in the checkpoint's precision: a rounded score would send a token elsewhere.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_chosen, self.normalize = config.num_experts_per_token, config.normalize_expert_weights
        self.router = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.experts = nn.ModuleList(MLP(config, config.expert_intermediate_size) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; same shape out. Each expert computes its own tokens, one after another."""
        odds = F.linear(x, self.router).softmax(dim=-1, dtype=torch.float32)
        weights, chosen = odds.topk(self.num_chosen, dim=-1)  # [num_tokens, num_chosen]
        if self.normalize:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros_like(x)
        for index in chosen.unique().tolist():
            rows, place = (chosen == index).nonzero(as_tuple=True)
            out.index_add_(0, rows, self.experts[index](x[rows]) * weights[rows, place, None].to(x.dtype))
        return out

"""Rotary positions: pairs of a head's dimensions turn by an angle that grows with the position (Su et al. 2021).

Pair (i, i + rotary_dim/2) turns by position * theta^(-2i/rotary_dim). What stretches a trained context changes these
frequencies, once (linear, llama3, yarn, longrope) or with the length of the prompt (dynamic).
"""

import math

import torch
from torch import Tensor, nn

from model.config import RopeConfig


class Rotary(nn.Module):
    """The cosines and sines of one `RopeConfig`, for every position that a model knows."""

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int) -> None:
        super().__init__()
        self.config = config
        self.rotary_dim = config.rotary_dim or head_dim
        with torch.device("cpu"):  # whatever device weights are made on: on `meta` this would import half of torch
            angles = torch.outer(
                torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(config, head_dim)
            )
            self.register_buffer("cos", angles.cos() * config.attention_factor, persistent=False)
            self.register_buffer("sin", angles.sin() * config.attention_factor, persistent=False)
        self.cos: Tensor  # [max_positions, rotary_dim / 2]
        self.sin: Tensor

    def forward(self, positions: Tensor, prompt_lens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of each token, [num_tokens, 1, rotary_dim], for `rotate`.

        positions: [num_tokens]; prompt_lens: [num_tokens], the length of the prompt that each token belongs to, which
        only `dynamic` scaling reads.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        if self.config.scaling == "dynamic":
            cos, sin = self._stretch(positions, prompt_lens, cos, sin)
        # The sign of the rotation's second term is folded in here, so that applying it is a roll and two products.
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        return cos.unsqueeze(1).to(dtype), sin.unsqueeze(1).to(dtype)

    def _stretch(self, positions: Tensor, prompt_lens: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Dynamic NTK scaling: beyond the original length, theta grows with the length that a token was computed at.

        For a prompt's tokens that is the prompt's length, for those generated after it their own, as when a prompt is
        computed whole and then continued token by token. So it depends on the request alone, not on chunks.
        """
        config, dim = self.config, self.rotary_dim
        lens = torch.maximum(prompt_lens, positions + 1)
        far = (lens > config.original_length).nonzero().squeeze(1)
        growth = config.factor * lens[far].float() / config.original_length - (config.factor - 1)
        theta = config.theta * growth ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles = positions[far, None].float() * (1.0 / theta[:, None] ** exponents)
        return cos.index_copy(0, far, angles.cos()), sin.index_copy(0, far, angles.sin())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the heads of x by their positions. x: [num_tokens, heads, head_dim]; cos, sin: see `Rotary.forward`."""
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat([rotate(x[..., :dim], cos, sin), x[..., dim:]], dim=-1)
    return torch.addcmul(x * cos, x.roll(dim // 2, dims=-1), sin)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions, [rotary_dim / 2], in fp32."""
    dim = config.rotary_dim or head_dim
    frequencies = 1.0 / config.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "longrope":
        return frequencies / torch.tensor(config.frequency_divisors)
    if config.scaling == "llama3":
        return _llama3(frequencies, config)
    if config.scaling == "yarn":
        return _yarn(frequencies, config, dim)
    return frequencies


def _llama3(frequencies: Tensor, config: RopeConfig) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones stay, and in between the two are blended."""
    turns = config.original_length * frequencies / (2 * math.pi)  # over the original context
    keep = ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * frequencies / config.factor + keep * frequencies


def _yarn(frequencies: Tensor, config: RopeConfig, dim: int) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): dimensions of few turns are interpolated, those of many are left alone."""

    def dimension_of(turns: float) -> float:
        return dim * math.log(config.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # one dimension may be both borders
    interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / config.factor * interpolated + frequencies * (1 - interpolated)

"""The one decoder: token ids in, hidden states out. Where keys and values live is the attention's business.

Tokens of all sequences stand in one flat row, `[num_tokens]`, each with its position. The same forward pass therefore
trains on whole sequences, prefills a chunk and decodes a batch: only the `Attend` that is handed in differs.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.layers import MLP, Int8Linear, Linear, RMSNorm, Rotary, TiledLinear, rotate


class Attend(Protocol):
    """An attention backend, planned for one step: causal attention of the step's tokens in one layer."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [num_tokens, num_heads, head_dim]; k, v: [num_tokens, num_kv_heads, head_dim]; returns the shape of q."""
        ...


class DecoderLayer(nn.Module):
    """Attention, then MLP, each behind its norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv = Linear(config.hidden_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        self.output = Linear(config.num_heads * config.head_dim, config.hidden_size)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """x: [num_tokens, hidden_size]; rope: the step's cosines and sines; same shape out."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        q, k = rotate(qkv[:, : heads + kv_heads], *rope).split((heads, kv_heads), dim=1)
        attended = attend(self.index, q, k, qkv[:, heads + kv_heads :])
        x = x + self.output(attended.flatten(1))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Decoder(nn.Module):
    """A decoder-only transformer of the Llama shape (Touvron et al. 2023). Weights are undefined until loaded or
    initialized.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.rotary = Rotary(config.head_dim, config.max_position_embeddings, config.rope_theta)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """token_ids, positions: [num_tokens] -> final hidden states, [num_tokens, hidden_size]."""
        x = F.embedding(token_ids, self.embedding)
        rope = self.rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rope, attend)
        hidden: Tensor = self.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size]. Apart from `forward`: only some rows need it."""
        out: Tensor = self.head(hidden)
        return out

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Draw fresh weights: normal with `std`, projections into the residual stream scaled down by depth (GPT-2)."""
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        self.embedding.normal_(0.0, std, generator=generator)
        if self.head.weight is not self.embedding:
            self.head.weight.normal_(0.0, std, generator=generator)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            for linear, scale in (
                (layer.qkv, std),
                (layer.output, residual_std),
                (layer.mlp.gate_up, std),
                (layer.mlp.down, residual_std),
            ):
                linear.weight.normal_(0.0, scale, generator=generator)

    def quantize(self) -> None:
        """Replace the linear maps of the layers and the head by int8 ones, in place. The embedding keeps its dtype."""
        self._replace_linears(Int8Linear)

    def fix_row_tiles(self) -> None:
        """Make every product's result independent of how many rows it is computed with. int8 maps are so already."""
        self._replace_linears(TiledLinear)

    def _replace_linears(self, replacement: Callable[[Linear], nn.Module]) -> None:
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Linear):
                    setattr(module, name, replacement(child))

"""The one decoder: token ids in, hidden states out. Where keys and values live is the attention's business.

Tokens of all sequences stand in one flat row, `[num_tokens]`, each with its position. The same forward pass therefore
trains on whole sequences, prefills a chunk and decodes a batch: only the `Attend` that is handed in differs.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.scores import Attend, Scores
from model.config import ModelConfig
from model.layers import (
    MLP,
    Int8Linear,
    Linear,
    MixtureOfExperts,
    RMSNorm,
    TiledLinear,
    in_row_tiles,
    in_whole_vectors,
    norm,
    replace_linears,
)
from model.rotary import Rotary, rotate

# Each rotary table's cosines and sines for the step's tokens; None stands for no rotary positions at all.
Rope = tuple[Tensor, Tensor] | None


class DecoderLayer(nn.Module):
    """Attention, then MLP, each with its norms and added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        before, after = config.norm_placement in ("pre", "both"), config.norm_placement in ("post", "both")
        self.attention_norm = norm(config) if before else nn.Identity()
        self.qkv = Linear(config.hidden_size, q_size + 2 * kv_size, bias=config.qkv_bias)
        self.q_norm = _qk_norm(config, q_size)
        self.k_norm = _qk_norm(config, kv_size)
        self.scores = Scores(config, index)
        self.output = Linear(q_size, config.hidden_size, bias=config.output_bias)
        self.attention_post_norm = norm(config) if after else nn.Identity()
        self.mlp_norm = norm(config) if before else nn.Identity()
        self.mlp = MixtureOfExperts(config) if config.has_experts(index) else MLP(config, config.intermediate_size)
        self.mlp_post_norm = norm(config) if after else nn.Identity()

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """x: [num_tokens, hidden_size]; rope: the step's cosines and sines; same shape out."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (heads + 2 * kv_heads, self.head_dim))
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((heads, kv_heads), dim=1)
            qk = torch.cat([_normed(self.q_norm, q), _normed(self.k_norm, k)], dim=1)
        if self.scores.query_projection is not None:
            qk = torch.cat(self.scores.project(*qk.split((heads, kv_heads), dim=1)), dim=1)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split((heads, kv_heads), dim=1)
        attended = attend(self.scores, q, k, v)
        x = x + self.attention_post_norm(self.output(attended.flatten(1)))
        out: Tensor = x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))
        return out

    @torch.no_grad()
    def fold_scores(self) -> None:
        """See `Decoder.fold_scores`. A second time it does nothing."""
        if self.scores.query_projection is None and self.scores.key_projection is None:
            return
        q_size, k_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        for rows in (self.qkv.weight, self.qkv.bias):
            if rows is not None:
                q, k, _ = rows.data.split((q_size, k_size, k_size))
                self.scores.fold(q.unflatten(0, (-1, self.head_dim)), k.unflatten(0, (-1, self.head_dim)))
        self.scores.query_projection = self.scores.key_projection = None


class Decoder(nn.Module):
    """A decoder-only transformer (Vaswani et al. 2017; Touvron et al. 2023). Its `ModelConfig` says of which shape.

    Weights are undefined until loaded or initialized.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        size = (config.max_position_embeddings, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.empty(size)) if config.learned_positions else None
        ropes = [config.rope_of(index) for index in range(config.num_layers)]
        distinct = [rope for rope in dict.fromkeys(ropes) if rope is not None]
        self.rotaries = nn.ModuleList(Rotary(r, config.head_dim, config.max_position_embeddings) for r in distinct)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_layers))
        # For each layer which of the rotaries turns its heads; the last place stands for none.
        self.rotary_of = [len(distinct) if rope is None else distinct.index(rope) for rope in ropes]
        self.norm = norm(config)
        self.head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, prompt_lens: Tensor | None = None
    ) -> Tensor:
        """token_ids, positions: [num_tokens] -> final hidden states, [num_tokens, hidden_size].

        prompt_lens: [num_tokens], how long the prompt is that each token belongs to (see `Rotary.forward`); left out,
        each token is taken for generated.
        """
        x = self.embed(token_ids, positions)
        ropes = self.ropes(positions, positions + 1 if prompt_lens is None else prompt_lens, x.dtype)
        for layer, rotary in zip(self.layers, self.rotary_of, strict=True):
            x = layer(x, ropes[rotary], attend)
        hidden: Tensor = self.norm(x)
        return hidden

    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """What enters the first layer, [num_tokens, hidden_size]."""
        x = F.embedding(token_ids, self.embedding)
        if self.config.embedding_scale != 1.0:
            x = x * torch.tensor(self.config.embedding_scale, dtype=x.dtype)
        if self.position_embedding is not None:
            x = x + F.embedding(positions, self.position_embedding)
        return x

    def ropes(self, positions: Tensor, prompt_lens: Tensor, dtype: torch.dtype) -> list[Rope]:
        """The step's cosines and sines by each of the rotaries, and None for the layers that have none."""
        return [*(rotary(positions, prompt_lens, dtype) for rotary in self.rotaries), None]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size]. Apart from `forward`: only some rows need it."""
        out: Tensor = self.head(hidden)
        cap = self.config.logit_soft_cap
        return out if cap is None else cap * torch.tanh(out / cap)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Draw fresh weights: normal with `std`, projections into the residual stream scaled down by depth (GPT-2).
        Biases start at 0.
        """
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        self.embedding.normal_(0.0, std, generator=generator)
        if self.position_embedding is not None:
            self.position_embedding.normal_(0.0, std, generator=generator)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                into_residual = name.endswith((".output", ".down"))
                if module.weight is not self.embedding:
                    module.weight.normal_(0.0, residual_std if into_residual else std, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, MixtureOfExperts):
                module.router.normal_(0.0, std, generator=generator)
            elif isinstance(module, Scores):
                module.init_weights(generator)

    @torch.no_grad()
    def fold_scores(self) -> None:
        """Multiply the score functions' projections into those of queries and keys, in place: nothing else changes.

        For serving: a multiplicative score then is a dot product, and an additive one has only its tanh left.
        """
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.fold_scores()

    def quantize(self) -> None:
        """Replace the linear maps of the layers and the head by int8 ones, in place. The embedding keeps its dtype."""
        replace_linears(self, Int8Linear)

    def fix_row_tiles(self) -> None:
        """Make a row's result independent of how many rows it is computed with, in products and activations."""
        replace_linears(self, TiledLinear)
        for module in self.modules():
            if isinstance(module, MLP):
                module.activation = partial(in_row_tiles, partial(in_whole_vectors, module.activation))


def _qk_norm(config: ModelConfig, projection_size: int) -> RMSNorm | None:
    """The norm of queries or keys: of each head or of the whole projection."""
    if config.qk_norm == "none":
        return None
    return RMSNorm(config.head_dim if config.qk_norm == "head" else projection_size, config.norm_eps)


def _normed(rms: RMSNorm, heads: Tensor) -> Tensor:
    """heads: [num_tokens, num_heads, head_dim]; the norm is as wide as a head, or as all of them."""
    wide = rms.weight.shape[0] != heads.shape[-1]
    out: Tensor = rms(heads.flatten(1)).view(heads.shape) if wide else rms(heads)
    return out

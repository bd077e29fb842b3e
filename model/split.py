"""A decoder split over several processes, each with a part of every layer's heads and of its MLP (Shoeybi et al. 2019).

Products whose outputs are split need no word from the others; those whose inputs are split give partial sums, which are
added up over all. So a layer talks twice, behind attention and behind the MLP, and the head once, to bring the parts of
the vocabulary together. Norms, the residual stream and the embedding are whole everywhere (of a tied head each process
multiplies with its own rows). Every process ends up with the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.decoder import Decoder, DecoderLayer
from model.errors import ConfigError
from model.layers import MLP, Linear, MixtureOfExperts, RMSNorm


class Together(Protocol):
    """The processes that hold a decoder together. rank: this one, from 0 to `world_size` - 1."""

    rank: int
    world_size: int

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over all processes, in each of them."""
        ...

    def gather(self, x: Tensor) -> list[Tensor]:
        """Everybody's tensor, by rank. All of one shape."""
        ...


class PartialLinear(nn.Module):
    """A `Linear` of which this process has some of the inputs. weight: [out_features, own in_features]."""

    def __init__(self, weight: Tensor, bias: Tensor | None, together: Together) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._together = together

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, own in_features] -> [num_tokens, out_features], whole."""
        out = self._together.add_up(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class SplitHead(nn.Module):
    """The head, of which this process has some rows; the last ones may be padding. weight: [own rows, hidden_size]."""

    def __init__(self, weight: Tensor, vocab_size: int, together: Together) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._vocab_size, self._together = vocab_size, together

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size]."""
        parts = self._together.gather(F.linear(hidden, self.weight))
        return torch.cat(parts, dim=-1)[:, : self._vocab_size]


class SplitRMSNorm(RMSNorm):
    """RMSNorm over the heads of all processes, each of which has the weights of its own."""

    def __init__(self, weight: Tensor, eps: float, full_size: int, together: Together) -> None:
        super().__init__(len(weight), eps)
        self.weight.data = weight
        self._full_size, self._together = full_size, together

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, own size]; same shape and dtype out."""
        wide = x.float()
        square = self._together.add_up(wide.square().sum(dim=-1, keepdim=True)) / self._full_size
        return (wide * torch.rsqrt(square + self.eps) * self.weight.float()).to(x.dtype)


class AddedUp(nn.Module):
    """A module of which each process computes a part of the result."""

    def __init__(self, part: nn.Module, together: Together) -> None:
        super().__init__()
        self.part, self._together = part, together

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, hidden_size]; same shape out."""
        return self._together.add_up(self.part(x))


def own_config(config: ModelConfig, world_size: int) -> ModelConfig:
    """The shape of one process's part. Raises `ConfigError` where a model cannot be split so.

    Of fewer key/value heads than processes each process gets the one that its queries ask.
    """
    sizes = {"num_heads": config.num_heads, "intermediate_size": config.intermediate_size}
    if config.num_experts:
        sizes["expert_intermediate_size"] = config.expert_intermediate_size
    for name, size in sizes.items():
        if size % world_size:
            raise ConfigError(f"{name} ({size}) cannot be split over {world_size} processes: it must be a multiple")
    kv_heads = config.num_kv_heads
    if kv_heads % world_size and world_size % kv_heads:
        raise ConfigError(f"num_kv_heads ({kv_heads}) cannot be split over {world_size} processes: neither divides")
    return replace(
        config,
        num_heads=config.num_heads // world_size,
        num_kv_heads=max(1, kv_heads // world_size),
        intermediate_size=config.intermediate_size // world_size,
        expert_intermediate_size=config.expert_intermediate_size // world_size,
    )


def split_decoder(whole: Decoder, together: Together, device: torch.device | str) -> Decoder:
    """This process's part of a decoder, on `device`. `whole` stays as it is; it may not be quantized."""
    config = whole.config
    own = own_config(config, together.world_size)
    part = Decoder(own).requires_grad_(False).eval()  # memory that nobody has touched yet
    part.rotaries = whole.rotaries.to(device)
    cut = _Cuts(config, own, together, device)
    parameters = dict(whole.named_parameters())
    for name, parameter in part.named_parameters():
        if name not in parameters:
            raise ConfigError("a decoder is split before its scores are folded")
        if not name.startswith("head."):
            parameter.data = cut.of(name, parameters[name].detach())
    for layer in part.layers:
        assert isinstance(layer, DecoderLayer)
        _join(layer, config, together)
    # The embedding is whole, so a tied head's rows are a view of it.
    rows = -(-config.vocab_size // together.world_size)
    head = part.embedding.data if config.tie_word_embeddings else parameters["head.weight"].detach()
    first = min(together.rank * rows, config.vocab_size)
    weight = head[first : first + rows].to(device)
    if len(weight) < rows:
        weight = F.pad(weight, (0, 0, 0, rows - len(weight)))
    part.head = SplitHead(weight, config.vocab_size, together)  # type: ignore[assignment]
    return part


def _join(layer: DecoderLayer, whole: ModelConfig, together: Together) -> None:
    """Put what talks to the others in the place of what does not."""
    layer.output = _partial(layer.output, together)  # type: ignore[assignment]
    if isinstance(layer.mlp, MixtureOfExperts):
        for expert in layer.mlp.experts:
            # Each process adds its own part of the sum over experts: a bias belongs to one of them.
            assert isinstance(expert, MLP)
            if expert.down.bias is not None and together.rank:
                expert.down.bias.data.zero_()
        layer.mlp = AddedUp(layer.mlp, together)  # type: ignore[assignment]
    else:
        assert isinstance(layer.mlp, MLP)
        layer.mlp.down = _partial(layer.mlp.down, together)  # type: ignore[assignment]
    if whole.qk_norm == "projection" and layer.q_norm is not None and layer.k_norm is not None:
        dim = whole.head_dim
        q, k = layer.q_norm, layer.k_norm
        layer.q_norm = SplitRMSNorm(q.weight.data, q.eps, whole.num_heads * dim, together)
        # Where processes share a key/value head, the sum counts it once for each of them.
        copies = max(1, together.world_size // whole.num_kv_heads)
        layer.k_norm = SplitRMSNorm(k.weight.data, k.eps, copies * whole.num_kv_heads * dim, together)


def _partial(linear: Linear, together: Together) -> PartialLinear:
    bias = None if linear.bias is None else linear.bias.data
    return PartialLinear(linear.weight.data, bias, together)


class _Cuts:
    """Which part of a parameter this process gets."""

    def __init__(self, whole: ModelConfig, own: ModelConfig, together: Together, device: torch.device | str) -> None:
        self._whole, self._own, self._device = whole, own, device
        self._rank, self._world_size = together.rank, together.world_size

    def of(self, name: str, tensor: Tensor) -> Tensor:
        """The part of the parameter of this name, in memory of its own."""
        for ending, cut in self._rules():
            if ending in f".{name}":
                tensor = cut(tensor)
                break
        return tensor.to(self._device).clone(memory_format=torch.contiguous_format)

    def _rules(self) -> Sequence[tuple[str, Callable[[Tensor], Tensor]]]:
        by_projection = self._whole.qk_norm == "projection"
        return (
            (".qkv.", self._qkv),
            (".output.weight", lambda x: self._heads(x.t()).t()),
            (".gate_up.", self._gate_up),
            (".down.weight", lambda x: self._equal(x.t()).t()),
            (".scores.key_projection", lambda x: self._kv_heads(x.flatten(1), 1).view(-1, *x.shape[1:])),
            (".scores.", lambda x: self._equal(x)),  # the rest: a row for each query head
            (".q_norm.weight", self._heads if by_projection else lambda x: x),
            (".k_norm.weight", self._kv_heads if by_projection else lambda x: x),
        )

    def _equal(self, x: Tensor) -> Tensor:
        """The rank's share of the rows."""
        return x.chunk(self._world_size)[self._rank]

    def _heads(self, x: Tensor) -> Tensor:
        """Rows of the own query heads."""
        return self._equal(x)

    def _kv_heads(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Rows of the own key/value heads; rows: of one head."""
        size = (rows or self._whole.head_dim) * self._own.num_kv_heads
        first = self._rank * self._whole.num_kv_heads // self._world_size * (rows or self._whole.head_dim)
        return x[first : first + size]

    def _qkv(self, x: Tensor) -> Tensor:
        q_size, kv_size = (heads * self._whole.head_dim for heads in (self._whole.num_heads, self._whole.num_kv_heads))
        q, k, v = x.split((q_size, kv_size, kv_size))
        return torch.cat([self._heads(q), self._kv_heads(k), self._kv_heads(v)])

    def _gate_up(self, x: Tensor) -> Tensor:
        """Gate and up, or gate alone, each split by rows."""
        return torch.cat([self._equal(half) for half in x.chunk(1 + self._whole.gated_mlp)])

"""What attention should be, from the equations alone: Python numbers one by one, and a decoder made of them.

Nothing of `model` computes here: a config says which equation it is, and parameters are read as numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.scores import Scores
from model.config import ModelConfig
from model.decoder import Decoder

Vector = list[float]


def config(**changes: object) -> ModelConfig:
    """A tiny decoder with grouped-query heads."""
    shape: dict[str, object] = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 3, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    }  # fmt: skip
    return ModelConfig(**(shape | changes))  # type: ignore[arg-type]


def randomize(module: torch.nn.Module, generator: torch.Generator, std: float = 0.3) -> None:
    """Weights of a size at which every parameter matters: norms near 1, projections near the identity."""
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * (1.0 if name.endswith(("energy", "sinks")) else std)
        if name.endswith("projection"):
            parameter.data = torch.eye(parameter.shape[-1]) + noise
        else:
            parameter.data = noise + float(name.endswith("norm.weight"))


def projected(scores: Scores, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys as the score function takes them: q W (Luong), q Wq and k Wk (Bahdanau), or as they are."""

    def times(x: Tensor, matrices: Tensor | None) -> Tensor:
        if matrices is None:
            return x
        rows = [
            [[_dot(vector, column) for column in zip(*matrix, strict=True)]
             for vector, matrix in zip(heads, matrices.tolist(), strict=True)]
            for heads in x.tolist()
        ]  # fmt: skip
        return torch.tensor(rows, dtype=torch.float64)

    return times(q, scores.query_projection), times(k, scores.key_projection)


def naive(config: ModelConfig, scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens of one sequence, one number at a time.

    q: [num_new, num_heads, head_dim]; k, v: [seq_len, num_kv_heads, head_dim], queries and keys `projected`. Returns
    what attention makes of the values, in the shape of q, and the weights, [num_heads, num_new, seq_len].
    """
    num_new, num_heads, _ = q.shape
    seq_len, window = len(k), config.window(scores.layer)
    queries, keys, values = q.tolist(), k.tolist(), v.tolist()
    out, weights = torch.zeros_like(q, dtype=torch.float64), torch.zeros(num_heads, num_new, seq_len).double()
    for head in range(num_heads):
        group = head // (num_heads // config.num_kv_heads)
        energy = None if scores.energy is None else scores.energy[head].tolist()
        sink = [] if scores.sinks is None else [scores.sinks[head].item()]
        for row in range(num_new):
            here = seq_len - num_new + row
            seen = [t for t in range(here + 1) if window is None or here - t < window or t < config.num_sink_tokens]
            found = [_score(config, energy, queries[row][head], keys[t][group]) for t in seen]
            largest = max(found + sink)
            total = sum(math.exp(score - largest) for score in found + sink)
            for t, score in zip(seen, found, strict=True):
                weights[head, row, t] = math.exp(score - largest) / total
            parts = [[float(weights[head, row, t]) * value for value in values[t][group]] for t in seen]
            out[row, head] = torch.tensor([sum(column) for column in zip(*parts, strict=True)])
    return out, weights


def _score(config: ModelConfig, energy: Vector | None, q: Vector, k: Vector) -> float:
    score = _dot(q, k) if energy is None else _dot(energy, [math.tanh(a + b) for a, b in zip(q, k, strict=True)])
    if config.attention_scale is not None:
        score *= config.attention_scale
    elif config.attention == "scaled_dot_product":
        score /= math.sqrt(len(q))
    cap = config.attention_soft_cap
    return score if cap is None else cap * math.tanh(score / cap)


def _dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def naive_decoder(decoder: Decoder, token_ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """A whole forward pass in fp64, for decoders with pre-norm RMSNorm, gated SiLU and plain rotary positions.

    Returns the logits, [num_tokens, vocab_size], and each layer's weights, [num_heads, num_tokens, num_tokens].
    """
    config, found = decoder.config, []
    read = {name: parameter.detach().double() for name, parameter in decoder.named_parameters()}
    sizes = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    x = read["embedding"][token_ids]
    for index, layer in enumerate(decoder.layers):
        own = {
            name.removeprefix(f"layers.{index}."): w for name, w in read.items() if name.startswith(f"layers.{index}.")
        }
        h = _rms(x, own["attention_norm.weight"], config.norm_eps)
        qkv = F.linear(h, own["qkv.weight"], own.get("qkv.bias")).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.split(sizes, dim=1)
        q, k = projected(layer.scores, q, k)
        attended, weights = naive(config, layer.scores, _turned(q, config), _turned(k, config), v)
        found.append(weights)
        x = x + F.linear(attended.flatten(1), own["output.weight"])
        h = _rms(x, own["mlp_norm.weight"], config.norm_eps)
        gate, up = F.linear(h, own["mlp.gate_up.weight"]).chunk(2, dim=-1)
        x = x + F.linear(gate * gate.sigmoid() * up, own["mlp.down.weight"])
    return F.linear(_rms(x, read["norm.weight"], config.norm_eps), read["head.weight"]), found


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _turned(x: Tensor, config: ModelConfig) -> Tensor:
    """Rotary positions as complex numbers: the pair (i, i + dim / 2) is one number, and turning it is a product."""
    if config.rope is None:
        return x
    dim = config.head_dim
    speeds = config.rope.theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(len(x))[:, None] * speeds
    turned = (
        torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.cat([turned.real, turned.imag], dim=-1)

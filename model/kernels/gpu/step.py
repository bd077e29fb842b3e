"""A decoder's forward pass with what lies between its products fused: norm and residual, rope and store, the gate.

A layer is ten launches instead of some thirty. The weights stay the decoder's own.
"""

from collections.abc import Callable, Sequence
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from model.attention.inspect import Inspection
from model.attention.paged import PagedStep
from model.attention.plan import AttentionPlan
from model.attention.scores import Scores
from model.cache.pool import KVPool
from model.decoder import Decoder, DecoderLayer, Rope
from model.kernels.activation import gated
from model.kernels.norm import add_rms_norm
from model.kernels.rope import rope_and_store
from model.layers import MLP, RMSNorm
from model.split import SplitHead

PagedAttend = Callable[[Scores, Tensor, Tensor, Tensor], Tensor]


def why_not_captured(decoder: Decoder) -> str | None:
    """Why its steps cannot be CUDA graphs: what the host has to look at in between. None if they can."""
    if decoder.config.num_experts:
        return "experts are chosen token by token"
    if decoder.config.longest_sharing_prompt is not None:
        return "its rotary positions depend on the prompt's length"
    if isinstance(decoder.head, SplitHead):
        return "it is split: a process that looks into a step, and so does not replay it, would sum another size"
    return None


def why_not(decoder: Decoder) -> str | None:
    """Why this decoder's forward pass cannot be fused; None if it can."""
    config = decoder.config
    if config.norm != "rms":
        return f"its norm is {config.norm!r}"
    if config.qk_norm == "projection":
        return "it norms whole queries and keys"
    if config.attention == "additive":
        return "its scores are additive"
    if any(layer.scores.query_projection is not None for layer in _layers(decoder)):
        return "its score function is not folded"
    return None


class FusedStep:
    """Computes steps of a decoder over a `KVPool`. On a GPU, or in Triton's interpreter."""

    def __init__(self, decoder: Decoder, pool: KVPool) -> None:
        self.decoder, self.pool = decoder, pool
        self._layers = _layers(decoder)

    def plan_arrays(self, plan: AttentionPlan) -> list[NDArray[Any]]:
        """What `paged` takes, on the host."""
        return PagedStep.arrays(plan, self.decoder.config.group_size)

    def paged(self, plan: AttentionPlan, tensors: Sequence[Tensor]) -> PagedStep:
        """A plan on the device. tensors: its `plan_arrays` there."""
        return PagedStep.of(plan, tensors)

    def decodes(
        self, size: int, longest: int, slots: Tensor, tables: Tensor, lens: Tensor, no_tiles: Tensor
    ) -> PagedStep:
        """A step of decodes alone, none longer than `longest`, wherever its tensors stand."""
        return PagedStep(self.pool.block_size, size, longest, slots, tables, lens, lens, no_tiles)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        prompt_lens: Tensor,
        step: PagedStep,
        inspection: Inspection | None = None,
    ) -> Tensor:
        """token_ids, positions, prompt_lens: [num_tokens] -> final hidden states, [num_tokens, hidden_size]."""
        decoder = self.decoder
        attend: PagedAttend = step.attend if inspection is None else inspection.around(step.attend)
        stream = decoder.embed(token_ids, positions).contiguous()
        ropes = decoder.ropes(positions, prompt_lens, stream.dtype)
        added: Tensor | None = None  # what the last block has computed and the stream does not hold yet
        for layer, rotary in zip(self._layers, decoder.rotary_of, strict=True):
            normed, added = _enter(layer.attention_norm, added, stream)
            added = _leave(layer.attention_post_norm, self._attend(layer, normed, ropes[rotary], step.slots, attend))
            normed, added = _enter(layer.mlp_norm, added, stream)
            added = _leave(layer.mlp_post_norm, _mlp(layer.mlp, normed))
        hidden, _ = _enter(decoder.norm, added, stream)
        return hidden

    def _attend(self, layer: DecoderLayer, x: Tensor, rope: Rope, slots: Tensor, attend: PagedAttend) -> Tensor:
        keys, values = self.pool.layer(layer.scores.layer)
        q_norm, k_norm = layer.q_norm, layer.k_norm
        norms = None if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight)
        eps = self.decoder.config.norm_eps
        q = rope_and_store(layer.qkv(x), layer.num_heads, keys, values, slots, rope, norms, eps)
        out: Tensor = layer.output(attend(layer.scores, q, keys, values).flatten(1))
        return out


def _enter(norm: nn.Module, added: Tensor | None, stream: Tensor) -> tuple[Tensor, None]:
    """Add to the stream what is waiting, and norm it for the next block, if that block has a norm before it."""
    if isinstance(norm, RMSNorm):
        return add_rms_norm(added, stream, norm.weight, norm.eps), None
    if added is not None:
        stream += added
    return stream, None


def _leave(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm behind a block, if it has one."""
    return add_rms_norm(None, x.contiguous(), norm.weight, norm.eps) if isinstance(norm, RMSNorm) else x


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    if isinstance(mlp, MLP) and mlp.gated:
        x, mlp = gated(mlp.gate_up(x), mlp.activation_name), mlp.down
    out: Tensor = mlp(x)
    return out


def _layers(decoder: Decoder) -> list[DecoderLayer]:
    return [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]

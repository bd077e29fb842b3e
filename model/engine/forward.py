"""What computes the forward pass of a step: torch, the native CPU step, or Triton's kernels. Chosen at the start."""

import logging
import os
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.attention.deterministic import DeterministicAttention
from model.attention.gathered import GatheredAttention
from model.attention.scores import Attend
from model.cache.packed import PackedPool
from model.cache.pool import KVPool
from model.config import EngineConfig, ModelConfig
from model.decoder import Decoder, DecoderLayer
from model.engine.batch import Batch
from model.errors import ConfigError
from model.kernels.cpu.step import NativeStep, why_not

logger = logging.getLogger(__name__)


class Forwarded(NamedTuple):
    """hidden: final states of the step's tokens, [num_tokens, hidden_size]; logits: [num_samples, vocab_size].

    likeliest: for each row of the logits where its largest stands, and what that is (NaN if one of the row is), where
        the forward pass finds them by the way.
    All may lie in memory that the next step overwrites.
    """

    hidden: Tensor
    logits: Tensor
    likeliest: tuple[Tensor, Tensor] | None = None


class Forward(Protocol):
    """A decoder with its cache."""

    config: ModelConfig
    pool: KVPool | PackedPool

    def forward(self, batch: Batch) -> Forwarded:
        """Compute the step's tokens, and the logits of the rows that sample."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size]."""
        ...


class TorchForward:
    """The decoder itself, on any device and in any dtype."""

    pool: KVPool | PackedPool

    def __init__(self, decoder: Decoder, config: EngineConfig, num_blocks: int) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.logits = decoder.logits
        weight = decoder.embedding
        self._pool = KVPool(decoder.config, num_blocks, config.block_size, weight.dtype, weight.device)
        self.pool = self._pool
        self._attention = DeterministicAttention if config.deterministic else GatheredAttention

    @staticmethod
    def cache_dtype(decoder: Decoder) -> torch.dtype:
        """Of keys and values."""
        return decoder.embedding.dtype

    def forward(self, batch: Batch) -> Forwarded:
        """See `Forward`."""
        attend: Attend = self._attention(batch.plan, self._pool)
        if batch.inspection is not None:
            attend = batch.inspection.around(attend)
        hidden = self.decoder(batch.token_ids, batch.positions, attend, batch.prompt_lens)
        # The head is the widest product of all: only rows that sample go through it.
        return Forwarded(hidden, self.decoder.logits(hidden[batch.sample_rows]))


class NativeForward:
    """The native CPU step, which has taken the decoder's weights."""

    pool: KVPool | PackedPool

    def __init__(self, decoder: Decoder, config: EngineConfig, num_blocks: int) -> None:
        self.config = decoder.config
        pool = PackedPool(decoder.config, num_blocks, config.block_size)
        self.pool = pool
        self._scores = [layer.scores for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        max_tokens, num_threads = config.max_num_batched_tokens, config.num_threads
        self._step = NativeStep(decoder, pool, max_tokens=max_tokens, num_threads=num_threads)
        self.logits = self._step.logits
        # What torch has left to do is the sampling. Its own threads would go on spinning after each piece of it, on the
        # cores that the next step needs.
        torch.set_num_threads(1)

    @staticmethod
    def cache_dtype(decoder: Decoder) -> torch.dtype:
        """Of keys and values."""
        return torch.bfloat16

    def forward(self, batch: Batch) -> Forwarded:
        """See `Forward`."""
        inspection, queries = batch.inspection, None
        if inspection is not None:
            queries = self._step.empty_queries(len(batch.sample_rows))
        stepped = self._step.forward(batch.token_ids, batch.positions, batch.plan, batch.sample_rows, queries)
        if inspection is not None and queries is not None:
            for layer in inspection.layers:
                inspection.keep(self._scores[layer], queries[layer, inspection.samples, :, : self.config.head_dim])
        return Forwarded(stepped.hidden, stepped.logits, (stepped.likeliest, stepped.largest))


class TritonForward:
    """The decoder's products, with our Triton kernels between them."""

    pool: KVPool | PackedPool

    def __init__(self, decoder: Decoder, config: EngineConfig, num_blocks: int) -> None:
        from model.kernels.gpu.step import FusedStep  # there is no Triton where there is no GPU

        self.config, self.logits = decoder.config, decoder.logits
        weight = decoder.embedding
        pool = KVPool(decoder.config, num_blocks, config.block_size, weight.dtype, weight.device)
        self.pool = pool
        self._step = FusedStep(decoder, pool)

    @staticmethod
    def cache_dtype(decoder: Decoder) -> torch.dtype:
        """Of keys and values."""
        return decoder.embedding.dtype

    @staticmethod
    def why_not(decoder: Decoder, config: EngineConfig) -> str | None:
        """Why this decoder cannot run so; None if it can."""
        device = decoder.embedding.device.type
        if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            return f"the device is {device}"
        if config.deterministic:
            return "deterministic sums are torch's"
        from model.kernels.gpu.step import why_not

        return why_not(decoder)

    def forward(self, batch: Batch) -> Forwarded:
        """See `Forward`."""
        hidden = self._step.forward(batch.token_ids, batch.positions, batch.prompt_lens, batch.plan, batch.inspection)
        return Forwarded(hidden, self.logits(hidden[batch.sample_rows]))


def choose_kernels(
    decoder: Decoder, config: EngineConfig
) -> type[TorchForward] | type[NativeForward] | type[TritonForward]:
    """By what was asked for and what is possible. Raises `ConfigError` for kernels that cannot run this model here."""
    on_gpu = decoder.embedding.device.type == "cuda"
    if config.kernels == "torch":
        return TorchForward
    wanted = ("triton" if on_gpu else "native") if config.kernels == "auto" else config.kernels
    kind, reason = (
        (TritonForward, TritonForward.why_not(decoder, config))
        if wanted == "triton"
        else (NativeForward, why_not(decoder, config))
    )
    if reason is None:
        logger.info("kernels: %s", wanted)
        return kind
    if config.kernels != "auto":
        raise ConfigError(f"kernels {wanted!r} cannot run this model here: {reason}; use 'auto' or 'torch'")
    # Nobody expects more of fp32; who asks for a small dtype expects its speed.
    level = logging.WARNING if config.dtype in ("bf16", "int8") else logging.INFO
    logger.log(level, "kernels: torch, because %s", reason)
    return TorchForward

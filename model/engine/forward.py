"""What computes the forward pass of a step: torch, the native CPU step, or Triton's kernels. Chosen at the start."""

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from model.attention.deterministic import DeterministicAttention
from model.attention.gathered import GatheredAttention
from model.attention.plan import AttentionPlan
from model.attention.scores import Attend
from model.cache.packed import PackedPool, packed_block_bytes
from model.cache.pool import FP8, KVPool, bytes_per_token
from model.config import EngineConfig, ModelConfig
from model.decoder import Decoder, DecoderLayer
from model.engine.batch import Batch
from model.engine.decodes import DecodeSteps, Inputs, Outputs
from model.engine.graphs import DecodeGraphs, capture_for
from model.engine.memory import no_int8_cache
from model.errors import ConfigError
from model.kernels.cpu.step import NativeStep, native_cache_dtype, why_not
from model.layers import Int8Linear, replace_linears
from model.sampling.sampler import Drawn, Likeliest

logger = logging.getLogger(__name__)

FIRST_WITH_FP8 = (8, 9)  # of CUDA's compute capabilities


class Forwarded(NamedTuple):
    """hidden: final states of the step's tokens, [num_tokens, hidden_size]; logits: [num_samples, vocab_size];
    likeliest, drawn: what the forward pass has found by the way, and what it has drawn itself. All may lie in memory
    that the next step overwrites.
    """

    hidden: Tensor
    logits: Tensor
    likeliest: Likeliest | None = None
    drawn: Drawn | None = None


class Forward(Protocol):
    """A decoder with its cache. samples_on_device: whether our sampling kernel takes its logits. decodes: stages steps
    that are not for `forward`, but for graphs.
    """

    config: ModelConfig
    pool: KVPool | PackedPool
    samples_on_device: bool
    decodes: DecodeSteps | None

    def plan_arrays(self, plan: AttentionPlan) -> Sequence[NDArray[Any]]:
        """What it wants of a step's plan on the device, as `Batch.plan_tensors`."""
        ...

    def forward(self, batch: Batch) -> Forwarded:
        """Compute the step's tokens, and the logits of the rows that sample."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] -> [rows, vocab_size]."""
        ...


class TorchForward:
    """The decoder itself, on any device and in any dtype."""

    pool: KVPool | PackedPool
    samples_on_device = False
    decodes: DecodeSteps | None = None

    def __init__(self, decoder: Decoder, config: EngineConfig, num_blocks: int) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.logits = decoder.logits
        weight = decoder.embedding
        self._pool = KVPool(decoder.config, num_blocks, config.block_size, weight.dtype, weight.device)
        self.pool = self._pool
        self._attention = DeterministicAttention if config.deterministic else GatheredAttention

    @staticmethod
    def block_bytes(decoder: Decoder, config: EngineConfig) -> int:
        """Of keys and values over all layers."""
        return config.block_size * bytes_per_token(decoder.config, decoder.embedding.dtype)

    def plan_arrays(self, plan: AttentionPlan) -> Sequence[NDArray[Any]]:
        """See `Forward`. It moves what it needs itself."""
        return ()

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
    samples_on_device = False
    decodes: DecodeSteps | None = None

    def __init__(self, decoder: Decoder, config: EngineConfig, num_blocks: int) -> None:
        self.config = decoder.config
        pool = PackedPool(decoder.config, num_blocks, config.block_size, native_cache_dtype(config))
        self.pool = pool
        self._scores = [layer.scores for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        max_tokens, num_threads = config.max_num_batched_tokens, config.num_threads
        self._step = NativeStep(decoder, pool, max_tokens=max_tokens, num_threads=num_threads)
        self.logits = self._step.logits
        # What torch has left to do is the sampling. Its own threads would go on spinning after each piece of it, on the
        # cores that the next step needs.
        torch.set_num_threads(1)

    @staticmethod
    def block_bytes(decoder: Decoder, config: EngineConfig) -> int:
        """Of keys and values over all layers."""
        return packed_block_bytes(decoder.config, config.block_size, native_cache_dtype(config))

    def plan_arrays(self, plan: AttentionPlan) -> Sequence[NDArray[Any]]:
        """See `Forward`. It moves what it needs itself."""
        return ()

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
    samples_on_device = True

    def __init__(self, decoder: Decoder, config: EngineConfig, num_blocks: int) -> None:
        from model.kernels.gpu.linear import DenseLinear, WeightInt8Linear  # there is no Triton where there is no GPU
        from model.kernels.gpu.step import FusedStep

        replace_linears(decoder, WeightInt8Linear, Int8Linear)
        replace_linears(decoder, DenseLinear)
        self.config, self.logits = decoder.config, decoder.logits
        weight = decoder.embedding
        dtype = self._cache_dtype(decoder, config)
        pool = KVPool(decoder.config, num_blocks, config.block_size, dtype, weight.device)
        self.pool = pool
        self._step = FusedStep(decoder, pool)
        self.decodes = self._capture(decoder, config, pool)

    @staticmethod
    def block_bytes(decoder: Decoder, config: EngineConfig) -> int:
        """Of keys and values over all layers."""
        return config.block_size * bytes_per_token(decoder.config, TritonForward._cache_dtype(decoder, config))

    @staticmethod
    def _cache_dtype(decoder: Decoder, config: EngineConfig) -> torch.dtype:
        return FP8 if config.kv_cache_dtype == "fp8" else decoder.embedding.dtype

    @staticmethod
    def why_not(decoder: Decoder, config: EngineConfig) -> str | None:
        """Why this decoder cannot run so; None if it can."""
        device = decoder.embedding.device.type
        if device != "cuda" and not os.environ.get("TRITON_INTERPRET"):
            return f"the device is {device}"
        if config.deterministic:
            return "deterministic sums are torch's"
        if config.kv_cache_dtype == "fp8" and device == "cuda" and torch.cuda.get_device_capability() < FIRST_WITH_FP8:
            return "the device knows no fp8"
        from model.kernels.gpu.step import why_not

        return why_not(decoder)

    def plan_arrays(self, plan: AttentionPlan) -> Sequence[NDArray[Any]]:
        """See `Forward`."""
        return self._step.plan_arrays(plan)

    def forward(self, batch: Batch) -> Forwarded:
        """See `Forward`."""
        paged = self._step.paged(batch.plan, batch.plan_tensors)
        hidden = self._step.forward(batch.token_ids, batch.positions, batch.prompt_lens, paged, batch.inspection)
        return Forwarded(hidden, self.logits(hidden[batch.sample_rows]))

    def _capture(self, decoder: Decoder, config: EngineConfig, pool: KVPool) -> DecodeSteps | None:
        """Graphs of this decoder's decode steps, where that is possible and asked for."""
        from model.kernels.decodes import place_decodes
        from model.kernels.gpu.step import why_not_captured
        from model.kernels.sampling import sample

        model, device, dtype = decoder.config, pool.keys.device, decoder.embedding.dtype
        capture = None if config.cuda_graphs is False else capture_for(device)
        if capture is None:
            return None
        if (reason := why_not_captured(decoder)) is not None:
            if config.cuda_graphs:
                raise ConfigError(f"cuda_graphs cannot be had for this model: {reason}; leave it out")
            logger.info("no CUDA graphs: %s", reason)
            return None
        rows = config.max_num_seqs
        longest = min(config.max_model_len or model.max_position_embeddings, pool.num_tokens)
        inputs = Inputs(rows, -(-longest // config.block_size), device)
        outputs = Outputs.of(rows, model.hidden_size, model.vocab_size, dtype, device)
        nothing = torch.zeros(0, 2, dtype=torch.int32, device=device)

        @torch.inference_mode()
        def run(size: int) -> None:
            token_ids, positions, slots, lens = (row[:size] for row in inputs.placed)
            place_decodes(
                inputs.numbers, outputs.token_ids, inputs.tables, token_ids, positions, slots, lens,
                block_size=config.block_size,
            )  # fmt: skip
            paged = self._step.decodes(size, longest, slots, inputs.tables[:size], lens, nothing)
            hidden = self._step.forward(token_ids, positions, positions, paged)
            logits = self.logits(hidden)
            temperature, top_k, top_p, min_p, seed = (parameter[:size] for parameter in inputs.sampling)
            drawn = outputs.token_ids[:size], outputs.told[:size]
            sample(logits, temperature, top_k, top_p, min_p, seed, lens, out=drawn)  # a token stands at the length
            outputs.hidden[:size].copy_(hidden)
            outputs.logits[:size].copy_(logits)

        return DecodeSteps(inputs, outputs, DecodeGraphs(rows, run, capture), config.block_size)


def choose_kernels(
    decoder: Decoder, config: EngineConfig
) -> type[TorchForward] | type[NativeForward] | type[TritonForward]:
    """By what was asked for and what is possible. Raises `ConfigError` for kernels that cannot run this model here."""
    kind = _choose(decoder, config)
    if config.kv_cache_dtype == "fp8" and kind is not TritonForward:
        raise ConfigError("kv_cache_dtype 'fp8' is for Triton's kernels, on a GPU; use 'auto'")
    if config.cuda_graphs and kind is not TritonForward:
        raise ConfigError("cuda_graphs are of Triton's kernels, which do not run this model here; leave it out")
    if config.kv_cache_dtype == "int8" and kind is not NativeForward:
        raise no_int8_cache(why_not(decoder, config) or "others were asked for")
    return kind


def _choose(decoder: Decoder, config: EngineConfig) -> type[TorchForward] | type[NativeForward] | type[TritonForward]:
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

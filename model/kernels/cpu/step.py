"""The native step: a decoder's whole forward pass over the rows of a step in one call, its weights packed once."""

import ctypes
import weakref
from ctypes import byref
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.attention.plan import AttentionPlan
from model.cache.packed import PackedPool
from model.config import EngineConfig, ModelConfig
from model.decoder import Decoder, DecoderLayer
from model.errors import ConfigError, StepError
from model.kernels.cpu import library
from model.kernels.cpu.build import NoLibrary
from model.kernels.cpu.library import ACTIVATIONS, INSTRUCTION_SETS, NORMS, PANEL
from model.kernels.cpu.pack import Arena, Matrix, interleave, release, up
from model.layers import MLP, Int8Linear, LayerNorm, MixtureOfExperts, RMSNorm
from model.machine import cores
from model.rotary import Rotary

# Before an engine takes torch's threads down: as many as torch would use, which knows of no quota.
DEFAULT_THREADS = min(torch.get_num_threads(), cores())

REFUSALS = (
    "nothing",
    "the number of its tokens or samples: {value}",
    "the rows of sequence {index} end at {value}",
    "row {index} has the token id {value}, outside of the vocabulary",
    "row {index} has the position {value}, outside of the context or out of order",
    "sequence {index} has the block {value} in its table, which the cache does not have, or too short a table",
    "sample {index} is of row {value}, which is not there, or out of order",
)


def why_not(decoder: Decoder, config: EngineConfig) -> str | None:
    """Why this decoder cannot be run by the native step here; None if it can."""
    if decoder.embedding.device.type != "cpu":
        return f"the device is {decoder.embedding.device.type}"
    if not isinstance(decoder.head, Int8Linear) and decoder.embedding.dtype != torch.bfloat16:
        return f"the weights are {str(decoder.embedding.dtype).removeprefix('torch.')}, neither bf16 nor int8"
    layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
    if any(layer.scores.query_projection is not None for layer in layers):
        return f"its score function is {decoder.config.attention}, unfolded"
    return why_never(decoder.config, config)


def why_never(model: ModelConfig, config: EngineConfig) -> str | None:
    """Why no decoder of this shape can be run by the native step here, whatever its dtype; None if one can."""
    if config.block_size == 2 and config.kv_cache_dtype == "int8":
        return "block_size 2 is not enough for the four numbers that lie side by side in int8"
    if config.block_size not in (2, 4, 8) and config.block_size % 16:
        return f"block_size {config.block_size} is neither 2, 4, 8 nor a multiple of 16"
    if model.attention == "additive":
        return "its score function is additive"
    if model.longest_sharing_prompt is not None:
        return "its rotary positions depend on the length of the prompt"
    try:
        library.load()
    except (NoLibrary, OSError) as error:
        return str(error)
    return None


def native_cache_dtype(config: EngineConfig) -> torch.dtype:
    """Of the keys and values that the native step keeps."""
    return torch.int8 if config.kv_cache_dtype == "int8" else torch.bfloat16


class Stepped(NamedTuple):
    """What a step gives, all fp32; it lies in the step's own memory: the next call overwrites it.

    hidden: final states, [num_tokens, hidden_size]. logits: [num_samples, vocab_size]. likeliest, largest:
    [num_samples], where the largest logit of each row stands, and what it is: NaN if one of the row is.
    """

    hidden: Tensor
    logits: Tensor
    likeliest: Tensor
    largest: Tensor


class NativeStep:
    """Computes steps over a `PackedPool`. Takes the weights out of the decoder: it holds none afterwards.

    A row's results depend on its sequence alone, to the last bit: not on the batch, on chunks, or on the number of
    threads.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: PackedPool,
        *,
        max_tokens: int,
        num_threads: int | None = None,
        instruction_set: str | None = None,
    ) -> None:
        self.config, self.pool = decoder.config, pool
        self._library = library.load()
        self._arena = arena = Arena(_shapes(decoder))
        self._expert_maps: list[ctypes.Array[library.Linear]] = []  # kept alive: the structs point there
        # In order of use, so that the arena is read from its start to its end.
        tables = [(arena.keep(rotary.cos.float()), arena.keep(rotary.sin.float())) for rotary in _rotaries(decoder)]
        layers = [self._layer(decoder, index, tables) for index in range(self.config.num_layers)]
        self._layers = (library.Layer * len(layers))(*layers)
        head = arena.pack(Matrix.of(decoder.head).padded())
        embedding = decoder.embedding.detach().to(torch.bfloat16)
        release(decoder.head)
        decoder.embedding.data = embedding  # which may have been the head, too
        places = decoder.position_embedding
        model = library.Model(
            embedding=arena.keep(decoder.embedding),
            position_embedding=None if places is None else arena.keep(places.to(torch.bfloat16)),
            layers=ctypes.addressof(self._layers),
            norm=self._norm(decoder.norm),
            head=head,
            vocab_size=self.config.vocab_size,
            hidden_size=self.config.hidden_size,
            num_layers=self.config.num_layers,
            max_positions=self.config.max_position_embeddings,
            num_blocks=pool.num_blocks,
            max_tokens=max_tokens,
            num_threads=num_threads or DEFAULT_THREADS,
            embedding_scale=self.config.embedding_scale,
            final_cap=self.config.logit_soft_cap or 0.0,
            instruction_set=INSTRUCTION_SETS.index(instruction_set or self._library.instruction_sets[-1]),
            cache_dtype=library.INT8 if pool.dtype == torch.int8 else library.BF16,
        )
        self._step = self._library.create(byref(model))
        if not self._step:
            raise ConfigError(f"no memory for the native step's buffers of {max_tokens} tokens; lower the token budget")
        weakref.finalize(self, self._library.destroy, self._step)
        self._vocab = head.panels * PANEL
        self._logits = torch.from_numpy(np.zeros((max_tokens, self._vocab), dtype=np.float32))
        self._likeliest = torch.zeros(max_tokens, dtype=torch.int64)
        self._largest = torch.zeros(max_tokens)
        self._hidden = _floats_at(self._library.hidden(self._step), (max_tokens, up(self.config.hidden_size, PANEL)))

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        plan: AttentionPlan,
        sample_rows: Tensor,
        queries: Tensor | None = None,
    ) -> Stepped:
        """One step; `sample_rows` are the rows that get logits, in order. These, ids and positions are int64.

        queries: made by `empty_queries`, and filled with those of the sample rows; None: nobody asks for them.
        Raises `StepError` before anything is computed if a token, position or block is none that there is.
        """
        verdict = library.Verdict()
        batch = library.Batch(
            token_ids=token_ids.data_ptr(),
            positions=positions.data_ptr(),
            query_start_loc=plan.query_start_loc.ctypes.data,
            block_tables=plan.block_tables.ctypes.data,
            sample_rows=sample_rows.data_ptr(),
            logits=self._logits.data_ptr(),
            largest=self._largest.data_ptr(),
            likeliest=self._likeliest.data_ptr(),
            queries=None if queries is None else queries.data_ptr(),
            num_tokens=len(token_ids),
            num_seqs=plan.num_seqs,
            max_blocks=plan.block_tables.shape[1],
            num_samples=len(sample_rows),
        )
        self._library.step(self._step, byref(batch), byref(verdict))
        if verdict.refusal:
            reason = REFUSALS[verdict.refusal].format(index=verdict.index, value=verdict.value)
            raise StepError(f"the native step refuses a batch for {reason}")
        hidden, logits = self._hidden[: len(token_ids)], self._logits[: len(sample_rows)]
        return Stepped(
            hidden[:, : self.config.hidden_size],
            logits[:, : self.config.vocab_size],
            self._likeliest[: len(sample_rows)],
            self._largest[: len(sample_rows)],
        )

    def empty_queries(self, num_samples: int) -> Tensor:
        """Room for every layer's queries as attention takes them, [num_layers, num_samples, num_heads, padded_dim]."""
        config = self.config
        shape = (config.num_layers, num_samples, config.num_heads, self.pool.padded_dim)
        return torch.empty(shape, dtype=torch.bfloat16)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, hidden_size] fp32, rows in any number -> [rows, vocab_size]."""
        out = torch.empty(len(hidden), self._vocab)
        for rows, logits in zip(hidden.split(len(self._logits)), out.split(len(self._logits)), strict=True):
            rows = rows.contiguous()
            self._library.head(self._step, rows.data_ptr(), rows.stride(0), len(rows), logits.data_ptr())
        return out[:, : self.config.vocab_size]

    def _layer(self, decoder: Decoder, index: int, tables: list[tuple[int | None, int | None]]) -> library.Layer:
        layer, config, pack = decoder.layers[index], self.config, self._arena.pack
        assert isinstance(layer, DecoderLayer)
        packed = library.Layer(
            attention_norm=self._norm(layer.attention_norm),
            attention_post_norm=self._norm(layer.attention_post_norm),
            mlp_norm=self._norm(layer.mlp_norm),
            mlp_post_norm=self._norm(layer.mlp_post_norm),
            q_norm=self._norm(layer.q_norm),
            k_norm=self._norm(layer.k_norm),
            norm_whole=config.qk_norm == "projection",
            qkv=pack(Matrix.of(layer.qkv).padded()),
            output=pack(Matrix.of(layer.output).padded()),
            attention=self._attention(layer, index),
            activation=ACTIVATIONS[config.activation],
            gated=config.gated_mlp,
        )
        if isinstance(layer.mlp, MixtureOfExperts):
            packed.experts = self._experts(layer.mlp)
        else:
            packed.up, packed.down = self._mlp(layer.mlp)
        rope = config.rope_of(index)
        for rotary, (cos, sin) in zip(_rotaries(decoder), tables, strict=True):
            if rotary.config == rope:
                packed.cos, packed.sin, packed.rotary_half = cos, sin, rotary.rotary_dim // 2
        release(layer.qkv, layer.output)
        return packed

    def _mlp(self, mlp: nn.Module) -> tuple[library.Linear, library.Linear]:
        assert isinstance(mlp, MLP)
        gate_up, pack = Matrix.of(mlp.gate_up), self._arena.pack
        packed = pack(interleave(gate_up) if mlp.gated else gate_up.padded()), pack(Matrix.of(mlp.down).padded())
        release(mlp.gate_up, mlp.down)
        return packed

    def _experts(self, mixture: MixtureOfExperts) -> library.Experts:
        ups, downs = zip(*(self._mlp(expert) for expert in mixture.experts), strict=True)
        packed = (library.Linear * len(ups))(*ups), (library.Linear * len(downs))(*downs)
        self._expert_maps += packed
        return library.Experts(
            router=self._arena.keep(mixture.router.float()),
            up=ctypes.addressof(packed[0]),
            down=ctypes.addressof(packed[1]),
            count=len(ups),
            num_chosen=mixture.num_chosen,
            normalize=mixture.normalize,
        )

    def _attention(self, layer: DecoderLayer, index: int) -> library.Attention:
        config, pool, scores = self.config, self.pool, layer.scores
        return library.Attention(
            cache=pool.memory[index].data_ptr(),
            sinks=None if scores.sinks is None else self._arena.keep(scores.sinks.float()),
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            padded_dim=pool.padded_dim,
            block_size=pool.block_size,
            groups=pool.groups,
            group_bytes=pool.group_bytes,
            window=scores.window or 0,
            sink_tokens=scores.num_sink_tokens,
            scale=scores.scale,
            softcap=scores.soft_cap or 0.0,
        )

    def _norm(self, norm: nn.Module | None) -> library.Norm:
        if norm is None or isinstance(norm, nn.Identity):
            return library.Norm()
        assert isinstance(norm, RMSNorm | LayerNorm)
        kind, bias = ("layer", norm.bias.float()) if isinstance(norm, LayerNorm) else ("rms", None)
        keep = self._arena.keep
        return library.Norm(weight=keep(norm.weight.float()), bias=keep(bias), eps=norm.eps, kind=NORMS[kind])


def _rotaries(decoder: Decoder) -> list[Rotary]:
    return [rotary for rotary in decoder.rotaries if isinstance(rotary, Rotary)]


def _shapes(decoder: Decoder) -> list[tuple[int, int, torch.dtype]]:
    """(outputs, inputs, dtype) of every map as `Arena` will hold it."""
    shapes = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        shapes += [_shape(layer.qkv), _shape(layer.output)]
        for mlp in layer.mlp.experts if isinstance(layer.mlp, MixtureOfExperts) else [layer.mlp]:
            assert isinstance(mlp, MLP)
            shapes += [_shape(mlp.gate_up, parts=1 + mlp.gated), _shape(mlp.down)]
    return [*shapes, _shape(decoder.head)]


def _shape(module: nn.Module, parts: int = 1) -> tuple[int, int, torch.dtype]:
    matrix = Matrix.of(module)
    outputs, inputs = matrix.weight.shape
    return parts * up(outputs // parts, PANEL), inputs, matrix.weight.dtype


def _floats_at(address: int, shape: tuple[int, int]) -> Tensor:
    """The library's own memory as a tensor."""
    memory = (ctypes.c_float * (shape[0] * shape[1])).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)

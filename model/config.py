"""What a decoder is and how an engine runs it: two frozen records, validated once, when they are made."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from model.errors import ConfigError

Dtype = Literal["auto", "fp32", "bf16", "int8"]
Device = Literal["auto", "cpu", "cuda"]

ScoreFunction = Literal["scaled_dot_product", "multiplicative", "additive"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
Norm = Literal["rms", "layer"]
NormPlacement = Literal["pre", "post", "both"]
QKNorm = Literal["none", "head", "projection"]
Kernels = Literal["auto", "torch", "native", "triton"]
CacheDtype = Literal["auto", "fp8", "int8"]
RopeScaling = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]


def _check_size(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number above 0, not {value!r}")


def _check_choice(name: str, value: object, choices: object) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021) and how they are stretched beyond the length that a model was trained with.

    rotary_dim: so many leading dimensions of a head turn; None: all of them.
    factor: how many times longer the context became; original_length: what it was before.
    low_freq_factor, high_freq_factor: `llama3` leaves wavelengths under original_length / high_freq_factor as they are,
        divides those over original_length / low_freq_factor, and blends between.
    beta_fast, beta_slow, truncate, attention_factor: `yarn` (Peng et al. 2023): the turns over the original length
        between which it blends, whether these borders are rounded to whole dimensions, and what cosines and sines are
        multiplied by.
    frequency_divisors: `longrope` (Ding et al. 2024): one for each pair of dimensions.
    """

    theta: float = 10_000.0
    rotary_dim: int | None = None
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    frequency_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("rope scaling", self.scaling, RopeScaling)
        for name in ("theta", "factor", "low_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            _check_positive(f"rope {name}", getattr(self, name))
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"rope high_freq_factor ({self.high_freq_factor}) must exceed low_freq_factor ({self.low_freq_factor})"
            )
        if self.scaling in ("dynamic", "llama3", "yarn"):
            _check_size("rope original_length", self.original_length)
        if self.rotary_dim is not None and (type(self.rotary_dim) is not int or self.rotary_dim < 2):
            raise ConfigError(f"rope rotary_dim must be an even number of at least 2, not {self.rotary_dim!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder. Variations between families are fields here, never classes.

    Raises `ConfigError` for a shape that cannot be computed.

    attention: the score function (`model.attention.scores`). attention_scale: what its scores are multiplied by; None:
        1 / sqrt(head_dim) for the scaled dot product, 1 for the others, as they were published.
    attention_soft_cap: scores become cap * tanh(score / cap) (Gemma 2). logit_soft_cap: the same for the head's logits.
    sliding_window: a token sees so many tokens, itself included; None: all. full_attention_layers see all the same.
    num_sink_tokens: the first tokens of a sequence stay visible beyond the window (Xiao et al. 2023).
    sink_logits: a learned score for each head that takes its share of the softmax and adds nothing (gpt-oss).
    rope: None: no rotary positions. local_rope: the windowed layers' own, where it differs (Gemma 3).
    layers_without_rope: layers that know no positions but by causality (SmolLM3).
    learned_positions: an embedding of positions is added to that of tokens (GPT-2).
    norm_placement: before each block, after it, or both.
    qk_norm: RMSNorm of queries and keys before they turn: of each head (Qwen3) or of the whole projection (OLMo 2).
    num_experts: 0: one MLP a layer. Else each token goes through `num_experts_per_token` of them, weighted by the
        router's softmax, which is brought to sum 1 again over those chosen if `normalize_expert_weights`.
    dense_layers: layers with one MLP all the same, of `intermediate_size`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    attention: ScoreFunction = "scaled_dot_product"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    num_sink_tokens: int = 0
    sink_logits: bool = False
    rope: RopeConfig | None = RopeConfig()
    local_rope: RopeConfig | None = None
    layers_without_rope: tuple[int, ...] = ()
    learned_positions: bool = False
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_placement: NormPlacement = "pre"
    qk_norm: QKNorm = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    gated_mlp: bool = True
    embedding_scale: float = 1.0
    num_experts: int = 0
    num_experts_per_token: int = 0
    expert_intermediate_size: int = 0
    normalize_expert_weights: bool = True
    dense_layers: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim"
        for name in (*sizes.split(), "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        for name in ("norm_eps", "embedding_scale"):
            _check_positive(name, getattr(self, name))
        for name in ("attention_scale", "attention_soft_cap", "logit_soft_cap"):
            if getattr(self, name) is not None:
                _check_positive(name, getattr(self, name))
        for name, choices in (
            ("attention", ScoreFunction),
            ("norm", Norm),
            ("norm_placement", NormPlacement),
            ("qk_norm", QKNorm),
            ("activation", Activation),
        ):
            _check_choice(name, getattr(self, name), choices)
        self._check_attention()
        self._check_experts()
        for name in ("full_attention_layers", "layers_without_rope", "dense_layers"):
            for layer in getattr(self, name):
                if type(layer) is not int or not 0 <= layer < self.num_layers:
                    raise ConfigError(f"{name} names layer {layer!r}, of {self.num_layers} layers")
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_ids", self.eos_token_ids)):
            for token_id in ids:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ConfigError(f"{name} {token_id} lies outside the vocabulary of {self.vocab_size}")

    def _check_attention(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        for rope in (self.rope, self.local_rope):
            dim = self.head_dim if rope is None or rope.rotary_dim is None else rope.rotary_dim
            if rope is not None and (dim % 2 or dim > self.head_dim):
                raise ConfigError(
                    f"{dim} of the head_dim {self.head_dim} cannot turn: rotary positions need an even number"
                )
            if rope is not None and rope.scaling == "longrope" and len(rope.frequency_divisors) != dim // 2:
                raise ConfigError(f"longrope names {len(rope.frequency_divisors)} factors for {dim // 2} pairs")
            if rope is not None and rope.scaling == "dynamic" and dim < 4:
                raise ConfigError("dynamic rope scaling needs at least 4 dimensions that turn")
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window)
        if type(self.num_sink_tokens) is not int or self.num_sink_tokens < 0:
            raise ConfigError(f"num_sink_tokens must be a whole number of at least 0, not {self.num_sink_tokens!r}")
        if self.num_sink_tokens and self.sliding_window is None:
            raise ConfigError("num_sink_tokens needs a sliding_window: without one every token stays visible")
        if self.qk_norm != "none" and self.attention != "scaled_dot_product":
            raise ConfigError(
                f"qk_norm {self.qk_norm!r} is for the scaled dot product, not for {self.attention!r} scores"
            )

    def _check_experts(self) -> None:
        if not self.num_experts:
            return
        for name in ("num_experts", "expert_intermediate_size", "num_experts_per_token"):
            _check_size(name, getattr(self, name))
        if self.num_experts_per_token > self.num_experts:
            raise ConfigError(
                f"num_experts_per_token ({self.num_experts_per_token}) exceeds num_experts ({self.num_experts})"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (grouped-query attention; Ainslie et al. 2023)."""
        return self.num_heads // self.num_kv_heads

    def window(self, layer: int) -> int | None:
        """How many tokens a token of `layer` sees, itself included; None: all before it."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def rope_of(self, layer: int) -> RopeConfig | None:
        """The rotary positions of `layer`; None where there are none."""
        if layer in self.layers_without_rope:
            return None
        return self.local_rope if self.local_rope is not None and self.window(layer) is not None else self.rope

    @property
    def longest_sharing_prompt(self) -> int | None:
        """Keys of a longer prompt depend on its length (`dynamic` rope): who has another length cannot share them.

        None: keys depend on the tokens before them alone, however many follow.
        """
        ropes = (self.rope, self.local_rope)
        lengths = [rope.original_length for rope in ropes if rope is not None and rope.scaling == "dynamic"]
        return min(lengths, default=None)

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of `layer` is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a decoder. `None` means: decided from the checkpoint and the machine, at start.

    kv_cache_tokens: how many tokens' keys and values the cache holds, over all requests.
    max_num_batched_tokens: the token budget of one step; a long prompt delays others by at most one such chunk.
    speculative_tokens: how many tokens to guess ahead (0: none), while at most `speculation_max_seqs` requests run.
    deterministic: fixed shapes in every product and sum, so that a request's tokens depend, to the last bit, neither on
        its batch nor on chunks, preemption or prefix hits. It costs speed, except with native kernels, which are so
        anyway.
    overlap: launch a step before the host has read what the one before it gave; None: on a GPU.
    cuda_graphs: capture decode steps at the start and replay them; None: on a GPU, where the model can be captured.
    processes_per_machine: of engines, which share its memory where `kv_cache_tokens` is left open on the CPU.
    gpu_memory_utilization: the part of a GPU's memory that weights, steps and cache may take together; None: 0.9.
    kv_cache_dtype: `auto`: as the kernels like it; in half of bf16's bytes, `fp8` (e4m3) for Triton's kernels, and
        `int8`, with a scale for each key and each value, for native ones.
    kernels: what computes a step: `native` (on the CPU, in bf16 or int8), `triton` (on a GPU), `torch`, or whichever is
        faster and possible.
    """

    dtype: Dtype = "auto"
    device: Device = "auto"
    block_size: int = 16
    kv_cache_tokens: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    prefix_cache: bool = True
    speculative_tokens: int = 0
    speculation_max_seqs: int = 8
    deterministic: bool = False
    num_threads: int | None = None
    processes_per_machine: int = 1
    overlap: bool | None = None
    cuda_graphs: bool | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: CacheDtype = "auto"
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        _check_choice("kernels", self.kernels, Kernels)
        _check_choice("kv_cache_dtype", self.kv_cache_dtype, CacheDtype)
        _check_choice("dtype", self.dtype, Dtype)
        _check_choice("device", self.device, Device)
        self._check_int8_cache()
        if self.speculative_tokens < 0:
            raise ConfigError(f"speculative_tokens must not be negative, as {self.speculative_tokens} is")
        shapes = ("block_size", "max_num_seqs", "max_num_batched_tokens", "speculation_max_seqs")
        for name in (*shapes, "kv_cache_tokens", "max_model_len", "num_threads", "processes_per_machine"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        self._check_gpu_memory()
        if self.overlap and self.speculative_tokens:
            raise ConfigError("overlap and speculative_tokens exclude each other: guesses need tokens that were read")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running request computes one token a step"
            )

    def _check_gpu_memory(self) -> None:
        share = self.gpu_memory_utilization
        if share is None:
            return
        if not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization must lie in (0, 1], not {share}")
        if self.kv_cache_tokens is not None:
            raise ConfigError("gpu_memory_utilization and kv_cache_tokens both say how large the cache is: give one")

    def _check_int8_cache(self) -> None:
        if self.kv_cache_dtype != "int8":
            return
        for name, value in (("dtype", "fp32"), ("device", "cuda"), ("kernels", "torch"), ("kernels", "triton")):
            if getattr(self, name) == value:
                raise ConfigError(
                    f"kv_cache_dtype 'int8' is for native kernels, on the CPU in bf16 or int8, "
                    f"and {name} is {value!r}; leave one of them out"
                )

    def overlaps(self, device: str) -> bool:
        """Whether steps overlap on a device of this type."""
        return device == "cuda" if self.overlap is None else self.overlap

"""What a decoder is and how an engine runs it: two frozen records, validated once, when they are made."""

from dataclasses import dataclass
from typing import Literal, get_args

from model.errors import ConfigError

Dtype = Literal["auto", "fp32", "bf16", "int8"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder. Variations between families are fields here, never classes.

    Raises `ConfigError` for a shape that cannot be computed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        for name in (*sizes, "max_position_embeddings"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name in ("rope_theta", "rms_norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)!r}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary positions, not {self.head_dim}")
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_ids", self.eos_token_ids)):
            for token_id in ids:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ConfigError(f"{name} {token_id} lies outside the vocabulary of {self.vocab_size}")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (grouped-query attention; Ainslie et al. 2023)."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine runs a decoder. `None` means: decided from the checkpoint and the machine, at start.

    kv_cache_tokens: how many tokens' keys and values the cache holds, over all requests.
    max_num_batched_tokens: the token budget of one step; a long prompt delays others by at most one such chunk.
    speculative_tokens: how many tokens to guess ahead (0: none), while at most `speculation_max_seqs` requests run.
    deterministic: fixed shapes in every product and sum, so that a request's tokens depend, to the last bit, neither on
        its batch nor on chunks, preemption or prefix hits. It costs speed.
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

    def __post_init__(self) -> None:
        if self.dtype not in get_args(Dtype):
            raise ConfigError(f"dtype must be one of {', '.join(get_args(Dtype))}, not {self.dtype!r}")
        if self.device not in get_args(Device):
            raise ConfigError(f"device must be one of {', '.join(get_args(Device))}, not {self.device!r}")
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "speculation_max_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.speculative_tokens < 0:
            raise ConfigError(f"speculative_tokens must not be negative, as {self.speculative_tokens} is")
        for name in ("kv_cache_tokens", "max_model_len", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running request computes one token a step"
            )

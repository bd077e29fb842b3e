"""What a request asks of the sampler, and when it is to stop."""

from dataclasses import dataclass

from model.errors import InvalidRequest

MAX_TOP_K = 1 << 31


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """One request's sampling, validated when made. Raises `InvalidRequest` naming the field.

    temperature: 0 is greedy; top_k: 0 keeps all; top_p: 1 keeps all.
    seed: with the token's position it is the whole source of randomness, so a request gives the same tokens alone, in
        a batch, preempted, or resumed elsewhere.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, not {self.max_tokens}", param="max_tokens")
        if not 0.0 <= self.temperature <= 2.0:
            raise InvalidRequest(f"temperature must lie in [0, 2], not {self.temperature}", param="temperature")
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(f"top_p must lie in (0, 1], not {self.top_p}", param="top_p")
        if not 0 <= self.top_k < MAX_TOP_K:
            raise InvalidRequest(f"top_k must lie in [0, 2^31), not {self.top_k}", param="top_k")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise InvalidRequest(f"seed must be a signed 64-bit number, not {self.seed}", param="seed")

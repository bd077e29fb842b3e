"""The one mutable state of a request, and what the engine says about it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from model.cache.prefix import ROOT, chain
from model.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "error"]


class TokenOutput(NamedTuple):
    """What one step gave one request.

    finish_reason: None while more is to come; then `stop` (an end-of-sequence token, the last of `token_ids`),
        `length` (max_tokens reached) or `error` (the step failed; the service's log says why).
    num_cached_tokens: prompt tokens that came from the prefix cache.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    num_cached_tokens: int


class Request:
    """Token ids in, token ids out. A single cursor, `num_computed_tokens`, says how far the cache has come.

    output_ids: tokens that this request has already produced elsewhere; it goes on behind them as if it had never
        moved. They count towards `max_tokens`.
    """

    __slots__ = (
        "block_hashes",
        "block_table",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "params",
        "request_id",
        "token_ids",
    )

    def __init__(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, output_ids: Sequence[int] = ()
    ) -> None:
        self.request_id = request_id
        self.params = params
        self.num_prompt_tokens = len(prompt_ids)
        self.token_ids = [*prompt_ids, *output_ids]
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, here or elsewhere."""
        return len(self.token_ids) - self.num_prompt_tokens

    def hash_blocks(self, count: int, block_size: int) -> list[bytes]:
        """The hashes of the first `count` blocks, all of them full. Each is computed once."""
        while len(self.block_hashes) < count:
            start = len(self.block_hashes) * block_size
            parent = self.block_hashes[-1] if self.block_hashes else ROOT
            self.block_hashes.append(chain(parent, self.token_ids[start : start + block_size]))
        return self.block_hashes[:count]

"""What sampling gives back. No torch here: the scheduler reads it."""

from collections.abc import Sequence
from typing import NamedTuple

from model.attention.weights import TokenAttention


class TokenLogprobs(NamedTuple):
    """One token: its log-probability, and the likeliest tokens at its place with theirs, likeliest first."""

    logprob: float
    top: list[tuple[int, float]]


class Sampled(NamedTuple):
    """One entry a row of logits.

    token_ids: None for a row whose logits were not numbers, or forbade every token.
    logprobs, attention: None where no row asked for any; an entry is None where its row did not.
    """

    token_ids: Sequence[int | None]
    logprobs: Sequence[TokenLogprobs | None] | None = None
    attention: Sequence[TokenAttention | None] | None = None


NOTHING = Sampled(())

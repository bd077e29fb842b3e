"""What a request may ask to see of its attention, and what it is shown. No torch here: the ingress reads this, too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from model.errors import InvalidRequest


@dataclass(frozen=True)
class AttentionRequest:
    """Show where these heads of these layers look when a token is chosen: each of `heads` in each of `layers`.

    top_k: the positions with the largest weights, so many for each head; None: every position.
    """

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    top_k: int | None = None

    def check(self, num_layers: int, num_heads: int) -> None:
        """Raise `InvalidRequest` for what a decoder of this size does not have."""
        _check_indices("layers", self.layers, num_layers)
        _check_indices("heads", self.heads, num_heads)
        if self.top_k is not None and self.top_k < 1:
            raise InvalidRequest(f"attention.top_k must be at least 1, not {self.top_k}", param="attention.top_k")


class HeadWeights(NamedTuple):
    """The softmax weights of one head for one token, heaviest first; or, where all were asked for, by position.

    A head with a learned sink weighs less than 1 in all; positions beyond a window weigh 0 and are not among the
    heaviest.
    """

    layer: int
    head: int
    positions: list[int]
    weights: list[float]


# One token's: each head of each layer that was asked for, in the order asked.
TokenAttention = list[HeadWeights]


def _check_indices(name: str, indices: Sequence[int], count: int) -> None:
    param = f"attention.{name}"
    if not indices:
        raise InvalidRequest(f"{param} names none: at least one is needed", param=param)
    if len(set(indices)) < len(indices):
        raise InvalidRequest(f"{param} names one of them twice", param=param)
    if not 0 <= min(indices) <= max(indices) < count:
        raise InvalidRequest(f"{param} must lie in [0, {count}): this model has {count} {name}", param=param)

"""Attention weights as an answer tells them: for each new token, where the heads asked about looked to choose it."""

from collections.abc import Iterable
from typing import Any

from service.completion import Look

DIGITS = 6  # of a weight: beyond them is noise


def attention_of(looks: Iterable[Look]) -> list[dict[str, Any]]:
    """One entry a token. Positions count the prompt's tokens from 0, and go on with the completion's."""
    return [
        {
            "token_id": token_id,
            "heads": [
                {
                    "layer": layer,
                    "head": head,
                    "positions": positions,
                    "weights": [round(weight, DIGITS) for weight in weights],
                }
                for layer, head, positions, weights in heads
            ],
        }
        for token_id, heads in looks
    ]

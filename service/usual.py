"""How long answers become whose clients set no limit, so that they are not counted as if each filled the context.

A chat without `max_tokens` may take all that the context has room for, and hardly any does. Counted so, a queue would
be called full at a quarter of its places, and a key's tokens of a minute would be gone after a few requests.
"""

# Before anything was measured: this part of the context. It counts as one answer.
FIRST_SHARE = 8
MEMORY = 0.98  # what an answer leaves of those before it


class UsualLength:
    """A running mean over the last fifty answers or so, as one ingress has seen them."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._answers = 0.0

    def observe(self, num_tokens: int) -> None:
        """An answer without a limit is over, with so many tokens, by itself or because its client left."""
        self._tokens = MEMORY * self._tokens + num_tokens
        self._answers = MEMORY * self._answers + 1

    def tokens(self, max_model_len: int) -> int:
        """To reckon with for the next one, at least 1."""
        return max(1, round((max_model_len / FIRST_SHARE + self._tokens) / (1 + self._answers)))

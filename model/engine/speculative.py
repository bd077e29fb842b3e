"""Guesses the next tokens of a request from its own text, for one step to verify (prompt lookup decoding).

Verification costs no distribution: the token at each position is drawn with that position's own number, as it would
have been without a guess, and a guess counts only where it equals the drawn token. So the tokens are the same with and
without speculation, greedy or sampled; only the number of steps differs.
"""

from collections.abc import Sequence

from model.engine.request import Request

NGRAM = 3  # so many last tokens must have stood together before
# What a request's guesses have earned. A right one earns three times what a wrong one costs, so guessing pays from one
# right in four; a request without credit still guesses in silence, and a right guess brings it back.
INITIAL_CREDIT = 16
MAX_CREDIT = 64
RIGHT, WRONG = 3, -1


class NgramDrafter:
    """Proposes what followed the last three tokens where they last stood in the request's prompt or output."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def begin(self, request: Request) -> None:
        """The request joins the running ones."""
        request.draft_credit = INITIAL_CREDIT
        request.draft_index.clear()
        request.draft_ids = []
        for end in range(NGRAM, request.num_tokens):
            self._remember(request, end)

    def propose(self, request: Request, taken: Sequence[int]) -> None:
        """Judge the last guess by the tokens that came instead, and set `draft_ids` to the next one."""
        right = sum(guess == token_id for guess, token_id in zip(request.draft_ids, taken, strict=False))
        wrong = min(len(request.draft_ids), len(taken)) - right
        request.draft_credit = min(max(request.draft_credit + RIGHT * right + WRONG * wrong, 0), MAX_CREDIT)
        for end in range(max(request.num_tokens - len(taken), NGRAM), request.num_tokens):
            self._remember(request, end)
        follows = request.draft_index.get(tuple(request.token_ids[-NGRAM:]))
        # The last of max_tokens needs no guess beyond it.
        room = min(self.num_tokens, request.params.max_tokens - request.num_output_tokens - 1)
        request.draft_ids = [] if follows is None else _go_on(request.token_ids, follows, room)

    def _remember(self, request: Request, end: int) -> None:
        request.draft_index[tuple(request.token_ids[end - NGRAM : end])] = end


def _go_on(token_ids: Sequence[int], follows: int, count: int) -> list[int]:
    """What stands at `follows` and behind it; past the end, over again: text in a loop is guessed at full length."""
    period = len(token_ids) - follows
    return [token_ids[follows + i % period] for i in range(count)]

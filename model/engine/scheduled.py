"""What one step computes: the scheduler's word to all who carry it out. Pure Python."""

from typing import NamedTuple

from model.engine.request import Request


class ScheduledRequest(NamedTuple):
    """Tokens [start, start + num_tokens) of a request are computed in this step.

    draft_ids: guesses that follow the known tokens, the last of `num_tokens`.
    num_samples: tokens that the step gives: none where the known tokens are not all computed yet, else one, and one
        more for each guess.
    epoch: the request's when it was scheduled.
    """

    request: Request
    start: int
    num_tokens: int
    draft_ids: tuple[int, ...]
    num_samples: int
    epoch: int

    @property
    def is_unread(self) -> bool:
        """Whether its one token is that which the step before samples: the host does not know it yet."""
        return self.start >= self.request.num_tokens


class ScheduledStep(NamedTuple):
    """What one step computes. Immutable: it is read by the runner while nothing else may change."""

    requests: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes, over all requests."""
        return sum(scheduled.num_tokens for scheduled in self.requests)

    @property
    def is_read_at_once(self) -> bool:
        """Whether nothing may be scheduled before its results are taken in."""
        return any(scheduled.request.is_read_at_once for scheduled in self.requests)

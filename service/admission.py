"""Whether an engine replica takes more work: a queue bounded in requests and in tokens, and honest about its length.

Work is counted when somebody asks to be let in, from the engine's own requests, so a token costs nothing here. What a
request still needs is its worst case, as it may end before its `max_tokens`; of one that set no limit, it is what such
requests need in the mean (`service.usual`), since their worst case is a whole context. The throughput is measured:
prompt and output tokens computed in a second of stepping, over the last hundred steps or so.
"""

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from service.channel import Occupancy, Share, Submission, Work

if TYPE_CHECKING:
    from model.engine.request import Request

MEMORY = 0.99  # what a step leaves of the measurement before it
MAX_RETRY_AFTER_S = 600

Reason = Literal["requests", "tokens", "deadline", "grammars"]


class Refusal(NamedTuple):
    """Why not now, in a word and in a sentence, and after how many whole seconds it is worth another try."""

    reason: Reason
    message: str
    retry_after_s: int


class Admission:
    """max_running: requests that compute at once; max_requests: those and the waiting; max_tokens: what all of them
    may still need together. A replica that has nothing to do takes one request of any size.
    """

    @classmethod
    def sized(cls, max_running: int, max_model_len: int, max_waiting: int, max_tokens: int | None = None) -> Self:
        """Where `max_tokens` is left open, a quarter of what as many requests of full length would need. Usual ones
        fill the places before; long prompts, and limits that are set so high, meet it.
        """
        max_requests = max_running + max_waiting
        return cls(max_running, max_requests, max_tokens or max_requests * max_model_len // 4)

    def __init__(self, max_running: int, max_requests: int, max_tokens: int) -> None:
        self._max_running = max_running
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._tokens = 0.0
        self._seconds = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Measure one step. Called in the engine's thread."""
        self._tokens = self._tokens * MEMORY + num_tokens
        self._seconds = self._seconds * MEMORY + seconds

    @property
    def tokens_per_second(self) -> float:
        """As measured; 0 before the first step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def occupancy(self, unfinished: Collection["Request"], num_compiling: int) -> Occupancy:
        """How full it is here. num_compiling: requests that were taken, and wait for their grammars before they reach
        the engine.
        """
        held = backlog(unfinished)
        num_open = len(unfinished) + num_compiling
        return Occupancy(num_open, self._max_requests, held, self._max_tokens, _whole_seconds(self._seconds_for(held)))

    def refusal(
        self, occupancy: Occupancy, unfinished: Collection["Request"], submissions: Sequence[Submission]
    ) -> Refusal | None:
        """What speaks against taking `submissions` now, beside what is there. None for continuations: their clients
        have been let in.
        """
        if not submissions or all(submission.resumed for submission in submissions):
            return None
        need = Share(len(submissions), sum(needed_tokens(submission.work) for submission in submissions))
        return objection(occupancy, need) or self._too_late(unfinished, submissions)

    def _too_late(self, unfinished: Collection["Request"], submissions: Sequence[Submission]) -> Refusal | None:
        """A deadline that will pass in the queue is refused at once: its client may ask elsewhere."""
        work, seconds_left = submissions[0].work, submissions[0].seconds_left
        if seconds_left is None or len(unfinished) < self._max_running:
            return None
        ahead = [request for request in unfinished if not request.num_computed_tokens]
        wait = self._seconds_for(backlog([request for request in ahead if request.priority <= work.priority]))
        if wait <= seconds_left:
            return None
        message = f"{len(ahead)} requests wait, for about {wait:.1f} s; the deadline passes in {seconds_left:.1f} s"
        return Refusal("deadline", message, _whole_seconds(wait - seconds_left))

    def _seconds_for(self, num_tokens: int) -> float:
        return num_tokens * self._seconds / self._tokens if self._tokens else 0.0


def objection(occupancy: Occupancy, need: Share) -> Refusal | None:
    """What speaks against taking so much more. A replica that has nothing to do takes one request of any size."""
    held, most = occupancy.num_tokens, occupancy.max_tokens
    if occupancy.num_requests + need.num_requests > occupancy.max_requests:
        message = f"{occupancy.num_requests} requests are running or waiting; {occupancy.max_requests} may"
        return Refusal("requests", message, occupancy.drain_seconds)
    if occupancy.num_requests > 0 and held + need.num_tokens > most:
        message = (
            f"the requests that are running or waiting may need {held} tokens, and this one {need.num_tokens}; "
            f"{most} may be outstanding"
        )
        return Refusal("tokens", message, occupancy.drain_seconds)
    return None


def backlog(unfinished: Collection["Request"]) -> int:
    """Tokens that these requests may still need. Their counts are the engine's and may be a step old."""
    return sum(map(remaining_tokens, unfinished))


def remaining_tokens(request: "Request") -> int:
    """What is left of one request: of its prompt, which a sibling takes from its leader, and of its output."""
    return _of_prompt(request) + request.params.tokens_left(request.num_output_tokens)


def unprefilled(unfinished: Collection["Request"]) -> int:
    """Prompt tokens that these requests have yet to compute, as far as they are known not to be cached."""
    return sum(map(_of_prompt, unfinished))


def _of_prompt(request: "Request") -> int:
    return 0 if request.leader else max(0, request.num_prompt_tokens - request.num_computed_tokens)


def needed_tokens(work: Work) -> int:
    """What a new request may need."""
    return len(work.prompt_ids) + work.params.tokens_left(0)


def _whole_seconds(seconds: float) -> int:
    return min(max(1, math.ceil(seconds)), MAX_RETRY_AFTER_S)

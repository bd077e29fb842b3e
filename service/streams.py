"""One engine request as its ingress sees it: where it runs, the journal of what it has said, and who listens."""

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from service.affinity import Visit
from service.channel import Details, Submission, Work
from service.errors import DeadlineExceeded, ServiceError
from service.telemetry import NO_TRAIL, Trail


class Piece(NamedTuple):
    """What one channel item held for one choice. An `error` ends the choice instead of a finish reason."""

    choice: int
    token_ids: list[int]
    finish_reason: str | None
    num_cached_tokens: int
    details: Details | None = None
    error: ServiceError | None = None


class Stream:
    """A journal and its way back to the client. It may move from replica to replica; the client does not see it.

    call_id: shared by the choices of one HTTP request, which move together. replica_id, session: who has accepted the
    current attempt, if anybody has, and where its tokens come. resumes: how often it has moved; failures: how often
    because its replica failed.
    """

    def __init__(
        self,
        call_id: str,
        choice: int,
        work: Work,
        deadline: float | None,
        timed: bool,
        trail: Trail,
        tell: Callable[[Piece], None],
    ) -> None:
        self.call_id = call_id
        self.work = work
        self.journal: list[int] = []
        self.resumes = 0
        self.failures = 0
        self.replica_id: str | None = None
        self.visit: Visit | None = None  # of the current attempt, if it leads its prompt's choices
        self.session = -1
        self.wanted = True
        self._choice = choice
        self._deadline = deadline
        self._timed = timed
        self._trail = trail
        self._tell = tell
        self._attempt = 0

    @property
    def request_id(self) -> str:
        """The engine's name for the current attempt: late tokens of an earlier one match no stream and are dropped."""
        return f"{self.call_id}-{self._choice}-{self._attempt}"

    @property
    def outstanding_tokens(self) -> int:
        """What it may still need of an engine: of its prompt, as far as we know, and of its output."""
        prompt = 0 if self.journal else len(self.work.prompt_ids)
        return prompt + self.work.params.tokens_left(len(self.journal))

    def new_attempt(self) -> Submission:
        """The request as it stands; after a replica's death, with what was already said."""
        self._attempt += 1
        self.replica_id = self.visit = None
        left = None if self._deadline is None else self._deadline - time.monotonic()
        return Submission(
            self.request_id, self.work, list(self.journal), self.resumes > 0, left, self._timed, self._trail
        )

    def note(self, token_ids: list[int]) -> int:
        """Journal a step's tokens. How many fewer it may need of an engine now."""
        before = self.outstanding_tokens
        self.journal.extend(token_ids)
        return before - self.outstanding_tokens

    def tell(
        self, token_ids: list[int], finish_reason: str | None, num_cached_tokens: int, details: Details | None
    ) -> None:
        """Pass on a step's tokens, which are in the journal."""
        if finish_reason == "error":
            self.fail(ServiceError("the engine failed on this request"))
        elif finish_reason == "deadline":
            self.fail(DeadlineExceeded())
        else:
            self._tell(Piece(self._choice, token_ids, finish_reason, num_cached_tokens, details))

    def fail(self, error: ServiceError) -> None:
        """End the choice with an error."""
        self._tell(Piece(self._choice, [], None, 0, error=error))

    def mute(self) -> None:
        """Nobody listens any more."""
        self._tell = _to_nobody


class Generation:
    """The streams of one HTTP request, and the queue in which their pieces meet. One stream is one choice.

    Its streams lead back to it, and so does whoever listens for an overrun: close it, and nothing keeps it.
    deadline: on `time.monotonic`'s clock. max_unread_tokens: of each choice; whoever does not take them in time is
    given up, with an error behind the last tokens, and `on_overrun` called, once. timed: the replicas keep a receipt.
    trail: for their logs and traces.
    """

    def __init__(
        self,
        works: Sequence[Work],
        *,
        deadline: float | None = None,
        max_unread_tokens: int | None = None,
        timed: bool = False,
        trail: Trail = NO_TRAIL,
    ) -> None:
        self.on_overrun: list[Callable[[], object]] = []
        self.is_overrun = False
        call_id = uuid.uuid4().hex
        self.streams = [Stream(call_id, i, work, deadline, timed, trail, self._put) for i, work in enumerate(works)]
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._unread = 0
        self._max_unread = math.inf if max_unread_tokens is None else max_unread_tokens * len(works)

    async def next(self) -> list[Piece]:
        """Wait for at least one piece and take all there are."""
        pieces = [await self._pieces.get()]
        while not self._pieces.empty():
            pieces.append(self._pieces.get_nowait())
        self._unread = 0
        return pieces

    def close(self) -> None:
        """Nobody takes its pieces any more."""
        self.on_overrun.clear()
        for stream in self.streams:
            stream.mute()

    def _put(self, piece: Piece) -> None:
        self._pieces.put_nowait(piece)
        self._unread += len(piece.token_ids)
        if self._unread > self._max_unread and not self.is_overrun:
            self.is_overrun = True
            self._pieces.put_nowait(piece._replace(token_ids=[], finish_reason=None, details=None, error=_overrun()))
            for callback in self.on_overrun:
                callback()


def _overrun() -> ServiceError:
    return ServiceError("the tokens of this answer were not taken for too long, so it was given up")


def _to_nobody(piece: Piece) -> None:
    """Where the pieces go of a stream to which nobody listens."""

"""The channel between one ingress and one engine replica: what crosses the Ray hop, and the replica's end of it.

A Ray hop costs by the item, not by the token. So an ingress opens one streaming call to each replica that works for
it, and everything that a step produced for that ingress crosses as one item. Submitting and aborting are small unary
calls beside it. The end of the channel tells either side that the other is gone; while it lives, it beats.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

from model.attention.weights import AttentionRequest, TokenAttention
from model.sampling.params import GrammarSpec, SamplingParams
from model.sampling.result import TokenLogprobs
from service.telemetry import NO_TRAIL, Trail

if TYPE_CHECKING:
    from model.engine.request import TokenOutput

# Both ends look after one another once in a turn. A channel that has nothing to carry beats every BEAT_TURNS.
TURN_S = 0.25
BEAT_TURNS = 2
# An ingress pings once a second. One that has been silent for 6 s is gone: when an ingress is killed, Ray lets its open
# calls run on.
SILENT_INGRESS_TURNS = 24
# Serve's controller asks a replica for its health once a second, until the replica is to go. Then Serve lets no more
# pings through to it, either, so silence means nothing. (Nor does it while the controller itself is away.)
UNASKED_TURNS = 12
# Outputs that an ingress has not told us it has: some 20 MB, and seconds of the fastest engine's work.
MAX_UNREAD = 65_536
# Ray keeps some 40 bytes of each item of a streaming call at both of its ends until the call ends. A channel lasts for
# days, at a hundred items a second; so after this many another call carries it on.
ITEMS_A_CALL = 20_000


class Details(NamedTuple):
    """What comes beside new tokens, for those who ask.

    logprobs, attention: one entry for each new token. prompt_logprobs: with the first of them, one for each prompt
    token; the first prompt token has none: nothing comes before it. engine_seconds: with the last of them, unasked:
    how long the engine had the request.
    """

    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None
    attention: list[TokenAttention] | None
    engine_seconds: float | None = None

    @classmethod
    def of(cls, output: "TokenOutput", engine_seconds: float | None) -> Self | None:
        """None where there is nothing to tell."""
        told = output.logprobs, output.prompt_logprobs, output.attention, engine_seconds
        return None if told == (None,) * 4 else cls(*told)


# request_id, new token ids, finish reason or None, prompt tokens found in the cache, details. A plain tuple: it is
# pickled once for every request in every step.
Output = tuple[str, list[int], str | None, int, Details | None]


class Work(NamedTuple):
    """What one engine request is to do, whichever replica does it and however often it moves.

    priority: lower goes first; cache_salt: prefixes are shared only between requests of one salt; session: requests of
    one go to one replica, empty for none.
    """

    prompt_ids: list[int]
    params: SamplingParams
    grammar: GrammarSpec | None = None
    priority: int = 0
    cache_salt: str = ""
    attention: AttentionRequest | None = None
    session: str = ""


class Submission(NamedTuple):
    """One engine request on its way to a replica.

    `output_ids` are tokens already emitted by a replica that died; `resumed` says that this is such a continuation,
    which is never refused for load: the client was already admitted. `seconds_left` until the client's deadline, if it
    has one: not a point in time, since clocks differ between machines. `timed`: the replica keeps a receipt.
    `trail`: for its logs and traces.
    """

    request_id: str
    work: Work
    output_ids: list[int]
    resumed: bool
    seconds_left: float | None = None
    timed: bool = False
    trail: Trail = NO_TRAIL


class Share(NamedTuple):
    """A part of what a replica has to do: requests, and the tokens that they may still need together."""

    num_requests: int = 0
    num_tokens: int = 0


class Occupancy(NamedTuple):
    """How full a replica is: requests running and waiting, and the tokens they may need, for about drain_seconds.

    With an answer to `submit`, what was asked for is in it if it was taken.
    """

    num_requests: int
    max_requests: int
    num_tokens: int
    max_tokens: int
    drain_seconds: int

    def plus(self, more: Share) -> Self:
        """The same with so much more to do."""
        num_requests, num_tokens = self.num_requests + more.num_requests, self.num_tokens + more.num_tokens
        return self._replace(num_requests=num_requests, num_tokens=num_tokens)


class Accepted(NamedTuple):
    """All submissions of the call are in the engine of this replica; their outputs go to this session of the channel.

    A replica begins a new session when it has given the last one up. So an ingress never waits at a channel for
    requests that were aborted with an earlier one.
    """

    replica_id: str
    session: int = 0
    occupancy: Occupancy | None = None


@dataclass(frozen=True)
class Refused:
    """None of the submissions was taken, and why.

    A value, not an exception: it crosses the hop whole, and Serve logs no traceback for a client's mistake.
    `kind`: "invalid" (never can be served), "overloaded" (not now), "failed" (this replica's engine is dead or stuck).
    """

    replica_id: str
    kind: Literal["invalid", "overloaded", "failed"]
    message: str
    param: str | None = None
    retry_after_s: int = 1
    occupancy: Occupancy | None = None


class EngineInfo(NamedTuple):
    """What an ingress must know of the engine to refuse at the door, and to guess what its cache still holds.

    capacity: requests running and waiting.
    """

    max_model_len: int
    capacity: int
    kv_cache_tokens: int


class Outbox:
    """The replica's end of one session of a channel: outputs wait here, in order, until the ingress takes them.

    Lives on the replica's event loop; nothing here is thread-safe. request_ids: whose outputs come here.
    """

    def __init__(self, channel_id: str = "", session: int = 0) -> None:
        self.channel_id = channel_id
        self.session = session
        self.request_ids: set[str] = set()
        self.is_closed = False
        self.idle_turns = 0
        self._outputs: list[Output] = []
        self._ready = asyncio.Event()
        self._call = 0
        self._num_taken = 0
        self._num_read = 0
        self._quiet_turns = 0

    def is_forsaken(self, *, hears_pings: bool) -> bool:
        """Whether the ingress has gone, or does not take what is there for it. Ray's buffers count: they are ours.

        Where no ping comes through, only a session with nothing left to do is over.
        """
        if not hears_pings:
            return self.idle_turns > SILENT_INGRESS_TURNS
        num_unread = len(self._outputs) + self._num_taken - self._num_read
        return self._quiet_turns > SILENT_INGRESS_TURNS or num_unread > MAX_UNREAD

    def put(self, outputs: Iterable[Output]) -> None:
        """Add a step's outputs; whoever waits in `take` gets all that has gathered."""
        self._outputs.extend(outputs)
        self._ready.set()

    def heard(self, num_read: int) -> None:
        """The ingress lives, and has this many outputs."""
        self._quiet_turns = 0
        self._num_read = num_read

    def turn(self, *, beat: bool) -> None:
        """Some time has passed. With `beat`, whoever waits in `take` gets something, be it nothing."""
        self._quiet_turns += 1
        self.idle_turns = 0 if self.request_ids else self.idle_turns + 1
        if beat:
            self._ready.set()

    def close(self, *, discard: bool = False) -> None:
        """End the session, once what it holds has been taken, or without that."""
        self.is_closed = True
        if discard:
            self._outputs = []
        self._ready.set()

    def answer(self) -> int:
        """Another call takes what comes from now on; its number. The one before finds its end."""
        self._call += 1
        if self._call > 1:
            self._ready.set()
        return self._call

    def is_answered_by(self, call: int) -> bool:
        """Whether no later call has come for this session."""
        return call == self._call

    async def take(self, call: int = 0) -> list[Output] | None:
        """Wait for outputs and take all of them: none for a beat, None at the end of the session or of the call."""
        await self._ready.wait()
        if not self.is_answered_by(call) or (self.is_closed and not self._outputs):
            return None
        taken, self._outputs = self._outputs, []
        self._num_taken += len(taken)
        if not self.is_closed:
            self._ready.clear()
        return taken

"""The streams that are open, and what they tell of the replicas: how much of their work is ours, and what they hold.

Each request asks for both before it is submitted. So the sums are kept as streams come, move and end, and nobody walks
the streams of all others to submit one more.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

from service.affinity import Prefix, PrefixIndex, Visit
from service.balance import RouteHint
from service.channel import Accepted, Output, Share
from service.streams import Stream

CUT_OFF = ("deadline", "error")  # finish reasons that come unasked at any time
Leader = tuple[Stream, Prefix]  # the first stream of a prompt, and what it asks a cache for


class _Load:
    """Of ours, at one replica: streams, tokens they may still need, and tokens of prompts that are to be computed."""

    __slots__ = ("num_streams", "num_tokens", "num_uncached")

    def __init__(self) -> None:
        self.num_streams = self.num_tokens = self.num_uncached = 0


class OpenStreams:
    """Who waits for tokens, from before the submission to the end, by the engine's names for the requests.

    prefixes: what the replicas' caches are believed to hold.
    """

    def __init__(self) -> None:
        self.prefixes = PrefixIndex()
        self._streams: dict[str, Stream] = {}
        self._loads: defaultdict[str | None, _Load] = defaultdict(_Load)  # None: not answered yet

    def add(self, streams: Sequence[Stream]) -> None:
        """These are about to be sent to whoever takes them."""
        for stream in streams:
            self._streams[stream.request_id] = stream
            self._count(stream, 1)

    def accepted(self, streams: Sequence[Stream], leaders: Sequence[Leader], answer: Accepted) -> None:
        """A replica has taken these. What it said before its answer came has been received, and some may have ended."""
        is_open = [stream.request_id in self._streams for stream in streams]
        for stream, counts in zip(streams, is_open, strict=True):
            if counts:
                self._count(stream, -1)
            stream.replica_id, stream.session = answer.replica_id, answer.session
        for stream, prefix in leaders:
            if stream.request_id in self._streams:
                stream.visit = self.prefixes.sent(answer.replica_id, prefix)
        for stream, counts in zip(streams, is_open, strict=True):
            if counts:
                self._count(stream, 1)

    def receive(self, output: Output) -> None:
        """Hand on what a replica said. Nobody may wait for it: an attempt that was given up, or aborted."""
        request_id, token_ids, finish_reason, num_cached_tokens, details = output
        stream = self._streams.get(request_id)
        if stream is None:
            return
        visit = stream.visit
        if finish_reason is not None:
            del self._streams[request_id]
            self._count(stream, -1)
            stream.note(token_ids)
            if visit is not None:
                self._learn(stream, visit, finish_reason, num_cached_tokens)
        else:  # once for every stream in every step
            load = self._loads[stream.replica_id]
            load.num_tokens -= stream.note(token_ids)
            if visit is not None and visit.uncached:
                load.num_uncached -= visit.uncached
                self.prefixes.heard(visit, num_cached_tokens)
        stream.tell(token_ids, finish_reason, num_cached_tokens, details)

    def remove(self, streams: Sequence[Stream]) -> dict[str | None, list[str]]:
        """Nobody waits for these any more: those that were open, by the replica that has them."""
        removed: dict[str | None, list[str]] = {}
        for stream in streams:
            if self._streams.pop(stream.request_id, None) is not None:
                self._count(stream, -1)
                if stream.visit is not None and stream.visit.uncached:
                    self.prefixes.withdrawn(stream.visit)
                removed.setdefault(stream.replica_id, []).append(stream.request_id)
        return removed

    def of_session(self, replica_id: str, session: int) -> list[list[Stream]]:
        """What is open on one session of a channel. The choices of a request are together."""
        calls: dict[str, list[Stream]] = {}
        for stream in self._streams.values():
            if (stream.replica_id, stream.session) == (replica_id, session):
                calls.setdefault(stream.call_id, []).append(stream)
        return list(calls.values())

    def may_be_at(self, replica_id: str) -> bool:
        """Whether a replica has one, or may have: one that nobody has answered for yet."""
        return replica_id in self._loads or None in self._loads

    def share(self, replica_id: str) -> Share:
        """What of a replica's work is ours."""
        return self.shares().get(replica_id, Share())

    def shares(self) -> dict[str | None, Share]:
        """What of each replica's work is ours. Under None: what has been sent, and not answered yet."""
        return {replica_id: Share(load.num_streams, load.num_tokens) for replica_id, load in self._loads.items()}

    def hint(self, leaders: Sequence[Leader], avoid: frozenset[str]) -> RouteHint:
        """What we know that bears on where these should go."""
        cached: Counter[str] = Counter()
        for _, prefix in leaders:
            cached.update(self.prefixes.match(prefix))
        known = {replica_id: load for replica_id, load in self._loads.items() if replica_id is not None}
        return RouteHint(
            num_tokens=sum(prefix.num_tokens for _, prefix in leaders),
            cached=cached,
            pending={replica_id: load.num_uncached for replica_id, load in known.items()},
            open_streams={replica_id: load.num_streams for replica_id, load in known.items()},
            avoid=avoid,
            session=leaders[0][0].work.session if leaders else "",
        )

    def _learn(self, stream: Stream, visit: Visit, finish_reason: str, num_cached_tokens: int) -> None:
        """What a stream that is over has left in its replica's cache. One that was cut off before its first token may
        never have been computed: that nothing was found for it says nothing of the cache.
        """
        if visit.uncached and finish_reason in CUT_OFF:
            self.prefixes.withdrawn(visit)
            return
        if visit.uncached:
            self.prefixes.heard(visit, num_cached_tokens)
        known = visit.prefix.num_tokens - len(stream.work.prompt_ids)
        self.prefixes.ended(visit, stream.journal[known:])

    def _count(self, stream: Stream, sign: int) -> None:
        """Count a stream as it is now, or no longer: around each of its changes."""
        load = self._loads[stream.replica_id]
        load.num_streams += sign
        load.num_tokens += sign * stream.outstanding_tokens
        load.num_uncached += sign * (0 if stream.visit is None else stream.visit.uncached)
        if not load.num_streams:
            del self._loads[stream.replica_id]


def leaders_of(streams: Sequence[Stream]) -> list[Leader]:
    """The first stream of each prompt; the other choices take what it computes from it."""
    leaders: dict[tuple[int, ...], Stream] = {}
    for stream in streams:
        leaders.setdefault((*stream.work.prompt_ids, *stream.journal), stream)
    return [(stream, Prefix(token_ids, stream.work.cache_salt)) for token_ids, stream in leaders.items()]

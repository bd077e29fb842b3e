"""The ingress' side of the engines: submits, hands out what comes back, and moves streams off a replica that is lost.

One channel to each replica that works for this ingress (`service.link`). Its end, or its silence, is the death notice:
every stream open on it is submitted again elsewhere, prompt plus journal, and since sampling is keyed by (seed,
position) the client sees a pause and not a seam.
"""

import asyncio
import itertools
import logging
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.serve.handle import DeploymentHandle

from model.errors import AttendantError, InvalidRequest
from service.affinity import Prefix, PrefixIndex
from service.balance import RouteHint
from service.channel import TURN_S, Accepted, EngineInfo, Output, Refused, Work
from service.engines import Engines, reason
from service.errors import Overloaded, ServiceError, Unavailable
from service.exposition import Exposition, Replicas
from service.fullness import Fullness
from service.link import SILENT_TURNS, Link
from service.metrics import IngressMetrics
from service.receipt import EngineReceipt
from service.streams import Generation, Stream
from service.telemetry import NO_TRAIL, Trail

logger = logging.getLogger(__name__)

MAX_FAILURES = 3  # of engines under one request: it may be the request that kills them
RETRY_PERIOD_S = 0.1
MAX_RETRY_PERIOD_S = 1.0
RECEIPT_TIMEOUT_S = 2.0
# A client waits this long for an engine to take its request. A stream that lost its replica waits for a restart, which
# takes some 10 s with a small model, but only while Serve has a replica running or starting.
SUBMIT_TIMEOUT_S = 10.0
RESUME_TIMEOUT_S = 30.0
CENSUS_PERIOD_S = 1.0
MAX_EMPTY_CENSUSES = 3  # in a row: between two replicas there is a moment without any
# Where an idle service has no engine at all, a client waits for one to start: for its process, and the model's loading.
COLD_START_TIMEOUT_S = 120.0


class Silent(AttendantError):  # noqa: N818 - named for what happened
    """The replica that a call went to has not been heard of for too long."""


class Dispatcher:
    """All engines, as one. Lives on the ingress' event loop.

    engines_sleep: there may be none, until a request comes.
    """

    def __init__(self, engines: DeploymentHandle[Any], metrics: IngressMetrics, *, engines_sleep: bool = False) -> None:
        self._engines = Engines(engines)
        self._engines_sleep = engines_sleep
        self._submit_timeout_s = COLD_START_TIMEOUT_S if engines_sleep else SUBMIT_TIMEOUT_S
        self._metrics = metrics
        self._channel_id = uuid.uuid4().hex
        self._streams: dict[str, Stream] = {}
        self._links: dict[str, Link] = {}
        self._prefixes = PrefixIndex()
        self._fullness = Fullness()
        self._num_resuming = 0
        self._lookout: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self._expositions = Replicas(engines, pins=True)

    async def describe(self) -> EngineInfo:
        """What the engines can do; asked once. Raises `Unavailable` when none answers in time."""
        if self._info is None:
            self._info = await self._ask(self._submit_timeout_s)
            self._prefixes.capacity_tokens = self._info.kv_cache_tokens
        return self._info

    async def probe(self, timeout_s: float) -> None:
        """See whether an engine answers now; where they may sleep, nobody is woken by the question.

        Raises `Unavailable` when none answers in time.
        """
        if not self._engines_sleep:
            await self._ask(timeout_s)

    async def _ask(self, timeout_s: float) -> EngineInfo:
        try:
            info: EngineInfo = await self._engines.call("describe", hint=self._hint([]), timeout_s=timeout_s)
        except Exception as error:
            raise Unavailable(f"no engine is ready: {reason(error)}") from error
        return info

    def check_room(self, *, asks: bool = False) -> None:
        """Raises `Overloaded` when every engine is known to have no place. asks: an `open` follows at once."""
        self._fullness.check([replica_id for replica_id, link in self._links.items() if link.is_open], asks=asks)

    async def open(
        self,
        works: Sequence[Work],
        *,
        deadline: float | None = None,
        max_unread_tokens: int | None = None,
        timed: bool = False,
        trail: Trail = NO_TRAIL,
    ) -> Generation:
        """Start one stream for each of `works`; `Generation` tells of the rest.

        Raises `InvalidRequest`, `Overloaded` or `Unavailable`; then nothing runs.
        """
        self.check_room(asks=True)
        generation = Generation(works, deadline=deadline, max_unread_tokens=max_unread_tokens, timed=timed, trail=trail)
        generation.on_overrun.append(lambda: self.abort(generation.streams))
        await self._submit(generation.streams, self._submit_timeout_s)
        return generation

    async def receipt(self, stream: Stream) -> EngineReceipt | None:
        """What the replica that ended a timed stream noted of it; None if it is gone, or does not answer in time."""
        try:
            receipt: EngineReceipt | None = await self._engines.call(
                "receipt", stream.request_id, pin=stream.replica_id, timeout_s=RECEIPT_TIMEOUT_S
            )
        except Exception as error:
            logger.info("no receipt from engine replica %s: %s", stream.replica_id, reason(error))
            return None
        return receipt

    def abort(self, streams: Sequence[Stream]) -> None:
        """Stop those of `streams` that still run, and free their blocks."""
        for stream in streams:
            stream.wanted = False
        self._withdraw(streams)

    def close(self) -> None:
        """Let go of all replicas."""
        for link in self._links.values():
            link.close()

    async def expositions(self, timeout_s: float) -> list[Exposition]:
        """What each replica counts; of one that does not answer in time, what it last said."""
        expositions, self._metrics.replicas_answering = await self._expositions.read(timeout_s)
        return expositions

    async def _submit(self, streams: Sequence[Stream], timeout_s: float) -> None:
        """Have one replica take all of `streams`, trying others as they fail. After an error none of them is open."""
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_s
        pause = RETRY_PERIOD_S
        while wanted := [stream for stream in streams if stream.wanted]:  # clients leave while a replica restarts, too
            try:
                answer = await self._submit_once(wanted, deadline - now())
            except TimeoutError:
                raise Unavailable(f"no engine took the request within {timeout_s:g} s") from None
            except Exception as error:  # the replica died with the call, or hangs; another may take it
                logger.warning("submitting failed, trying again: %s", reason(error))
            else:
                if isinstance(answer, Accepted):
                    self._accepted(wanted, answer)
                    break
                if answer.kind != "failed":
                    self._fullness.note(answer)
                    raise _as_error(answer)
                self._doubt(answer.replica_id)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RETRY_PERIOD_S)

    async def _submit_once(self, streams: Sequence[Stream], timeout_s: float) -> Accepted | Refused:
        submissions = [stream.new_attempt() for stream in streams]
        leaders = _leaders(streams)
        # Open before they are sent: a first token may overtake the answer to the call.
        self._streams.update((stream.request_id, stream) for stream in streams)
        chosen: list[str] = []  # by the router
        call = self._engines.spawn(
            self._engines.call(
                "submit",
                self._channel_id,
                submissions,
                hint=self._hint(leaders),
                chosen=chosen,
                timeout_s=timeout_s,
            )
        )
        try:
            answer: Accepted | Refused = await self._answer(call, chosen)
        except BaseException:  # also when the client leaves while we wait: the call may have been taken all the same
            call.cancel()
            self._withdraw(streams)
            raise
        if isinstance(answer, Refused):
            for stream in streams:
                self._streams.pop(stream.request_id, None)
        else:
            for stream, prefix in leaders:
                if stream.request_id in self._streams:  # or it has ended already
                    stream.visit = self._prefixes.sent(answer.replica_id, prefix)
        return answer

    async def _answer(self, call: "asyncio.Task[Any]", chosen: Sequence[str]) -> Any:
        """Wait for the answer, for as long as whoever is to give it shows signs of life. Raises `Silent`."""
        turn = 0
        while not (await asyncio.wait({call}, timeout=TURN_S))[0]:
            turn += 1
            link = self._links.get(chosen[-1]) if chosen else None
            if link is not None and not link.is_done:
                if not link.is_open:
                    raise Silent(f"engine replica {link.replica_id} does not answer")
            elif chosen and turn > SILENT_TURNS:  # nothing has come from it yet, so there is no channel to listen at
                self._doubt(chosen[-1])
        return call.result()

    def _accepted(self, streams: Sequence[Stream], answer: Accepted) -> None:
        replica_id, session = answer
        for stream in streams:
            stream.replica_id, stream.session = replica_id, session
        left = [stream.request_id for stream in streams if not stream.wanted]
        if left:  # their clients went while the call waited for a replica, when there was nothing to abort yet
            self._engines.spawn(self._abort_on(replica_id, left))
        link = self._links.get(replica_id)
        if link is not None and link.is_open and link.session == session:
            return
        if link is not None:  # of a session that is over, or in doubt
            link.close()
            self._move(link)
        self._links[replica_id] = self._new_link(replica_id)
        self._links[replica_id].open(session)

    def _new_link(self, replica_id: str) -> Link:
        return Link(
            self._engines,
            replica_id,
            self._channel_id,
            receive=self._receive,
            lost=self._move,
            is_idle=lambda replica_id: (
                not any(stream.replica_id in (replica_id, None) for stream in self._streams.values())
            ),
        )

    def _doubt(self, replica_id: str) -> None:
        """Send nothing more to a replica that does not work, if another does, until it is well again."""
        link = self._links.get(replica_id)
        if link is None or link.is_done:
            self._links[replica_id] = self._new_link(replica_id)
            self._links[replica_id].doubt()

    def _withdraw(self, streams: Sequence[Stream]) -> None:
        running: dict[str | None, list[str]] = {}
        for stream in streams:
            if self._streams.pop(stream.request_id, None) is not None:
                self._fullness.left(stream.replica_id)
                if stream.visit is not None and stream.visit.uncached:
                    self._prefixes.withdrawn(stream.visit)
                running.setdefault(stream.replica_id, []).append(stream.request_id)
        for replica_id, request_ids in running.items():
            self._engines.spawn(self._abort_on(replica_id, request_ids))

    def _receive(self, outputs: list[Output]) -> None:
        for request_id, token_ids, finish_reason, num_cached_tokens, details in outputs:
            stream = self._streams.get(request_id)
            if stream is None:  # aborted, or of an attempt that was given up
                continue
            if finish_reason is not None:
                del self._streams[request_id]
                self._fullness.left(stream.replica_id)
            stream.receive(token_ids, finish_reason, num_cached_tokens, details)
            if stream.visit is not None:
                if stream.visit.uncached:
                    self._prefixes.heard(stream.visit, num_cached_tokens)
                if finish_reason is not None:
                    known = stream.visit.prefix.num_tokens - len(stream.work.prompt_ids)
                    self._prefixes.ended(stream.visit, stream.journal[known:])

    def _move(self, link: Link) -> None:
        """Resume elsewhere what was open on a session that is over. The choices of a request move together."""
        self._prefixes.forget(link.replica_id)
        calls: dict[str, list[Stream]] = {}
        for stream in self._streams.values():
            if (stream.replica_id, stream.session) == (link.replica_id, link.session):
                calls.setdefault(stream.call_id, []).append(stream)
        orphans = list(itertools.chain(*calls.values()))
        if orphans:  # it may only be asleep, and would go on for nobody when it wakes
            self._withdraw(orphans)
        for streams in calls.values():
            self._engines.spawn(self._resume(streams, was_leaving=link.is_leaving))

    async def _resume(self, streams: list[Stream], *, was_leaving: bool) -> None:
        """Submit the streams of one request again, with their journals. They are not in `_streams` any more.

        A replica that was to go, and did not get through in its time, has not failed.
        """
        for stream in streams:
            stream.resumes += 1
            stream.failures += not was_leaving
            self._metrics.resumes.inc()
        try:
            if streams[0].failures > MAX_FAILURES:
                raise Unavailable(f"the engines died {streams[0].failures} times under this request")
            await self._submit_with_hope(streams)
        except AttendantError as error:
            for stream in streams:
                stream.fail(error if isinstance(error, ServiceError) else Unavailable(str(error)))

    async def _submit_with_hope(self, streams: list[Stream]) -> None:
        """Submit what was accepted once, waiting for a replica as long as one may come. Raises as `_submit` does."""
        self._num_resuming += 1
        if self._lookout is None or self._lookout.done():
            self._lookout = self._engines.spawn(self._until_hopeless())
        submitting = self._engines.spawn(self._submit(streams, RESUME_TIMEOUT_S))
        try:
            await asyncio.wait({submitting, self._lookout}, return_when=asyncio.FIRST_COMPLETED)
            if not submitting.done():
                submitting.cancel()
                raise Unavailable("the engine that had this request is gone, and no other runs or is being started")
            await submitting
        finally:
            self._num_resuming -= 1

    async def _until_hopeless(self) -> None:
        """Return when Serve has had no replica for some time; or when nobody waits for one any more."""
        num_empty = 0
        await asyncio.sleep(CENSUS_PERIOD_S)
        while self._num_resuming and num_empty < MAX_EMPTY_CENSUSES:
            num_empty = num_empty + 1 if await self._engines.num_replicas() == 0 else 0
            await asyncio.sleep(CENSUS_PERIOD_S)

    async def _abort_on(self, replica_id: str | None, request_ids: list[str]) -> None:
        try:
            if replica_id is None:  # the answer to `submit` is not here yet: whoever has them
                await self._engines.broadcast("abort", request_ids, timeout_s=SUBMIT_TIMEOUT_S)
            else:
                await self._engines.call("abort", request_ids, pin=replica_id, timeout_s=SUBMIT_TIMEOUT_S)
        except Exception as error:  # a replica that is gone computes nothing; a channel's end frees the rest
            logger.info("could not abort %d requests: %s", len(request_ids), reason(error))

    def _hint(self, leaders: Sequence[tuple[Stream, Prefix]]) -> RouteHint:
        """What we know that bears on where these should go."""
        cached: Counter[str] = Counter()
        for _, prefix in leaders:
            cached.update(self._prefixes.match(prefix))
        pending: Counter[str] = Counter()
        open_streams: Counter[str] = Counter()
        for stream in self._streams.values():
            if stream.replica_id is not None:
                open_streams[stream.replica_id] += 1
                pending[stream.replica_id] += stream.visit.uncached if stream.visit is not None else 0
        num_tokens = sum(prefix.num_tokens for _, prefix in leaders)
        session = leaders[0][0].work.session if leaders else ""
        return RouteHint(num_tokens, cached, pending, open_streams, self._in_doubt(), session)

    def _in_doubt(self) -> frozenset[str]:
        self._links = {replica_id: link for replica_id, link in self._links.items() if not link.is_done}
        return frozenset(replica_id for replica_id, link in self._links.items() if not link.is_open)


def _leaders(streams: Sequence[Stream]) -> list[tuple[Stream, Prefix]]:
    """The first stream of each prompt, and what it asks a cache for; the other choices take it from the first."""
    leaders: dict[tuple[int, ...], Stream] = {}
    for stream in streams:
        leaders.setdefault((*stream.work.prompt_ids, *stream.journal), stream)
    return [(stream, Prefix(token_ids, stream.work.cache_salt)) for token_ids, stream in leaders.items()]


def _as_error(refused: Refused) -> AttendantError:
    if refused.kind == "invalid":
        return InvalidRequest(refused.message, param=refused.param)
    return Overloaded(refused.message, retry_after_s=refused.retry_after_s)

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
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from model.errors import AttendantError, InvalidRequest
from service.admission import needed_tokens
from service.balance import RouteHint
from service.channel import TURN_S, Accepted, EngineInfo, Output, Refused, Share, Work
from service.engines import Engines, reason
from service.errors import Overloaded, ServiceError, Unavailable
from service.exposition import Exposition, Replicas
from service.fullness import Fullness
from service.link import SILENT_TURNS, Link
from service.metrics import IngressMetrics
from service.open_streams import OpenStreams, leaders_of
from service.receipt import EngineReceipt
from service.router import NoReplica
from service.streams import Generation, Stream
from service.telemetry import NO_TRAIL, Trail

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_FAILURES = 3  # of engines under one request: it may be the request that kills them
RETRY_PERIOD_S = 0.1
MAX_RETRY_PERIOD_S = 1.0
RECEIPT_TIMEOUT_S = 2.0
# A client waits this long for an engine to take its request, a stream that was lost by one for another engine, while
# there is any: busy, or standing still.
SUBMIT_TIMEOUT_S = 10.0
RESUME_TIMEOUT_S = 30.0
# While there is none at all, both wait for this long. A quick restart is lived through, and nobody is left without a
# word for more than five seconds. That Serve starts one is no reason to wait: what kills an engine may kill the next.
NOBODY_TIMEOUT_S = 4.0
# Where an idle service has no engine at all, a client waits for one to start: for its process, and the model's loading.
COLD_START_TIMEOUT_S = 120.0


class NotWorking(AttendantError):  # noqa: N818 - named for what is the matter
    """The replica that a call went to says so, or has not been heard of for too long."""


class WaitBudget:
    """One request's wait for any engine at all, counted in turns of our own loop: who was asleep has not waited."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._waited_s = 0.0

    def wait(self, seconds: float) -> None:
        """So long there has been nobody. Raises `Unavailable` when that is too long in all."""
        self._waited_s += seconds
        if self._waited_s >= self._timeout_s:
            raise Unavailable(f"no engine runs, and none has come up within {self._timeout_s:g} s")


class Dispatcher:
    """All engines, as one. Lives on the ingress' event loop.

    engines_sleep: there may be none, until a request comes.
    """

    def __init__(self, engines: DeploymentHandle[Any], metrics: IngressMetrics, *, engines_sleep: bool = False) -> None:
        self._engines = Engines(engines)
        self._engines_sleep = engines_sleep
        self._submit_timeout_s = COLD_START_TIMEOUT_S if engines_sleep else SUBMIT_TIMEOUT_S
        self._nobody_timeout_s = COLD_START_TIMEOUT_S if engines_sleep else NOBODY_TIMEOUT_S
        self._metrics = metrics
        self._channel_id = uuid.uuid4().hex
        self._streams = OpenStreams()
        self._links: dict[str, Link] = {}
        self._fullness = Fullness()
        self._info: EngineInfo | None = None
        self._expositions = Replicas(engines, pins=True)

    async def describe(self) -> EngineInfo:
        """What the engines can do; asked once. Raises `Unavailable` when none answers in time."""
        if self._info is None:
            self._info = await self._ask(self._submit_timeout_s)
            self._streams.prefixes.capacity_tokens = self._info.kv_cache_tokens
        return self._info

    async def probe(self, timeout_s: float) -> None:
        """See whether an engine answers now; where they may sleep, nobody is woken by the question.

        Raises `Unavailable` when none answers in time.
        """
        if not self._engines_sleep:
            await self._ask(timeout_s)

    async def _ask(self, timeout_s: float) -> EngineInfo:
        async def attempt(seconds_left: float, budget: WaitBudget) -> EngineInfo:
            hint = self._streams.hint([], self._quarantined())
            info: EngineInfo = await self._call("describe", hint=hint, timeout_s=seconds_left, budget=budget)
            return info

        return await self._insist(attempt, timeout_s, self._nobody_timeout_s)

    def check_room(self, works: Sequence[Work] = ()) -> None:
        """Raises `Overloaded` when no engine is known to have room for `works`, to be opened at once; without any, for
        the least there is.
        """
        if self._fullness.knows_something:
            open_links = [replica_id for replica_id, link in self._links.items() if link.is_open]
            need = Share(len(works), sum(map(needed_tokens, works))) if works else Share(1, 1)
            self._fullness.check(open_links, self._streams.shares(), need, asks=bool(works))

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
        self.check_room(works)
        generation = Generation(works, deadline=deadline, max_unread_tokens=max_unread_tokens, timed=timed, trail=trail)
        generation.on_overrun.append(lambda: self.abort(generation.streams))
        try:
            await self._submit(generation.streams, self._submit_timeout_s, self._nobody_timeout_s)
        except BaseException:
            self.release(generation)
            raise
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

    def release(self, generation: Generation) -> None:
        """Nobody waits for it any more: stop what still runs, and let go of those who listened."""
        self.abort(generation.streams)
        generation.close()

    def close(self) -> None:
        """Let go of all replicas."""
        for link in self._links.values():
            link.close()

    async def expositions(self, timeout_s: float) -> list[Exposition]:
        """What each replica counts; of one that does not answer in time, what it last said."""
        expositions, self._metrics.replicas_answering = await self._expositions.read(timeout_s)
        return expositions

    async def _submit(self, streams: Sequence[Stream], timeout_s: float, nobody_timeout_s: float) -> None:
        """Have one replica take all of `streams`. After an error none of them is open."""

        async def attempt(seconds_left: float, budget: WaitBudget) -> tuple[list[Stream], Accepted | Refused | None]:
            wanted = [stream for stream in streams if stream.wanted]  # clients leave while a replica restarts, too
            return wanted, await self._submit_once(wanted, seconds_left, budget) if wanted else None

        wanted, answer = await self._insist(attempt, timeout_s, nobody_timeout_s)
        if isinstance(answer, Accepted):
            self._accepted(wanted, answer)
        if answer is not None and answer.occupancy is not None:
            self._fullness.note(answer.replica_id, answer.occupancy, self._streams.share(answer.replica_id))
        if isinstance(answer, Refused):
            raise _as_error(answer)

    async def _insist(
        self, attempt: Callable[[float, WaitBudget], Awaitable[T]], timeout_s: float, nobody_timeout_s: float
    ) -> T:
        """What `attempt` makes of the seconds that are left, tried again while replicas fail. Raises `Unavailable`."""
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_s
        pause, budget = RETRY_PERIOD_S, WaitBudget(nobody_timeout_s)
        while True:
            try:
                return await attempt(deadline - now(), budget)
            except Unavailable:
                raise
            except TimeoutError:
                raise Unavailable(f"no engine answered within {timeout_s:g} s") from None
            except (NotWorking, NoReplica) as error:  # whoever stands still may go on
                logger.warning("a call to the engines failed, trying again: %s", reason(error))
            except Exception as error:  # the replica died with the call; another may take it
                logger.warning("a call to the engines failed, trying again: %s", reason(error))
                budget.wait(pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, MAX_RETRY_PERIOD_S)

    async def _submit_once(self, streams: Sequence[Stream], timeout_s: float, budget: WaitBudget) -> Accepted | Refused:
        submissions = [stream.new_attempt() for stream in streams]
        leaders = leaders_of(streams)
        hint = self._streams.hint(leaders, self._quarantined())
        # Open before they are sent: a first token may overtake the answer to the call.
        self._streams.add(streams)
        try:
            answer: Accepted | Refused = await self._call(
                "submit", self._channel_id, submissions, hint=hint, timeout_s=timeout_s, budget=budget
            )
        except BaseException:  # also when the client leaves while we wait: the call may have been taken all the same
            self._withdraw(streams)
            raise
        if isinstance(answer, Accepted):
            self._streams.accepted(streams, leaders, answer)
            return answer
        self._streams.remove(streams)
        if answer.kind == "failed":
            self._quarantine(answer.replica_id)
            raise NotWorking(f"engine replica {answer.replica_id}: {answer.message}")
        return answer

    async def _call(self, method: str, *args: Any, hint: RouteHint, timeout_s: float, budget: WaitBudget) -> Any:
        """Call whom the router chooses, and wait for as long as that one shows signs of life. Raises `NotWorking`, and
        `Unavailable` when there is nobody to choose.
        """
        chosen: list[str] = []  # by the router
        turns: Counter[str] = Counter()  # for each: the call may have waited before it was sent, or sent again
        call = self._engines.spawn(self._engines.call(method, *args, hint=hint, chosen=chosen, timeout_s=timeout_s))
        try:
            while not (await asyncio.wait({call}, timeout=TURN_S))[0]:
                if not chosen:
                    budget.wait(TURN_S)
                    continue
                turns[chosen[-1]] += 1
                link = self._links.get(chosen[-1])
                if link is not None and not link.is_done:
                    if not link.is_open:
                        raise NotWorking(f"engine replica {link.replica_id} does not answer")
                elif turns[chosen[-1]] > SILENT_TURNS:  # nothing has come from it, so there is no channel to listen at
                    self._quarantine(chosen[-1])
            return call.result()
        finally:
            call.cancel()
            del call  # its error knows this frame: the two would keep one another, and the request

    def _accepted(self, streams: Sequence[Stream], answer: Accepted) -> None:
        replica_id, session, _ = answer
        left = [stream.request_id for stream in streams if not stream.wanted]
        if left:  # their clients went while the call waited for a replica, when there was nothing to abort yet
            self._engines.spawn(self._abort_on(replica_id, left))
        link = self._links.get(replica_id)
        if link is not None and link.is_open and link.session == session:
            return
        if link is not None:  # of a session that is over, or in quarantine
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
            is_idle=lambda replica_id: not self._streams.may_be_at(replica_id),
        )

    def _quarantine(self, replica_id: str) -> None:
        """Send nothing more to a replica that does not work, if another does, until it is well again."""
        link = self._links.get(replica_id)
        if link is None or link.is_done:
            self._links[replica_id] = self._new_link(replica_id)
            self._links[replica_id].quarantine()

    def _withdraw(self, streams: Sequence[Stream]) -> None:
        for replica_id, request_ids in self._streams.remove(streams).items():
            self._engines.spawn(self._abort_on(replica_id, request_ids))

    def _receive(self, outputs: list[Output]) -> None:
        for output in outputs:
            self._streams.receive(output)

    def _move(self, link: Link) -> None:
        """Resume elsewhere what was open on a session that is over. The choices of a request move together."""
        self._streams.prefixes.forget(link.replica_id)
        calls = self._streams.of_session(link.replica_id, link.session)
        if calls:  # it may only be asleep, and would go on for nobody when it wakes
            self._withdraw(list(itertools.chain(*calls)))
        for streams in calls:
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
            await self._submit(streams, RESUME_TIMEOUT_S, NOBODY_TIMEOUT_S)
        except AttendantError as error:
            self._fail(streams, error if isinstance(error, ServiceError) else Unavailable(str(error)))
        except Exception:  # a fault of ours: whatever it is, nobody is left waiting
            logger.exception("a stream could not be moved")
            self._fail(streams, ServiceError("the service failed on this request when it lost its engine"))

    def _fail(self, streams: Sequence[Stream], error: ServiceError) -> None:
        self.abort(streams)
        for stream in streams:
            stream.fail(error)

    async def _abort_on(self, replica_id: str | None, request_ids: list[str]) -> None:
        try:
            if replica_id is None:  # the answer to `submit` is not here yet: whoever has them
                await self._engines.broadcast("abort", request_ids, timeout_s=SUBMIT_TIMEOUT_S)
            else:
                await self._engines.call("abort", request_ids, pin=replica_id, timeout_s=SUBMIT_TIMEOUT_S)
        except Exception as error:  # a replica that is gone computes nothing; a channel's end frees the rest
            logger.info("could not abort %d requests: %s", len(request_ids), reason(error))

    def _quarantined(self) -> frozenset[str]:
        self._links = {replica_id: link for replica_id, link in self._links.items() if not link.is_done}
        return frozenset(replica_id for replica_id, link in self._links.items() if not link.is_open)


def _as_error(refused: Refused) -> AttendantError:
    if refused.kind == "invalid":
        return InvalidRequest(refused.message, param=refused.param)
    return Overloaded(refused.message, retry_after_s=refused.retry_after_s)

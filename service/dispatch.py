"""The ingress' side of the engines: submits, hands out what comes back, and moves streams off a replica that died.

One channel to each replica that works for this ingress. Its end, however it comes, is the death notice: every stream
open on it is submitted again elsewhere, prompt plus journal, and since sampling is keyed by (seed, position) the
client sees a pause and not a seam.
"""

import asyncio
import contextvars
import logging
import uuid
from collections import Counter
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from ray.serve.handle import DeploymentHandle

from model.errors import AttendantError, InvalidRequest
from service.affinity import Prefix, PrefixIndex
from service.balance import RouteHint
from service.channel import Accepted, EngineInfo, Output, Refused, Work
from service.errors import Overloaded, ServiceError, Unavailable
from service.exposition import Exposition, Replicas
from service.fullness import Fullness
from service.metrics import IngressMetrics
from service.receipt import EngineReceipt
from service.router import ReplicaGone
from service.streams import Generation, Stream
from service.telemetry import NO_TRAIL, Trail

logger = logging.getLogger(__name__)

MAX_RESUMES = 3
PING_PERIOD_S = 2.0
RETRY_PERIOD_S = 0.1
RECEIPT_TIMEOUT_S = 2.0
# A client waits this long for an engine to take its request; a stream that lost its replica waits for a restart.
SUBMIT_TIMEOUT_S = 10.0
RESUME_TIMEOUT_S = 60.0
# Where an idle service has no engine at all, a client waits for one to start: for its process, and the model's loading.
COLD_START_TIMEOUT_S = 120.0

T = TypeVar("T")


class Dispatcher:
    """All engines, as one. Lives on the ingress' event loop.

    engines_sleep: there may be none, until a request comes.
    """

    def __init__(self, engines: DeploymentHandle[Any], metrics: IngressMetrics, *, engines_sleep: bool = False) -> None:
        self._engines = engines
        self._engines_sleep = engines_sleep
        self._submit_timeout_s = COLD_START_TIMEOUT_S if engines_sleep else SUBMIT_TIMEOUT_S
        self._metrics = metrics
        self._channel_id = uuid.uuid4().hex
        self._streams: dict[str, Stream] = {}
        self._pumps: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._out_of_order: set[str] = set()  # replicas whose engine is dead, until Serve has replaced them
        self._prefixes = PrefixIndex()
        self._fullness = Fullness()
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
            info: EngineInfo = await self._call(self._engines.describe, timeout_s=timeout_s)
        except Exception as error:
            raise Unavailable(f"no engine is ready: {_reason(error)}") from error
        return info

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
        self._fullness.check(self._pumps)
        generation = Generation(works, deadline=deadline, max_unread_tokens=max_unread_tokens, timed=timed, trail=trail)
        generation.on_overrun.append(lambda: self.abort(generation.streams))
        await self._submit(generation.streams, self._submit_timeout_s)
        return generation

    async def receipt(self, stream: Stream) -> EngineReceipt | None:
        """What the replica that ended a timed stream noted of it; None if it is gone, or does not answer in time."""
        try:
            receipt: EngineReceipt | None = await self._call(
                self._engines.receipt, stream.request_id, pin=stream.replica_id, timeout_s=RECEIPT_TIMEOUT_S
            )
        except Exception as error:
            logger.info("no receipt from engine replica %s: %s", stream.replica_id, _reason(error))
            return None
        return receipt

    def abort(self, streams: Sequence[Stream]) -> None:
        """Stop those of `streams` that still run, and free their blocks."""
        for stream in streams:
            stream.wanted = False
        self._withdraw(streams)

    def close(self) -> None:
        """Let go of all replicas. An open channel is an open call to Serve, and would hold up their shutdown."""
        for pump in self._pumps.values():
            pump.cancel()

    async def expositions(self, timeout_s: float) -> list[Exposition]:
        """What each replica counts; of one that does not answer in time, what it last said."""
        expositions, self._metrics.replicas_answering = await self._expositions.read(timeout_s)
        return expositions

    async def _submit(self, streams: Sequence[Stream], timeout_s: float) -> None:
        """Have one replica take all of `streams`, trying others as they fail. After an error none of them is open."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            try:
                answer = await self._submit_once(streams, deadline - asyncio.get_running_loop().time())
            except TimeoutError:
                raise Unavailable(f"no engine took the request within {timeout_s:g} s") from None
            except Exception as error:  # the replica died with the call; another may take it
                logger.warning("submitting failed, trying again: %s", _reason(error))
            else:
                if isinstance(answer, Accepted):
                    return self._accepted(streams, answer.replica_id)
                if answer.kind != "failed":
                    self._fullness.note(answer)
                    raise _as_error(answer)
                self._out_of_order.add(answer.replica_id)
            await asyncio.sleep(RETRY_PERIOD_S)

    async def _submit_once(self, streams: Sequence[Stream], timeout_s: float) -> Accepted | Refused:
        streams = [stream for stream in streams if stream.wanted]  # clients leave while a replica restarts, too
        submissions = [stream.new_attempt() for stream in streams]
        leaders = _leaders(streams)
        # Open before they are sent: a first token may overtake the answer to the call.
        self._streams.update((stream.request_id, stream) for stream in streams)
        try:
            answer: Accepted | Refused = await self._call(
                self._engines.submit,
                self._channel_id,
                submissions,
                hint=self._hint(leaders),
                timeout_s=timeout_s,
            )
        except BaseException:  # also when the client leaves while we wait: the call may have been taken all the same
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

    def _accepted(self, streams: Sequence[Stream], replica_id: str) -> None:
        for stream in streams:
            stream.replica_id = replica_id
        left = [stream.request_id for stream in streams if not stream.wanted]
        if left:  # their clients went while the call waited for a replica, when there was nothing to abort yet
            self._spawn(self._abort_on(replica_id, left))
        if replica_id not in self._pumps:
            self._pumps[replica_id] = self._spawn(self._pump(replica_id))

    def _withdraw(self, streams: Sequence[Stream]) -> None:
        running: dict[str | None, list[str]] = {}
        for stream in streams:
            if self._streams.pop(stream.request_id, None) is not None:
                if stream.visit is not None and stream.visit.uncached:
                    self._prefixes.withdrawn(stream.visit)
                running.setdefault(stream.replica_id, []).append(stream.request_id)
        for replica_id, request_ids in running.items():
            self._spawn(self._abort_on(replica_id, request_ids))

    async def _pump(self, replica_id: str) -> None:
        """Carry one replica's outputs to their streams until the channel ends; then move what was open on it."""
        # Any: what the call returns depends on `stream`, and Serve's annotations do not follow that.
        outputs: Any = self._engines.options(stream=True).channel.remote(self._channel_id, pin=replica_id)
        keeper = self._spawn(self._keep(replica_id))
        try:
            async for item in outputs:
                self._receive(item)
            logger.info("engine replica %s closed its channel", replica_id)
        except Exception as error:  # whatever it is, nothing more will come through this channel
            logger.warning("lost the channel to engine replica %s: %s", replica_id, _reason(error))
        finally:
            keeper.cancel()
            outputs.cancel()  # dropping it would leave the replica's side running
            del self._pumps[replica_id]
            self._prefixes.forget(replica_id)
        orphans = [stream for stream in self._streams.values() if stream.replica_id == replica_id]
        if orphans:
            self._spawn(self._resume(orphans))

    async def _keep(self, replica_id: str) -> None:
        """Tell the replica that we live. Once it takes no more calls and has nothing of ours, let it go."""
        while True:
            await asyncio.sleep(PING_PERIOD_S)
            try:
                await self._call(self._engines.ping, self._channel_id, pin=replica_id, timeout_s=PING_PERIOD_S)
            except ReplicaGone:
                if not any(stream.replica_id in (replica_id, None) for stream in self._streams.values()):
                    self._pumps[replica_id].cancel()
            except Exception as error:  # slow, or dead: then the channel ends by itself
                logger.info("engine replica %s did not answer a ping: %s", replica_id, _reason(error))

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

    async def _resume(self, orphans: list[Stream]) -> None:
        """Submit again, with the journal, the streams that a dead replica left behind."""
        for stream in orphans:
            self._streams.pop(stream.request_id, None)
            stream.resumes += 1
            self._metrics.resumes.inc()
        living = [stream for stream in orphans if stream.resumes <= MAX_RESUMES]
        for stream in orphans:
            if stream not in living:
                stream.fail(Unavailable(f"the engines died {stream.resumes} times under this request"))
        if not living:
            return
        try:
            await self._submit(living, RESUME_TIMEOUT_S)
        except AttendantError as error:
            for stream in living:
                stream.fail(error if isinstance(error, ServiceError) else Unavailable(str(error)))

    async def _abort_on(self, replica_id: str | None, request_ids: list[str]) -> None:
        try:
            if replica_id is None:  # the answer to `submit` is not here yet: whoever has them
                await self._broadcast("abort", SUBMIT_TIMEOUT_S, request_ids)
            else:
                await self._call(self._engines.abort, request_ids, pin=replica_id, timeout_s=SUBMIT_TIMEOUT_S)
        except Exception as error:  # a replica that is gone computes nothing; a channel's end frees the rest
            logger.info("could not abort %d requests: %s", len(request_ids), _reason(error))

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
        return RouteHint(num_tokens, cached, pending, open_streams, frozenset(self._out_of_order), session)

    async def _call(self, method: Any, *args: Any, timeout_s: float, **kwargs: Any) -> Any:
        async def call() -> Any:
            return await method.remote(*args, **kwargs)

        return await asyncio.wait_for(self._in_clean_context(call()), timeout_s)

    async def _broadcast(self, method: str, timeout_s: float, *args: Any) -> list[Any]:
        answers: list[Any] = await self._engines.broadcast(method, *args).results_async(
            timeout_s=timeout_s, return_exceptions=True
        )
        return answers

    def _in_clean_context(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """Run outside the HTTP request's context.

        Serve cancels every call made in the context of a request when its client leaves. A channel opened on behalf
        of the first request would die with it, and an abort would be aborted.
        """
        return asyncio.get_running_loop().create_task(work, context=contextvars.Context())

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = self._in_clean_context(work)
        self._tasks.add(task)  # the loop itself holds tasks only weakly
        task.add_done_callback(self._tasks.discard)
        return task


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


def _reason(error: BaseException) -> str:
    """One line: Ray's errors carry whole tracebacks in their text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"

"""An engine replica: the engine in its own thread, and this process' ends of the channels to the ingresses."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ray import serve

from model.config import EngineConfig
from model.errors import Busy, GrammarError, InvalidRequest
from service.admission import Admission, Refusal, backlog, unprefilled
from service.autoscaling import Load
from service.balance import RouteHint, Standing
from service.channel import (
    BEAT_TURNS,
    TURN_S,
    UNASKED_TURNS,
    Accepted,
    Details,
    EngineInfo,
    Outbox,
    Output,
    Refused,
    Share,
    Submission,
)
from service.exposition import Exposition, export
from service.garbage import set_aside
from service.grammars import Grammars
from service.logs import fields, install
from service.metrics import EngineMetrics, facts
from service.ranks import load
from service.receipt import EngineReceipt, Timing, WeightsDigest
from service.step_watch import StepWatch
from service.telemetry import Telemetry, Trail

if TYPE_CHECKING:
    from model.engine.request import Request, TokenOutput
    from model.engine.stats import StepStats
    from model.sampling.grammar import Grammar
    from service.tracing import Tracer

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 5.0  # for the step in progress, when the replica ends: a stuck one never does
MAX_TIMINGS = 1024  # of calls that have not come for their receipts


class Queue(NamedTuple):
    """How much may wait in a replica: requests beyond those that run, and what all of them may need in tokens."""

    max_waiting: int
    max_backlog_tokens: int | None = None


class Owner(NamedTuple):
    """Where a request's outputs go, the request, and what is noted of it."""

    outbox: Outbox
    request: "Request"
    timing: Timing
    trail: Trail


class EngineReplica:
    """Token ids in, token ids out. Text, HTTP and retries are the ingress' business.

    exporter_host: where its metrics are exposed by themselves, beside what an ingress asks for.
    idle_channel_s: a channel without a request for so long is closed from this side; None: never.
    cores: that each process has to itself, beside what HTTP and Ray need of them; for threads that options leave open.
    num_ranks: processes that hold the model together. Raises `CheckpointError` and `ConfigError` as loading does.
    """

    def __init__(
        self,
        model: str,
        model_name: str,
        engine_options: dict[str, Any],
        queue: Queue,
        telemetry: Telemetry | None = None,
        exporter_host: str | None = None,
        idle_channel_s: float | None = None,
        cores: int = 1,
        num_ranks: int = 1,
    ) -> None:
        # torch is imported here and not above: an ingress reads this module too, and does without torch's 200 MB.
        from model.engine.loop import EngineLoop

        self._model = Path(model)
        self._engine, self._dismiss = load(self._model, EngineConfig(**engine_options), cores, num_ranks)
        config = self._engine.config
        self._capacity = config.max_num_seqs + queue.max_waiting
        self._admission = Admission.sized(config.max_num_seqs, self._engine.max_model_len, *queue)
        self._replica_id: str = serve.get_replica_context().replica_id.unique_id
        self._tracer: Tracer | None = None
        if telemetry is not None:  # this process is ours alone
            install(telemetry, f"engine/{self._replica_id}", quotes_errors=True)  # it knows no text
            self._tracer = telemetry.tracer(self._replica_id)
            set_aside()
        self._idle_channel_s = idle_channel_s
        self._outboxes: dict[str, Outbox] = {}  # the newest session of each channel
        self._num_sessions = 0
        self._step_watch = StepWatch(TURN_S)
        self._is_stuck = False
        self._unasked_turns: int | None = None  # since Serve last asked for our health, if it ever has
        self._owners: dict[str, Owner] = {}
        self._metrics = EngineMetrics(model_name, self._replica_id)
        self._metrics.describe(*facts(self._engine))
        self._metrics.observe_backlog(lambda: backlog([owner.request for owner in list(self._owners.values())]))
        self._metrics.observe_channels(lambda: len(self._outboxes))
        self._exporter = None if exporter_host is None else export(self._metrics.registry, exporter_host)
        self._weights = WeightsDigest(self._model)
        self._timings: dict[str, Timing] = {}  # of those that want a receipt, the newest last
        self._unstarted: dict[Request, Timing] = {}  # until the engine's thread takes them out
        self._grammars = Grammars(self._model, self._engine.model_config)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._watch: asyncio.Task[None] | None = None
        self._loop = EngineLoop(self._engine, self._deliver)
        self._loop.start()

    async def describe(self, hint: RouteHint, chosen: Sequence[str] = ()) -> EngineInfo:
        """What an ingress needs in order to refuse at the door. `hint` and `chosen` are for the router."""
        kv_cache_tokens = self._engine.scheduler.blocks.num_blocks * self._engine.config.block_size
        return EngineInfo(self._engine.max_model_len, self._capacity, kv_cache_tokens)

    async def submit(
        self, channel_id: str, submissions: list[Submission], hint: RouteHint, chosen: Sequence[str] = ()
    ) -> Accepted | Refused:
        """Start all of `submissions`, or none. Their outputs go to the channel `channel_id`, opened or yet to be.

        `hint` and `chosen` are between the router and its caller; they have done their work by now.
        """
        if not self._is_well:
            return Refused(self._replica_id, "failed", self._complaint())
        timing = Timing()
        unfinished = [owner.request for owner in self._owners.values()]
        occupancy = self._admission.occupancy(unfinished, len(self._grammars.waiting))
        refusal = self._admission.refusal(occupancy, unfinished, submissions)
        try:
            if refusal is None:
                submissions, grammars = await self._grammars.compile(submissions)
        except InvalidRequest as error:
            return Refused(self._replica_id, "invalid", str(error), param=error.param)
        except Busy as error:
            refusal = Refusal("grammars", str(error), retry_after_s=1)
        if refusal is not None:
            self._metrics.refused(refusal.reason)
            logger.info("refused: %s", refusal.reason, extra=fields(request_id=submissions[0].trail.request_id))
            return Refused(self._replica_id, "overloaded", refusal.message, None, refusal.retry_after_s, occupancy)
        outbox = self._outbox(channel_id)
        begun: dict[str, Request] = {}
        leaders: dict[tuple[int, ...], Request] = {}  # of several choices, the first computes the prompt for all
        for submission in submissions:
            prompt, spec = tuple(submission.work.prompt_ids), submission.work.grammar
            grammar = None if spec is None else grammars[spec]
            try:
                request = self._start(submission, outbox, leaders.get(prompt), grammar, timing)
            except InvalidRequest as error:
                self._stop(list(begun), "invalid")
                return Refused(self._replica_id, "invalid", str(error), param=error.param)
            begun[submission.request_id] = request
            leaders.setdefault(prompt, request)
        if begun and submissions[0].timed:
            self._timings[submissions[0].request_id] = timing
            if len(self._timings) > MAX_TIMINGS:
                del self._timings[next(iter(self._timings))]
        return Accepted(self._replica_id, outbox.session, occupancy.plus(Share(len(begun), backlog(begun.values()))))

    async def abort(self, request_ids: list[str], pin: str | None = None) -> None:
        """Forget these requests and free their blocks; ids that are unknown or finished are fine."""
        self._grammars.withdraw(request_ids)
        self._stop(request_ids, "abort")

    async def channel(self, channel_id: str, session: int, pin: str) -> AsyncGenerator[list[Output], None]:
        """Yield every output for this ingress, one item a step, until either side goes; an empty one now and then.

        When the ingress goes (its call is cancelled), its requests are aborted. A session that is over ends at once. A
        later call of the same session carries on where this one then ends.
        """
        outbox = self._outboxes.get(channel_id)
        if outbox is None or outbox.session != session:
            return
        call = outbox.answer()
        try:
            while (outputs := await outbox.take(call)) is not None:
                yield outputs
        finally:
            if outbox.is_answered_by(call):
                await self._drop(outbox)

    async def ping(self, channel_id: str, session: int | None, num_read: int, pin: str) -> bool:
        """The ingress is alive, and has so many outputs of its session, if it has one. Whether this engine works."""
        outbox = self._outboxes.get(channel_id)
        if outbox is not None and outbox.session == session:
            outbox.heard(num_read)
        return self._is_well

    async def receipt(self, request_id: str, pin: str) -> EngineReceipt | None:
        """What was noted of a timed call, by its first request; once. None if that was too long ago."""
        timing = self._timings.pop(request_id, None)
        return None if timing is None else timing.receipt(await asyncio.to_thread(self._weights.wait))

    async def metrics(self, pin: str | None = None) -> Exposition:
        """What this replica counts."""
        return Exposition("Engine", self._replica_id, self._metrics.expose(), self._exporter)

    def record_routing_stats(self) -> dict[str, float]:
        """What the routers of all ingresses should know, asked by Serve every second: a `service.balance.Standing`."""
        stats = self._engine.stats
        pending = unprefilled([owner.request for owner in self._owners.values()])
        return Standing(stats.num_running, stats.num_waiting, pending, stats.kv_cache_usage)._asdict()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """How much there is to do here, asked by Serve every second: a `service.autoscaling.Load`."""
        stats, blocks = self._engine.stats, self._engine.scheduler.blocks
        pending = unprefilled([owner.request for owner in self._owners.values()])
        return Load(
            running=stats.num_running,
            waiting=stats.num_waiting,
            max_running=self._engine.config.max_num_seqs,
            kv_usage=stats.kv_cache_usage,
            pending_kv=pending / (blocks.num_blocks * self._engine.config.block_size),
            pending_tokens=pending,
            tokens_per_second=self._admission.tokens_per_second,
        )._asdict()

    def check_health(self) -> None:
        """Raise when the engine thread is dead or stuck, so that Serve replaces this replica."""
        self._unasked_turns = 0
        if not self._is_well:
            raise RuntimeError(self._complaint())

    def __del__(self) -> None:
        if loop := getattr(self, "_loop", None):  # absent when the constructor failed
            loop.stop(STOP_TIMEOUT_S)
            if not loop.is_alive:
                self._dismiss()
            self._grammars.close()
            if self._tracer is not None:
                self._tracer.close()

    @property
    def _hears_pings(self) -> bool:
        return self._unasked_turns is None or self._unasked_turns <= UNASKED_TURNS

    @property
    def _is_well(self) -> bool:
        return self._loop.is_alive and not self._is_stuck

    def _complaint(self) -> str:
        if self._loop.is_alive:
            return "the engine thread is stuck in a step"
        return f"the engine thread is dead: {self._loop.failure!r}"

    def _start(
        self,
        submission: Submission,
        outbox: Outbox,
        leader: "Request | None",
        grammar: "Grammar | None",
        timing: Timing,
    ) -> "Request":
        from model.engine.request import Request

        work, left = submission.work, submission.seconds_left
        try:
            request = Request(
                submission.request_id,
                work.prompt_ids,
                work.params,
                output_ids=submission.output_ids,
                priority=work.priority,
                deadline=None if left is None else time.monotonic() + left,
                cache_salt=work.cache_salt,
                attention=work.attention,
                grammar=grammar,
                leader=leader,
            )
        except GrammarError as error:
            raise InvalidRequest(f"what was said so far cannot go on here: {error}") from error
        # Owned before it is started: the first output may come before `submit` returns.
        self._owners[submission.request_id] = Owner(outbox, request, timing, submission.trail)
        timing.num_open += 1
        self._unstarted[request] = timing
        outbox.request_ids.add(submission.request_id)
        try:
            self._loop.submit(request)
        except InvalidRequest:
            self._let_go(submission.request_id, "invalid")
            raise
        return request

    def _stop(self, request_ids: Sequence[str], reason: str) -> None:
        for request_id in request_ids:
            self._let_go(request_id, reason)
        self._loop.abort(request_ids)

    def _let_go(self, request_id: str, reason: str) -> None:
        """A choice is over, or nobody wants it any more. With the last one of a request its story can be told."""
        owner = self._owners.pop(request_id, None)
        if owner is None:
            return
        owner.outbox.request_ids.discard(request_id)
        if reason == "error":
            logger.error("the engine failed on this request", extra=fields(request_id=owner.trail.request_id))
        self._unstarted.pop(owner.request, None)
        timing = owner.timing
        timing.num_open -= 1
        if timing.num_open == 0 and reason != "invalid":
            self._metrics.observe_request(timing)
            seconds = timing.receipt("")
            about = {"queue": seconds.queue, "prefill": seconds.prefill, "decode": seconds.decode}
            logger.info("done", extra=fields(request_id=owner.trail.request_id, tokens=timing.num_tokens, **about))
            if self._tracer is not None:
                self._tracer.phases(timing, owner.trail, failed=reason == "error")

    def _outbox(self, channel_id: str) -> Outbox:
        """Where outputs for this ingress go now: to a session that has not been given up."""
        if self._watch is None:
            self._event_loop = asyncio.get_running_loop()
            self._watch = self._event_loop.create_task(self._watch_over())
        outbox = self._outboxes.get(channel_id)
        if outbox is None or outbox.is_closed:
            outbox = self._outboxes[channel_id] = Outbox(channel_id, self._num_sessions)
            self._num_sessions += 1
        return outbox

    async def _drop(self, outbox: Outbox) -> None:
        if self._outboxes.get(outbox.channel_id) is outbox:
            del self._outboxes[outbox.channel_id]
        outbox.close(discard=True)
        await self.abort(list(outbox.request_ids))

    def _deliver(self, outputs: "list[TokenOutput]", stats: "StepStats") -> None:
        """Called in the engine's thread, once a step."""
        self._metrics.observe_step(stats)
        if stats.num_tokens:
            self._admission.observe(stats.num_tokens, stats.seconds)
            self._step_watch.observe(stats.num_tokens, stats.seconds)
        if self._unstarted and stats.num_tokens:
            self._look_who_started(stats.seconds)
        if outputs and self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._fan_out, outputs)

    def _look_who_started(self, step_seconds: float) -> None:
        """In the engine's thread, behind a step: which requests were in it for the first time?

        It looks at those of the step, not at those that wait: there may be thousands.
        """
        started_at = time.perf_counter() - step_seconds
        for scheduled in self._engine.scheduled.requests:
            timing = self._unstarted.pop(scheduled.request, None)
            if timing is not None and timing.started_at is None:
                timing.started_at = started_at

    def _fan_out(self, outputs: "list[TokenOutput]") -> None:
        now = time.perf_counter()
        by_outbox: dict[Outbox, list[Output]] = {}
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:  # aborted while the step ran
                continue
            outbox = owner.outbox
            if output.token_ids:
                owner.timing.token(len(output.token_ids), now)
            details = Details.of(output, None if output.finish_reason is None else now - owner.timing.accepted_at)
            by_outbox.setdefault(outbox, []).append(
                (output.request_id, output.token_ids, output.finish_reason, output.num_cached_tokens, details)
            )
            if output.finish_reason is not None:
                self._let_go(output.request_id, output.finish_reason)
        for outbox, own in by_outbox.items():
            outbox.put(own)

    async def _watch_over(self) -> None:
        """End the channels of a dead or stuck engine, so that their streams resume elsewhere; else let them beat, and
        forget the ingresses that are gone.
        """
        loop, turn = self._loop, 0
        while True:
            await asyncio.sleep(TURN_S)
            turn += 1
            if self._unasked_turns is not None:
                self._unasked_turns += 1
            num_tokens = self._engine.scheduled.num_tokens
            self._is_stuck = self._step_watch.is_stuck(loop.num_rounds, num_tokens, is_idle=loop.is_idle)
            for outbox in list(self._outboxes.values()):
                outbox.turn(beat=turn % BEAT_TURNS == 0)
                if not self._is_well:
                    outbox.close()
                elif outbox.is_forsaken(hears_pings=self._hears_pings):
                    await self._drop(outbox)
                elif self._idle_channel_s is not None and outbox.idle_turns * TURN_S > self._idle_channel_s:
                    self._outboxes.pop(outbox.channel_id).close()

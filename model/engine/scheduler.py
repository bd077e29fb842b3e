"""Decides what the next step computes. Pure Python: no torch, no clock, no I/O.

One rule serves prefill, decode, chunks, prefix hits and resumption. A request has tokens (prompt and output) and
`num_computed_tokens` of them whose keys and values lie in the cache; a step schedules some of the rest. Running
requests go first, so a long prompt can delay them by at most one chunk.

A step may be scheduled while another one is on its way. Its requests then count on tokens whose ids are still unread;
blocks that are given back go free only when every step that was on its way has come in.
"""

import heapq
from bisect import insort
from collections import deque
from collections.abc import Sequence

from model.cache.blocks import BlockPool
from model.cache.prefix import PrefixCache, root
from model.config import EngineConfig
from model.engine.request import FinishReason, Request, TokenOutput
from model.engine.scheduled import ScheduledRequest, ScheduledStep
from model.engine.speculative import NgramDrafter
from model.sampling.result import Sampled

COMPACT_BEYOND = 256  # entries of the heaps that are worth a look at all of them


class Scheduler:
    """Holds every live request, waiting or running, and the blocks they stand in.

    longest_sharing_prompt: longer prompts share blocks only with prompts of their own length
        (`ModelConfig.longest_sharing_prompt`).
    """

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        eos_token_ids: Sequence[int],
        longest_sharing_prompt: int | None = None,
    ) -> None:
        self.config = config
        self.prefix = PrefixCache()
        self.blocks = BlockPool(num_blocks, on_reuse=self.prefix.forget)
        self.waiting: dict[str, Request] = {}
        self.running: list[Request] = []  # by rank
        self.num_preemptions = 0
        self.num_drafted = 0
        self.num_accepted = 0
        self._departed: list[Request] = []
        # Of each step on its way: its requests with their epochs, and the tables to free when it has come in.
        self._launched: deque[tuple[ScheduledStep, list[list[int]]]] = deque()
        self._eos_token_ids = frozenset(eos_token_ids)
        self._longest_sharing_prompt = longest_sharing_prompt
        self._drafter = NgramDrafter(config.speculative_tokens)
        self._arrivals = 0
        # Heaps of keys with request ids; an entry whose request has moved on is passed over when it comes up, so the
        # cost of a step does not grow with the queue. They hold no requests: an entry may lie here until its deadline.
        self._queue: list[tuple[tuple[int, int], str]] = []
        self._deadlines: list[tuple[float, int, str]] = []

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything, or take in what another one has computed."""
        return bool(self.running or self.waiting or self._launched)

    @property
    def is_short(self) -> bool:
        """Whether the running requests' next tokens may need more blocks than are free, while a step is on its way.

        Better to wait for it, as it may end a request, than to preempt one.
        """
        if not self._launched or self.blocks.num_free >= len(self.running):  # one each is the most that they need
            return False
        needed = sum(
            self._num_blocks(request.num_tokens + request.num_unread_tokens) - len(request.block_table)
            for request in self.running
        )
        return needed > self.blocks.num_free

    def add(self, request: Request) -> None:
        """Queue a request that `Engine.validate` has let through. Its id is not in use."""
        self._arrivals += 1
        request.arrival = self._arrivals
        if self._longest_sharing_prompt is not None and request.num_prompt_tokens > self._longest_sharing_prompt:
            request.prefix_root = root(request.cache_salt, request.num_prompt_tokens)
        self._wait(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.arrival, request.request_id))
        if len(self._queue) + len(self._deadlines) > 4 * (len(self.waiting) + len(self.running)) + COMPACT_BEYOND:
            self._compact()

    def abort(self, request_id: str) -> bool:
        """End a request without a word and free its blocks. False if it is not (or no longer) here."""
        if self.waiting.pop(request_id, None):
            return True
        for request in self.running:
            if request.request_id == request_id:
                self._end([request])
                return True
        return False

    def expire(self, now: float) -> list[TokenOutput]:
        """End the requests whose deadline has passed, waiting or running."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, arrival, request_id = heapq.heappop(self._deadlines)
            if (request := self._find(request_id)) is not None and request.arrival == arrival:
                self.abort(request_id)
                outputs.append(TokenOutput(request.request_id, [], "deadline", request.num_cached_tokens))
        return outputs

    def schedule(self) -> ScheduledStep:
        """Fill one step's token budget. Raises nothing: a request that cannot run waits. The step is on its way until
        `commit` or `fail`.
        """
        budget = self.config.max_num_batched_tokens
        step: list[ScheduledRequest] = []

        # A request makes room by preempting the last by rank, which is never one that this step has already scheduled.
        index = 0
        while budget and index < len(self.running):
            request = self.running[index]
            if self._has_its_last_token(request):
                index += 1
                continue
            scheduled = self._grant(request, budget)
            if self._make_room(scheduled):
                step.append(scheduled)
                budget -= scheduled.num_tokens
                index += 1

        while budget and len(self.running) < self.config.max_num_seqs:
            first = self._next_waiting()
            if first is None or not self._admit(first):  # nothing behind it may overtake
                break
            step.append(self._grant(first, budget))
            budget -= step[-1].num_tokens

        return self._launch(ScheduledStep(tuple(step)))

    def commit(self, step: ScheduledStep, sampled: Sampled) -> list[TokenOutput]:
        """Take in the results of the step that was scheduled first of those on their way: one entry of `sampled` for
        each of its samples, in order. Of requests that have left since, nothing is taken in.
        """
        if not step.requests:  # it was never on its way
            return []
        outputs, ended, first = [], [], 0
        for scheduled in step.requests:
            request = scheduled.request
            samples = slice(first, first + scheduled.num_samples)
            first = samples.stop
            if scheduled.epoch != request.epoch:
                continue
            request.num_launched_tokens -= scheduled.num_tokens
            request.num_unread_tokens -= scheduled.num_samples
            accepted = self._accept(scheduled, sampled.token_ids[samples])
            taken, reason = self._extend(request, accepted)
            known = scheduled.start + scheduled.num_tokens - len(scheduled.draft_ids)
            request.num_computed_tokens = min(known + max(len(accepted) - 1, 0), request.num_tokens)
            self._offer_prefix(request, scheduled.start)
            if scheduled.num_samples:
                logprobs = sampled.logprobs[samples] if sampled.logprobs else None
                attention = sampled.attention[samples] if sampled.attention else None
                outputs.append(TokenOutput.of(request, taken, reason, logprobs, attention))
            if reason:
                ended.append(request)
            elif taken and self._speculates(request):
                self._drafter.propose(request, taken)
        self._end(ended)
        _, given_back = self._launched.popleft()
        self._release(given_back)
        return outputs

    def fail(self) -> list[TokenOutput]:
        """End every request of the steps on their way: one of them could not be computed."""
        requests, tables = [], []
        for step, given_back in self._launched:
            requests += [item.request for item in step.requests if item.epoch == item.request.epoch]
            tables += given_back
        requests = list(dict.fromkeys(requests))
        self._launched.clear()
        self._end(requests)
        self._release(tables)
        return [TokenOutput(request.request_id, [], "error", request.num_cached_tokens) for request in requests]

    def take_departed(self) -> list[Request]:
        """The requests that have left `running` since the last call."""
        departed, self._departed = self._departed, []
        return departed

    def check_integrity(self) -> None:
        """Assert that every block is either free, or on the table of a running request, or given back by one that left
        while a step was on its way.
        """
        for request in self.waiting.values():
            assert not request.block_table, "a waiting request holds blocks"
            assert request.num_computed_tokens == 0, "a waiting request counts on a cache that it has given back"
        assert self.running == sorted(self.running, key=lambda request: request.rank), "running is out of order"
        held = [table for _, given_back in self._launched for table in given_back]
        self.blocks.check([*held, *(request.block_table for request in self.running)])

    def _launch(self, step: ScheduledStep) -> ScheduledStep:
        """Keep the books of a step that is on its way from now on."""
        for scheduled in step.requests:
            scheduled.request.num_launched_tokens += scheduled.num_tokens
            scheduled.request.num_unread_tokens += scheduled.num_samples
        if step.requests:
            self._launched.append((step, []))
        return step

    def _has_its_last_token(self, request: Request) -> bool:
        """Whether the token that is on its way is the last that the request may have."""
        return request.num_output_tokens + request.num_unread_tokens >= request.params.max_tokens

    def _grant(self, request: Request, budget: int) -> ScheduledRequest:
        """What this request computes in this step: its tokens as far as they fit, then its guesses."""
        start = request.num_computed_tokens + request.num_launched_tokens
        missing = request.num_tokens + request.num_unread_tokens - start
        if missing > budget:
            return ScheduledRequest(request, start, budget, (), 0, request.epoch)
        drafts = self._affordable_drafts(request, budget - missing)
        return ScheduledRequest(request, start, missing + len(drafts), drafts, 1 + len(drafts), request.epoch)

    def _affordable_drafts(self, request: Request, budget: int) -> tuple[int, ...]:
        """Guesses are worth a free block, never a preemption; and a large batch leaves no compute idle for them."""
        if request.draft_credit <= 0 or len(self.running) > self.config.speculation_max_seqs:
            return ()
        free = (self.blocks.num_free + len(request.block_table)) * self.config.block_size - request.num_tokens
        return tuple(request.draft_ids[: max(min(budget, free), 0)])

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _make_room(self, scheduled: ScheduledRequest) -> bool:
        """Give a running request the blocks for its next tokens, preempting the last by rank where none are free.

        False if the request itself was the last and had to go.
        """
        request = scheduled.request
        missing = self._num_blocks(scheduled.start + scheduled.num_tokens) - len(request.block_table)
        while missing > self.blocks.num_free:
            last = self.running[-1]
            self._preempt(last)
            if last is request:
                return False
        if missing > 0:
            request.block_table += self.blocks.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        """Send a running request back to its place in the queue; its keys and values are computed again."""
        self._end([request])
        request.num_computed_tokens = 0
        self._wait(request)
        self.num_preemptions += 1

    def _wait(self, request: Request) -> None:
        self.waiting[request.request_id] = request
        heapq.heappush(self._queue, (request.rank, request.request_id))

    def _find(self, request_id: str) -> Request | None:
        """A live request."""
        running = (request for request in self.running if request.request_id == request_id)
        return self.waiting.get(request_id) or next(running, None)

    def _waiting_at(self, rank: tuple[int, int], request_id: str) -> Request | None:
        """Who waits there; None where the request is gone, also where another has its id by now."""
        request = self.waiting.get(request_id)
        return request if request is not None and request.rank == rank else None

    def _compact(self) -> None:
        """Drop what the heaps still hold of requests that are gone. Amortized over the adds, it costs O(1)."""
        self._queue = [entry for entry in self._queue if self._waiting_at(*entry)]
        live = {request.arrival for request in (*self.running, *self.waiting.values())}
        self._deadlines = [entry for entry in self._deadlines if entry[1] in live]
        heapq.heapify(self._queue)
        heapq.heapify(self._deadlines)

    def _next_waiting(self) -> Request | None:
        while self._queue:
            if (request := self._waiting_at(*self._queue[0])) is not None:
                return request
            heapq.heappop(self._queue)
        return None

    def _admit(self, request: Request) -> bool:
        """Move a request from waiting to running, if there are blocks for all of its known tokens.

        For all, not for the first chunk alone: else two long prompts could each take half of the pool and preempt each
        other. Output is not reserved for.
        """
        if request.leader in self.running and not request.leader.has_prompt_computed:
            return False
        cached = self._match_prefix(request)
        missing = self._num_blocks(request.num_tokens) - len(cached)
        idle = sum(self.blocks.references(block) == 0 for block in cached)
        if missing + idle > self.blocks.num_free:
            return False
        self.blocks.share(cached)
        request.block_table = cached + self.blocks.allocate(missing)
        request.num_computed_tokens = len(cached) * self.config.block_size
        # A resumed request may hit on its own output: only what was saved of the prompt is reported.
        request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
        self.prefix.queried_tokens += request.num_tokens
        self.prefix.hit_tokens += request.num_computed_tokens
        del self.waiting[request.request_id]
        heapq.heappop(self._queue)
        insort(self.running, request, key=lambda running: running.rank)
        if self._speculates(request):
            self._drafter.begin(request)
        return True

    def _match_prefix(self, request: Request) -> list[int]:
        """Cached blocks that this request can share: never all of its tokens, since the last must give logits; and
        none where the logits of the prompt itself are asked for.
        """
        if not self.config.prefix_cache or request.wants_prompt_logprobs:
            return []
        matchable = (request.num_tokens - 1) // self.config.block_size
        return self.prefix.match(request.hash_blocks(matchable, self.config.block_size))

    def _offer_prefix(self, request: Request, start: int) -> None:
        """Register the blocks that this step has filled."""
        if not self.config.prefix_cache:
            return
        full = request.num_computed_tokens // self.config.block_size
        first = start // self.config.block_size
        if full > first:
            hashes = request.hash_blocks(full, self.config.block_size)
            for index in range(first, full):
                self.prefix.register(hashes[index], request.block_table[index])

    def _speculates(self, request: Request) -> bool:
        """Penalties look at the tokens so far, which a guess would falsify."""
        return self.config.speculative_tokens > 0 and not request.params.penalizes

    def _accept(self, scheduled: ScheduledRequest, sampled: Sequence[int | None]) -> list[int | None]:
        """The sampled tokens that stand behind right guesses only: the first always, each next if the guess before it
        is what was sampled there.
        """
        accepted = list(sampled[:1])
        for draft, following in zip(scheduled.draft_ids, sampled[1:], strict=False):
            if accepted[-1] != draft:
                break
            accepted.append(following)
        if scheduled.draft_ids:
            self.num_drafted += len(scheduled.draft_ids)
            self.num_accepted += len(accepted) - 1
        return accepted

    def _extend(self, request: Request, token_ids: Sequence[int | None]) -> tuple[list[int], FinishReason | None]:
        """Append new tokens up to the one that ends the request, and say why it ends."""
        taken: list[int] = []
        for token_id in token_ids:
            if token_id is None:
                return taken, "error"
            request.token_ids.append(token_id)
            taken.append(token_id)
            if reason := self._finish_reason(request, token_id):
                return taken, reason
        return taken, None

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        params = request.params
        if (token_id in self._eos_token_ids and not params.ignore_eos) or token_id in params.stop_token_ids:
            return "stop"
        if request.num_output_tokens >= params.max_tokens:
            return "length"
        return None

    def _end(self, requests: Sequence[Request]) -> None:
        """Take running requests out. Their blocks go free when the last step that is on its way has come in."""
        if not requests:
            return
        gone = {request.request_id for request in requests}
        self.running = [request for request in self.running if request.request_id not in gone]
        for request in requests:
            request.epoch += 1
            request.num_launched_tokens = request.num_unread_tokens = 0
        tables = [request.block_table for request in requests]
        for request in requests:
            request.block_table = []
        if self._launched:
            self._launched[-1][1].extend(tables)
        else:
            self._release(tables)
        self._departed += requests

    def _release(self, tables: Sequence[list[int]]) -> None:
        for table in tables:
            self.blocks.release(table)

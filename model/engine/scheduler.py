"""Decides what the next step computes. Pure Python: no torch, no clock, no I/O.

One rule serves prefill, decode, chunks, prefix hits and resumption. A request has tokens (prompt and output) and
`num_computed_tokens` of them whose keys and values lie in the cache; a step schedules some of the rest. Running
requests go first, so a long prompt can delay them by at most one chunk.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from model.cache.blocks import BlockPool
from model.cache.prefix import PrefixCache
from model.config import EngineConfig
from model.engine.request import FinishReason, Request, TokenOutput


class ScheduledRequest(NamedTuple):
    """Tokens [start, start + num_tokens) of a request are computed in this step.

    samples: these are the last known tokens, so the step gives the next one.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool


class ScheduledStep(NamedTuple):
    """What one step computes. Immutable: it is read by the runner while nothing else may change."""

    requests: tuple[ScheduledRequest, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes, over all requests."""
        return sum(scheduled.num_tokens for scheduled in self.requests)


class Scheduler:
    """Holds every live request, waiting or running, and the blocks they stand in."""

    def __init__(self, config: EngineConfig, num_blocks: int, eos_token_ids: Sequence[int]) -> None:
        self.config = config
        self.prefix = PrefixCache()
        self.blocks = BlockPool(num_blocks, on_reuse=self.prefix.forget)
        self.waiting: OrderedDict[str, Request] = OrderedDict()  # first come, first served
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self._eos_token_ids = frozenset(eos_token_ids)

    @property
    def has_work(self) -> bool:
        """Whether a step would compute anything."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        """Queue a request that `Engine.validate` has let through. Its id is not in use."""
        self.waiting[request.request_id] = request

    def abort(self, request_id: str) -> bool:
        """End a request without a word and free its blocks. False if it is not (or no longer) here."""
        if self.waiting.pop(request_id, None):
            return True
        for request in self.running:
            if request.request_id == request_id:
                self._end([request])
                return True
        return False

    def schedule(self) -> ScheduledStep:
        """Fill one step's token budget. Raises nothing: a request that cannot run waits."""
        budget = self.config.max_num_batched_tokens
        step: list[ScheduledRequest] = []

        # A request makes room by preempting the newest, which is never one that this step has already scheduled.
        while budget and len(step) < len(self.running):
            request = self.running[len(step)]
            num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            if self._make_room(request, num_tokens):
                step.append(self._grant(request, num_tokens))
                budget -= num_tokens

        while budget and self.waiting and len(self.running) < self.config.max_num_seqs:
            request = next(iter(self.waiting.values()))
            if not self._admit(request):  # not enough free blocks: nothing behind it may overtake
                break
            num_tokens = min(request.num_tokens - request.num_computed_tokens, budget)
            step.append(self._grant(request, num_tokens))
            budget -= num_tokens

        return ScheduledStep(tuple(step))

    def commit(self, step: ScheduledStep, next_ids: Sequence[int]) -> list[TokenOutput]:
        """Take in a step's results. next_ids: one for each request that samples, in the step's order."""
        outputs, ended = [], []
        sampled = iter(next_ids)
        for request, start, num_tokens, samples in step.requests:
            request.num_computed_tokens = start + num_tokens
            self._offer_prefix(request, start)
            if samples:
                token_id = next(sampled)
                request.token_ids.append(token_id)
                reason = self._finish_reason(request, token_id)
                outputs.append(TokenOutput(request.request_id, [token_id], reason, request.num_cached_tokens))
                if reason:
                    ended.append(request)
        self._end(ended)
        return outputs

    def fail(self, step: ScheduledStep) -> list[TokenOutput]:
        """End every request of a step that could not be computed."""
        requests = [scheduled.request for scheduled in step.requests]
        self._end(requests)
        return [TokenOutput(request.request_id, [], "error", request.num_cached_tokens) for request in requests]

    def check_integrity(self) -> None:
        """Assert that every block is either free or on the table of a running request."""
        assert all(not request.block_table for request in self.waiting.values()), "a waiting request holds blocks"
        self.blocks.check(request.block_table for request in self.running)

    def _grant(self, request: Request, num_tokens: int) -> ScheduledRequest:
        start = request.num_computed_tokens
        return ScheduledRequest(request, start, num_tokens, samples=start + num_tokens == request.num_tokens)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Give a running request the blocks for its next tokens, preempting the newest requests where none are free.

        False if the request itself was the newest and had to go.
        """
        missing = self._num_blocks(request.num_computed_tokens + num_tokens) - len(request.block_table)
        while missing > self.blocks.num_free:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        if missing > 0:
            request.block_table += self.blocks.allocate(missing)
        return True

    def _preempt(self, request: Request) -> None:
        """Send the newest running request back to the head of the queue; its keys and values are computed again."""
        self._end([request])
        request.num_computed_tokens = 0
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)
        self.num_preemptions += 1

    def _admit(self, request: Request) -> bool:
        """Move a request from waiting to running, if there are blocks for all of its known tokens.

        For all, not for the first chunk alone: else two long prompts could each take half of the pool and preempt each
        other. Output is not reserved for.
        """
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
        self.running.append(self.waiting.pop(request.request_id))
        return True

    def _match_prefix(self, request: Request) -> list[int]:
        """Cached blocks that this request can share: never all of its tokens, since the last must give logits."""
        if not self.config.prefix_cache:
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

    def _finish_reason(self, request: Request, token_id: int) -> FinishReason | None:
        if token_id in self._eos_token_ids and not request.params.ignore_eos:
            return "stop"
        if request.num_output_tokens >= request.params.max_tokens:
            return "length"
        return None

    def _end(self, requests: Sequence[Request]) -> None:
        """Take running requests out and free their blocks."""
        if not requests:
            return
        gone = {request.request_id for request in requests}
        self.running = [request for request in self.running if request.request_id not in gone]
        for request in requests:
            self.blocks.release(request.block_table)
            request.block_table = []

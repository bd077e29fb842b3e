"""From pieces of token ids to pieces of text: what one HTTP request gets, streamed or whole, through the same lines."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

from model.errors import InvalidRequest
from model.sampling.params import SamplingParams, sibling_seed
from model.text.chat_template import ChatTemplate
from model.text.detokenize import Detokenizer
from model.text.tokenizer import Tokenizer
from service.api.schemas import SamplingFields
from service.call import Call
from service.channel import Work
from service.dispatch import Dispatcher
from service.limits import Limits
from service.metrics import IngressMetrics
from service.streams import Generation, Piece

# Longer texts are tokenized in a thread, so that they do not hold up other clients' streams.
LONG_TEXT = 8_192


@dataclass(frozen=True)
class Service:
    """What the routes work with: one model, its text side, and the engines behind it."""

    model_name: str
    created: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    dispatcher: Dispatcher
    metrics: IngressMetrics
    limits: Limits


class Delta(NamedTuple):
    """New text of one choice; the last of a choice has its finish reason."""

    choice: int
    text: str
    finish_reason: str | None


class Choice:
    """One of the texts being written, and the clock of its tokens."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self.first_at = 0.0
        self.last_at = 0.0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._detokenizer = detokenizer

    @property
    def num_tokens(self) -> int:
        """Tokens taken in; those behind a stop string do not count."""
        return self._detokenizer.num_tokens

    def feed(self, piece: Piece) -> str:
        """The text that these tokens make safe to show. Sets `finish_reason` when the choice is over."""
        text = self._detokenizer.feed(piece.token_ids)
        if piece.finish_reason is not None:
            text += self._detokenizer.flush()
            self.finish_reason = piece.finish_reason
        if self._detokenizer.stopped:
            self.finish_reason = "stop"
        return text


class Completion:
    """All choices of one request. Iterate it for the text; close it whatever happens."""

    def __init__(
        self,
        service: Service,
        generation: Generation,
        prompts: Sequence[list[int]],
        stop: Sequence[str],
        call: Call,
    ) -> None:
        self._service = service
        self._call = call
        self._generation = generation
        self._choices_per_prompt = len(generation.streams) // len(prompts)
        self._choices = [Choice(Detokenizer(service.tokenizer, stop)) for _ in generation.streams]
        self._first: list[Piece] = []
        self._num_prompt_tokens = sum(map(len, prompts))

    @classmethod
    async def start(
        cls,
        service: Service,
        call: Call,
        prompts: Sequence[list[int]],
        fields: SamplingFields,
        max_tokens: int | None,
    ) -> Self:
        """Submit the request and wait for its first token, so that a failure still has a status code of its own.

        max_tokens: for each choice; None means all that the context has room for.
        Raises `InvalidRequest` and `ServiceError`.
        """
        service.limits.check_prompts(prompts)
        info = await service.dispatcher.describe()
        n = fields.n or 1
        num_choices = n * len(prompts)
        max_choices = min(service.limits.max_choices, info.capacity)
        if num_choices > max_choices:
            raise InvalidRequest(
                f"{len(prompts)} prompts times n={n} are {num_choices} choices; "
                f"at most {max_choices} are served in one request",
                param="n" if n > 1 else "prompt",
            )
        seed = secrets.randbits(63) if fields.seed is None else fields.seed
        works = []
        for ids in prompts:
            limit = max_tokens or max(1, info.max_model_len - len(ids))
            works += [Work(ids, _sampling_params(fields, limit, sibling_seed(seed, choice))) for choice in range(n)]
        call.reserve(sum(map(len, prompts)) + sum(work.params.max_tokens for work in works))
        try:
            async with call.in_time():
                generation = await service.dispatcher.open(
                    works, deadline=call.deadline, max_unread_tokens=service.limits.max_unread_tokens
                )
        except BaseException:
            call.settle(0)
            raise
        completion = cls(service, generation, prompts, fields.stop_strings, call)
        try:
            completion._first = await completion._next()
            completion._raise_first_error(completion._first)
        except BaseException:
            completion.close()
            raise
        return completion

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Yield what arrived together, together. Raises `ServiceError` when a choice cannot go on."""
        pieces, self._first = self._first, []
        while True:
            now = time.perf_counter()
            deltas = [delta for piece in pieces if (delta := self._write(piece, now)) is not None]
            if deltas:
                yield deltas
            self._raise_first_error(pieces)
            if all(choice.finish_reason is not None for choice in self._choices):
                return
            pieces = await self._next()

    async def texts(self) -> list[tuple[str, str]]:
        """Wait for the end: the whole text and the finish reason of each choice. Raises `ServiceError`."""
        texts: list[list[str]] = [[] for _ in self._choices]
        async for deltas in self:
            for delta in deltas:
                texts[delta.choice].append(delta.text)
        reasons = [choice.finish_reason or "" for choice in self._choices]
        return [("".join(parts), reason) for parts, reason in zip(texts, reasons, strict=True)]

    def usage(self) -> dict[str, object]:
        """OpenAI's `usage`, as of now. A prompt counts once, however many choices it has."""
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._num_prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens()},
        }

    def close(self) -> None:
        """Abort what still runs, and count the request. Call it once: the client has everything, or has left."""
        metrics = self._service.metrics
        self._service.dispatcher.abort(self._generation.streams)
        metrics.prompt_tokens.inc(self._num_prompt_tokens)
        metrics.cached_tokens.inc(self._num_cached_tokens())
        metrics.prompt_length.observe(self._num_prompt_tokens)
        self._call.settle(self._num_prompt_tokens + sum(choice.num_tokens for choice in self._choices))

    @property
    def is_overrun(self) -> bool:
        """Whether the request was given up because nobody took its tokens."""
        return self._generation.is_overrun

    def on_overrun(self, cut: Callable[[], object]) -> None:
        """Have `cut` called when it is given up for that."""
        self._generation.on_overrun.append(cut)

    async def _next(self) -> list[Piece]:
        """The next pieces. Raises `DeadlineExceeded`, whatever the engine is doing."""
        if self._call.deadline is None:
            return await self._generation.next()
        async with self._call.in_time():
            return await self._generation.next()

    def _num_cached_tokens(self) -> int:
        return sum(choice.num_cached_tokens for choice in self._choices[:: self._choices_per_prompt])

    def _write(self, piece: Piece, now: float) -> Delta | None:
        choice, metrics = self._choices[piece.choice], self._service.metrics
        if choice.finish_reason is not None or piece.error is not None:
            return None
        before = choice.num_tokens
        text = choice.feed(piece)
        if before == 0:
            choice.first_at = now
            choice.num_cached_tokens = piece.num_cached_tokens
            metrics.ttft.observe(now - self._call.arrived)
        else:
            metrics.itl.observe((now - choice.last_at) / max(1, choice.num_tokens - before))
        choice.last_at = now
        metrics.generation_tokens.inc(choice.num_tokens - before)
        if choice.finish_reason is not None:
            self._finish(piece.choice, now)
        elif not text:
            return None
        return Delta(piece.choice, text, choice.finish_reason)

    def _finish(self, index: int, now: float) -> None:
        choice, metrics = self._choices[index], self._service.metrics
        # A stop string ends the text while the engine is still writing.
        self._service.dispatcher.abort([self._generation.streams[index]])
        metrics.finished(choice.finish_reason or "")
        metrics.e2e.observe(now - self._call.arrived)
        metrics.generation_length.observe(choice.num_tokens)
        if choice.num_tokens > 1:
            metrics.tpot.observe((choice.last_at - choice.first_at) / (choice.num_tokens - 1))

    @staticmethod
    def _raise_first_error(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.error is not None:
                raise piece.error


async def encode(service: Service, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, without holding up the event loop when there is much to do."""

    def work() -> list[list[int]]:
        return [service.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    return work() if sum(map(len, texts)) <= LONG_TEXT else await asyncio.to_thread(work)


def _sampling_params(fields: SamplingFields, max_tokens: int, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        top_k=max(0, fields.top_k or 0),  # -1 is another server's word for "off"
        seed=seed,
        ignore_eos=bool(fields.ignore_eos),
    )

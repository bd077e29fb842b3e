"""From pieces of token ids to pieces of text: what one HTTP request gets, streamed or whole, through the same lines."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Self

from model.attention.weights import TokenAttention
from model.errors import InvalidRequest
from model.sampling.params import GrammarSpec, sibling_seed
from model.sampling.result import TokenLogprobs
from model.text.chat_template import ChatTemplate
from model.text.detokenize import Detokenizer
from model.text.tokenizer import Tokenizer
from service.api.schemas.sampling import GenerationFields
from service.call import Call
from service.channel import Work
from service.dispatch import Dispatcher
from service.drain import Drain
from service.exposition import ALONE, View
from service.limits import Limits
from service.metrics import IngressMetrics
from service.receipt import write_receipt
from service.streams import Generation, Piece
from service.usual import UsualLength

# Longer texts are tokenized in a thread, so that they do not hold up other clients' streams.
LONG_TEXT = 8_192


@dataclass(frozen=True)
class Service:
    """What the routes work with: one model, its text side, the engines behind it, and the ingresses beside it."""

    model_name: str
    created: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    dispatcher: Dispatcher
    metrics: IngressMetrics
    limits: Limits
    drain: Drain = field(default_factory=Drain)
    usual_length: UsualLength = field(default_factory=UsualLength)
    view: View = ALONE


Entry = tuple[int, TokenLogprobs | None]  # a token, and what is known of it: nothing of a prompt's first one
Look = tuple[int, TokenAttention]  # a token, and where the heads asked about looked when it was chosen


class Delta(NamedTuple):
    """New text of one choice; the last of a choice has its finish reason.

    For those who ask for log-probabilities: `tokens`, the new ones, whose text may still be held back; and `prompt`,
    once, with the first delta of the choice. For those who ask for attention weights: `looks`, of the new tokens.
    """

    choice: int
    text: str
    finish_reason: str | None
    tokens: Sequence[Entry] = ()
    prompt: Sequence[Entry] = ()
    looks: Sequence[Look] = ()


@dataclass
class Written:
    """A whole choice."""

    text: str
    finish_reason: str
    tokens: list[Entry]
    prompt: list[Entry]
    looks: list[Look]

    @property
    def mean_logprob(self) -> float:
        """By which choices of different lengths are compared."""
        return sum(entry.logprob for _, entry in self.tokens if entry is not None) / max(1, len(self.tokens))


class Choice:
    """One of the texts being written, and the clock of its tokens.

    An empty one is over with the engine's first answer, which it leaves aside: who scores a prompt wants nothing else.
    """

    def __init__(self, detokenizer: Detokenizer, prompt_ids: Sequence[int], *, empty: bool) -> None:
        self.first_at = 0.0
        self.last_at = 0.0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self._detokenizer = detokenizer
        self._empty = empty
        self._untold_prompt = prompt_ids

    @property
    def num_tokens(self) -> int:
        """Tokens taken in; those behind a stop string do not count."""
        return self._detokenizer.num_tokens

    def feed(self, piece: Piece) -> str:
        """The text that these tokens make safe to show. Sets `finish_reason` when the choice is over."""
        if self._empty:
            self.finish_reason = "length"
            return ""
        text = self._detokenizer.feed(piece.token_ids)
        if piece.finish_reason is not None:
            text += self._detokenizer.flush()
            self.finish_reason = piece.finish_reason
        if self._detokenizer.stopped:
            self.finish_reason = "stop"
        return text

    def take_prompt(self, piece: Piece) -> list[Entry]:
        """What is known of the prompt's tokens, once: an engine that takes over before any token tells it again."""
        if piece.details is None or piece.details.prompt_logprobs is None:
            return []
        prompt_ids, self._untold_prompt = self._untold_prompt, ()
        return list(zip(prompt_ids, piece.details.prompt_logprobs, strict=False))


class Completion:
    """All choices of one request. Iterate it for the text; close it whatever happens.

    call: the request that it answers.
    """

    def __init__(
        self,
        service: Service,
        generation: Generation,
        prompts: Sequence[list[int]],
        fields: GenerationFields,
        call: Call,
        *,
        empty: bool,
    ) -> None:
        self._service = service
        self.call = call
        self._generation = generation
        self._fields = fields
        self._choices = [
            Choice(
                Detokenizer(service.tokenizer, fields.stop_strings, fields.min_tokens or 0),
                stream.work.prompt_ids,
                empty=empty,
            )
            for stream in generation.streams
        ]
        self._first: list[Piece] = []
        self._num_prompt_tokens = sum(map(len, prompts))

    @classmethod
    async def start(
        cls,
        service: Service,
        call: Call,
        prompts: Sequence[list[int]],
        fields: GenerationFields,
        max_tokens: int | None,
        grammar: GrammarSpec | None = None,
    ) -> Self:
        """Submit the request and wait for its first token, so that a failure still has a status code of its own.

        max_tokens: for each choice; None means all that the context has room for, 0 the prompt alone.
        grammar: what each choice is held to.
        Raises `InvalidRequest` and `ServiceError`.
        """
        info = await service.dispatcher.describe()
        service.limits.check_prompts(prompts, info.max_model_len)
        _check_choices(len(prompts), fields, min(service.limits.max_choices, info.capacity))
        usual = service.usual_length.tokens(info.max_model_len)
        works = list(_works(prompts, fields, call, max_tokens, grammar, info.max_model_len, usual))
        call.asked = fields
        generation = await _open(service, call, works, sum(map(len, prompts)))
        completion = cls(service, generation, prompts, fields, call, empty=max_tokens == 0)
        try:
            completion._first = await completion._next()
            call.first_token_at = time.perf_counter()
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

    async def whole(self) -> list[Written]:
        """Wait for the end: every choice, or of several candidates the best, best first. Raises `ServiceError`."""
        choices = [Written("", "", [], [], []) for _ in self._choices]
        texts: list[list[str]] = [[] for _ in self._choices]
        async for deltas in self:
            for delta in deltas:
                texts[delta.choice].append(delta.text)
                choices[delta.choice].tokens += delta.tokens
                choices[delta.choice].prompt += delta.prompt
                choices[delta.choice].looks += delta.looks
        for choice, parts, clock in zip(choices, texts, self._choices, strict=True):
            choice.text, choice.finish_reason = "".join(parts), clock.finish_reason or ""
        count, n = self._fields.num_candidates, self._fields.num_choices
        if count == n:
            return choices
        groups = [choices[start : start + count] for start in range(0, len(choices), count)]
        return [best for group in groups for best in sorted(group, key=lambda one: -one.mean_logprob)[:n]]

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`, as of now. A prompt counts once, however many choices it has."""
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._num_prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._num_cached_tokens()},
        }

    async def ending(self, *, with_usage: bool = True) -> dict[str, object]:
        """What an answer says at its end, as far as it was asked for: `usage`, `receipt`."""
        ending: dict[str, object] = {"usage": self.usage()} if with_usage else {}
        if self.call.wants_receipt:
            noted, resumes = await self.call.engine_receipt(), self._generation.streams[0].resumes
            ending["receipt"] = write_receipt(self.call, noted, self._num_cached_tokens(), resumes)
        return ending

    def close(self) -> None:
        """Abort what still runs, and count the request. Call it once: the client has everything, or has left."""
        metrics = self._service.metrics
        self._service.dispatcher.release(self._generation)
        metrics.prompt_tokens.inc(self._num_prompt_tokens)
        metrics.cached_tokens.inc(self._num_cached_tokens())
        metrics.prompt_length.observe(self._num_prompt_tokens)
        num_generated = sum(choice.num_tokens for choice in self._choices)
        for choice, stream in zip(self._choices, self._generation.streams, strict=True):
            if choice.num_tokens and stream.work.params.usual_tokens is not None:
                self._service.usual_length.observe(choice.num_tokens)
        self.call.settle(self._num_prompt_tokens + num_generated)
        self.call.log.update(
            prompt_tokens=self._num_prompt_tokens,
            cached_tokens=self._num_cached_tokens(),
            completion_tokens=num_generated,
            finish_reasons=[choice.finish_reason for choice in self._choices],
            resumes=max(stream.resumes for stream in self._generation.streams) or None,
        )

    @property
    def is_overrun(self) -> bool:
        """Whether the request was given up because nobody took its tokens."""
        return self._generation.is_overrun

    def on_overrun(self, cut: Callable[[], object]) -> None:
        """Have `cut` called when it is given up for that."""
        self._generation.on_overrun.append(cut)

    async def _next(self) -> list[Piece]:
        """The next pieces. Raises `DeadlineExceeded`, whatever the engine is doing."""
        if self.call.deadline is None:
            return await self._generation.next()
        async with self.call.in_time():
            return await self._generation.next()

    def _num_cached_tokens(self) -> int:
        return sum(choice.num_cached_tokens for choice in self._choices[:: self._fields.num_candidates])

    def _write(self, piece: Piece, now: float) -> Delta | None:
        choice, metrics = self._choices[piece.choice], self._service.metrics
        if choice.finish_reason is not None or piece.error is not None:
            return None
        before = choice.num_tokens
        text = choice.feed(piece)
        if self.call.wants_receipt:
            self.call.detokenize_seconds += time.perf_counter() - now
        if before == 0:
            choice.first_at = now
            choice.num_cached_tokens = piece.num_cached_tokens
            metrics.ttft.observe(now - self.call.arrived)
        elif count := choice.num_tokens - before:
            metrics.itl.observe((now - choice.last_at) / count, count)
        choice.last_at = now
        metrics.generation_tokens.inc(choice.num_tokens - before)
        if choice.finish_reason is not None:
            self._finish(piece, now)
        if piece.details is None:
            return Delta(piece.choice, text, choice.finish_reason) if text or choice.finish_reason is not None else None
        token_ids = piece.token_ids[: choice.num_tokens - before]
        entries = list(zip(token_ids, piece.details.logprobs or (), strict=False))
        looks = list(zip(token_ids, piece.details.attention or (), strict=False))
        return Delta(piece.choice, text, choice.finish_reason, entries, choice.take_prompt(piece), looks)

    def _finish(self, piece: Piece, now: float) -> None:
        choice, metrics = self._choices[piece.choice], self._service.metrics
        # A stop string ends the text while the engine is still writing.
        self._service.dispatcher.abort([self._generation.streams[piece.choice]])
        metrics.finished(choice.finish_reason or "")
        metrics.e2e.observe(now - self.call.arrived)
        if piece.details is not None and piece.details.engine_seconds is not None:
            metrics.overhead.observe(now - self.call.arrived - piece.details.engine_seconds)
        metrics.generation_length.observe(choice.num_tokens)
        if choice.num_tokens > 1:
            metrics.tpot.observe((choice.last_at - choice.first_at) / (choice.num_tokens - 1))

    @staticmethod
    def _raise_first_error(pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            if piece.error is not None:
                raise piece.error


def _check_choices(num_prompts: int, fields: GenerationFields, most: int) -> None:
    """Raises `InvalidRequest` where one request wants more choices than are served in one."""
    count = fields.num_candidates
    if count * num_prompts > most:
        name = "best_of" if count > fields.num_choices else "n"
        raise InvalidRequest(
            f"{num_prompts} prompts times {name}={count} are {count * num_prompts} choices; "
            f"at most {most} are served in one request",
            param=name if count > 1 else "prompt",
        )


def _works(
    prompts: Sequence[list[int]],
    fields: GenerationFields,
    call: Call,
    max_tokens: int | None,
    grammar: GrammarSpec | None,
    max_model_len: int,
    usual_tokens: int,
) -> Iterator[Work]:
    """What the engine is to do for each choice, those of one prompt together. Raises `InvalidRequest`.

    usual_tokens: to reckon with for each choice, where `max_tokens` sets no limit.
    """
    seed = secrets.randbits(63) if fields.seed is None else fields.seed
    salt, priority = call.cache_salt(fields.cache_salt), fields.priority or 0
    for ids in prompts:
        limit = max(1, max_model_len - len(ids) if max_tokens is None else max_tokens)
        for choice in range(fields.num_candidates):
            params = fields.sampling(limit, sibling_seed(seed, choice))
            if max_tokens is None:
                params = replace(params, usual_tokens=usual_tokens)
            yield Work(ids, params, grammar, priority, salt, fields.inspection, call.session_key)


async def _open(service: Service, call: Call, works: Sequence[Work], num_prompt_tokens: int) -> Generation:
    """Submit them, if the key has the tokens left that they may need. Raises `ServiceError`.

    num_prompt_tokens: of each prompt once, however many choices it has.
    """
    call.max_tokens = works[0].params.max_tokens
    call.admitted_at = time.perf_counter()
    call.reserve(num_prompt_tokens + sum(work.params.tokens_left(0) for work in works))
    try:
        async with call.in_time():
            generation = await service.dispatcher.open(
                works,
                deadline=call.deadline,
                max_unread_tokens=service.limits.max_unread_tokens,
                timed=call.is_timed,
                trail=call.trail,
            )
    except BaseException:
        call.settle(0)
        raise
    call.fetch_receipt = partial(service.dispatcher.receipt, generation.streams[0])
    return generation


async def encode(service: Service, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
    """Token ids of each text, without holding up the event loop when there is much to do."""

    def work() -> list[list[int]]:
        return [service.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    return work() if sum(map(len, texts)) <= LONG_TEXT else await asyncio.to_thread(work)

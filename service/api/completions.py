"""`POST /v1/completions`: text or token ids in, text out."""

import time
import uuid
from collections.abc import Mapping, Sequence

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model.text.tokenizer import Tokenizer
from service.api import body as request_body
from service.api.attention import attention_of
from service.api.connection import while_connected
from service.api.logprobs import LogprobsWriter, prompt_logprobs
from service.api.schemas.completions import CompletionRequest
from service.api.sse import ChunkWriter, EventStream, event
from service.call import Call, call_of
from service.completion import Completion, Delta, Entry, Service, encode

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter()


@router.post("/v1/completions")
async def create_completion(request: Request) -> Response:
    """Continue one or more prompts."""
    service: Service = request.app.state.service
    body = await request_body.read(request, CompletionRequest, service.model_name)
    return await while_connected(request, service.metrics, _answer(service, call_of(request), body))


async def _answer(service: Service, call: Call, body: CompletionRequest) -> Response:
    prompts = body.token_prompts or await encode(service, body.texts)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    completion = await Completion.start(service, call, prompts, body, max_tokens, body.grammar)
    envelope = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    echoes = _echoes(service, body)
    if body.stream:
        return _stream(service, body, completion, envelope, echoes)
    return await _whole(service, body, completion, envelope, echoes)


def _echoes(service: Service, body: CompletionRequest) -> list[str]:
    """What comes before the text of each choice: its prompt, for those who ask for it."""
    if not body.echo:
        prompts = [""] * (len(body.texts) or len(body.token_prompts))
    else:
        prompts = body.texts or [service.tokenizer.decode(ids) for ids in body.token_prompts]
    return [prompt for prompt in prompts for _ in range(body.num_choices)]


def _stream(
    service: Service,
    body: CompletionRequest,
    completion: Completion,
    envelope: dict[str, object],
    echoes: Sequence[str],
) -> EventStream:
    with_usage = body.include_usage
    usage = completion.usage if body.counts_on else None
    writer = ChunkWriter(envelope, '"text":', ',"logprobs":null', with_usage=with_usage, usage=usage)

    def write(deltas: list[Delta]) -> bytes:
        return b"".join(writer.chunk(delta.choice, delta.text, delta.finish_reason) for delta in deltas)

    async def last() -> bytes:
        ending = await completion.ending(with_usage=with_usage)
        return event({**envelope, "choices": [], **ending}) if ending else b""

    if body.logprobs is not None or body.attention is not None:
        scribe = _Scribe(service, body, completion, envelope, echoes)
        return EventStream(completion, service.metrics, scribe.write, last=last)
    first = b"".join(writer.chunk(choice, echo, None) for choice, echo in enumerate(echoes) if echo)
    return EventStream(completion, service.metrics, write, first=first, last=last)


class _Scribe:
    """Chunks of more than text: log-probabilities, those of an echoed prompt before the others; attention weights."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        completion: Completion,
        envelope: Mapping[str, object],
        echoes: Sequence[str],
    ) -> None:
        self._envelope = {**envelope, **({"usage": None} if body.include_usage else {})}
        self._usage = completion.usage if body.counts_on else None
        self._body = body
        self._echoes = echoes
        self._tokenizer = service.tokenizer
        self._choices: dict[int, LogprobsWriter] = {}

    def write(self, deltas: list[Delta]) -> bytes:
        return b"".join(map(self._chunk, deltas))

    def _chunk(self, delta: Delta) -> bytes:
        echo = ""
        if delta.choice not in self._choices:
            echo = self._echoes[delta.choice]
            self._choices[delta.choice] = _logprobs_behind(self._tokenizer, echo, delta.prompt)
        choice = {"index": delta.choice, "text": echo + delta.text, "logprobs": None}
        if self._body.logprobs is not None:
            entries = [*(delta.prompt if echo else ()), *delta.tokens]
            choice["logprobs"] = self._choices[delta.choice].write(entries)
        if self._body.attention is not None:
            choice["attention"] = attention_of(delta.looks)
        choice["finish_reason"] = delta.finish_reason
        chunk = {**self._envelope, "choices": [choice]}
        return event(chunk if self._usage is None else {**chunk, "usage": self._usage()})


async def _whole(
    service: Service,
    body: CompletionRequest,
    completion: Completion,
    envelope: dict[str, object],
    echoes: Sequence[str],
) -> JSONResponse:
    try:
        choices = []
        for i, (written, echo) in enumerate(zip(await completion.whole(), echoes, strict=True)):
            choice = {"index": i, "text": echo + written.text, "logprobs": None, "finish_reason": written.finish_reason}
            if body.logprobs is not None:
                entries = [*(written.prompt if body.echo else ()), *written.tokens]
                choice["logprobs"] = _logprobs_behind(service.tokenizer, echo, written.prompt).write(entries)
            if body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(service.tokenizer, written.prompt)
            if body.attention is not None:
                choice["attention"] = attention_of(written.looks)
            choices.append(choice)
        return JSONResponse({**envelope, "choices": choices, **await completion.ending()})
    finally:
        completion.close()


def _logprobs_behind(tokenizer: Tokenizer, echo: str, prompt: Sequence[Entry]) -> LogprobsWriter:
    """The writer for a choice that begins with `echo`.

    A tokenizer may put a space before a text that has none; then its tokens say more than the text does.
    """
    start = len(echo) - len(tokenizer.decode([token_id for token_id, _ in prompt])) if echo else 0
    return LogprobsWriter(tokenizer, start)

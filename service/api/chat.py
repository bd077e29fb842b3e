"""`POST /v1/chat/completions`: messages in, the assistant's next one out."""

import asyncio
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model.errors import InvalidRequest
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service.api import body as request_body
from service.api.attention import attention_of
from service.api.connection import while_connected
from service.api.logprobs import chat_logprobs
from service.api.schemas.chat import ChatRequest, Message
from service.api.sse import ChunkWriter, EventStream, event
from service.api.tools import CallDelta, ToolPlan, ToolReader, plan_tools, read_whole
from service.call import Call, call_of
from service.completion import Completion, Delta, Service, Written, encode

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Write the assistant's next message."""
    service: Service = request.app.state.service
    body = await request_body.read(request, ChatRequest, service.model_name)
    return await while_connected(request, service.metrics, _answer(service, call_of(request), body))


async def _answer(service: Service, call: Call, body: ChatRequest) -> Response:
    completion, plan = await start(service, call, body)
    envelope = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    if body.stream:
        envelope["object"] = "chat.completion.chunk"
        return _stream(service, body, completion, plan, envelope)
    return await _whole(service, body, completion, plan, envelope)


async def start(service: Service, call: Call, body: ChatRequest) -> tuple[Completion, ToolPlan | None]:
    """Render the chat and have its answer begun. Raises `InvalidRequest` and `ServiceError`."""
    template = template_of(service)
    plan = plan_tools(body, template, service.tokenizer)
    prompt = await render(service, template, body.messages, plan)
    grammar = body.grammar if plan is None else plan.grammar
    try:
        return await Completion.start(service, call, [prompt], body, body.token_limit, grammar), plan
    except InvalidRequest as error:
        if error.param == "prompt":  # the engine's word for what a chat calls its messages
            error.param = "messages"
        elif plan is not None and grammar is not None and error.param == grammar.param:
            error.param = "tools"
        raise


def template_of(service: Service) -> ChatTemplate:
    """The model's chat template. Raises `InvalidRequest` where it has none."""
    if service.chat_template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    return service.chat_template


async def render(
    service: Service,
    template: ChatTemplate,
    chat: Sequence[Message],
    plan: ToolPlan | None = None,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of a chat. Raises `InvalidRequest` for what the template refuses, or would leave out."""
    messages = [message.for_template() for message in chat]
    if "tool_calls" not in template.source and any("tool_calls" in message for message in messages):
        raise InvalidRequest("this model's chat template knows no tool calls", param="messages")
    tools = None if plan is None else plan.described

    def work() -> str:
        return template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)

    text = await asyncio.to_thread(work)  # it waits for a process
    # The template writes the special tokens itself.
    (prompt,) = await encode(service, [text], add_special_tokens=False)
    return prompt


def _stream(
    service: Service,
    body: ChatRequest,
    completion: Completion,
    plan: ToolPlan | None,
    envelope: dict[str, object],
) -> EventStream:
    with_usage = body.include_usage
    usage = completion.usage if body.counts_on else None
    writing = partial(ChunkWriter, envelope, with_usage=with_usage, usage=usage)
    writer = writing('"delta":{"content":', '},"logprobs":null')
    closing = writing('"delta":', ',"logprobs":null')
    opening = writing('"delta":{"role":"assistant","content":', '},"logprobs":null')

    def write(deltas: list[Delta]) -> bytes:
        chunks = []
        for delta in deltas:
            if delta.text:
                chunks.append(writer.chunk(delta.choice, delta.text, None))
            if delta.finish_reason is not None:
                chunks.append(closing.chunk(delta.choice, None, delta.finish_reason))
        return b"".join(chunks)

    async def last() -> bytes:
        ending = await completion.ending(with_usage=with_usage)
        return event({**envelope, "choices": [], **ending}) if ending else b""

    first = b"".join(opening.chunk(choice, "", None) for choice in range(body.num_choices))
    if plan is not None or body.logprobs or body.attention is not None:
        scribe = _Scribe(service, body, completion, plan, envelope)
        return EventStream(completion, service.metrics, scribe.write, first=first, last=last)
    return EventStream(completion, service.metrics, write, first=first, last=last)


class _Scribe:
    """Chunks of more than text: calls of tools, log-probabilities, attention weights."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        completion: Completion,
        plan: ToolPlan | None,
        envelope: Mapping[str, object],
    ) -> None:
        self._envelope = {**envelope, **({"usage": None} if body.include_usage else {})}
        self._usage = completion.usage if body.counts_on else None
        self._tokenizer = service.tokenizer
        self._body = body
        self._readers = [None if plan is None else ToolReader(plan.syntax) for _ in range(body.num_choices)]

    def write(self, deltas: list[Delta]) -> bytes:
        """What the plain writer does, slower."""
        return b"".join(chunk for delta in deltas for chunk in self._chunks(delta))

    def _chunks(self, delta: Delta) -> Iterator[bytes]:
        reader, reason = self._readers[delta.choice], delta.finish_reason
        parts: list[str | CallDelta] = [delta.text] if delta.text else []
        if reader is not None:
            parts = reader.feed(delta.text)
            if reason is not None:
                parts.append(reader.flush())
                reason = "tool_calls" if reason == "stop" and reader.num_calls else reason
        # What is told of a step's tokens goes with the first chunk that it gives, if need be an empty one.
        details, untold = _details(self._tokenizer, self._body, delta), bool(delta.tokens or delta.looks)
        for part in parts:
            if part:
                yield self._chunk(delta.choice, _as_delta(part), details, None)
                details, untold = {"logprobs": None}, False
        if reason is not None or untold:
            yield self._chunk(delta.choice, {}, details, reason)

    def _chunk(self, index: int, delta: object, details: dict[str, Any], reason: str | None) -> bytes:
        choice = {"index": index, "delta": delta, **details, "finish_reason": reason}
        chunk = {**self._envelope, "choices": [choice]}
        return event(chunk if self._usage is None else {**chunk, "usage": self._usage()})


def _details(tokenizer: Tokenizer, body: ChatRequest, told: Delta | Written) -> dict[str, Any]:
    """What a choice tells of its tokens: `logprobs`, and `attention` for those who ask."""
    details: dict[str, Any] = {"logprobs": None}
    if body.logprobs:
        details["logprobs"] = {"content": chat_logprobs(tokenizer, told.tokens), "refusal": None}
    if body.attention is not None:
        details["attention"] = attention_of(told.looks)
    return details


def _as_delta(part: str | CallDelta) -> dict[str, Any]:
    if isinstance(part, str):
        return {"content": part}
    call: dict[str, Any] = {"index": part.index, "function": {"arguments": part.arguments}}
    if part.name is not None:
        call |= {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}
    return {"tool_calls": [call]}


async def _whole(
    service: Service,
    body: ChatRequest,
    completion: Completion,
    plan: ToolPlan | None,
    envelope: dict[str, object],
) -> JSONResponse:
    try:
        choices = []
        for index, written in enumerate(await completion.whole()):
            message, reason = _message(written, plan)
            details = _details(service.tokenizer, body, written)
            choices.append({"index": index, "message": message, **details, "finish_reason": reason})
        return JSONResponse({**envelope, "choices": choices, **await completion.ending()})
    finally:
        completion.close()


def _message(written: Written, plan: ToolPlan | None) -> tuple[dict[str, Any], str]:
    """The assistant's message, and why it ended."""
    if plan is None:
        return {"role": "assistant", "content": written.text, "refusal": None}, written.finish_reason
    answer = read_whole(written.text, plan.syntax)
    message: dict[str, Any] = {"role": "assistant", "content": answer.content or None, "refusal": None}
    if not answer.calls:
        return message | {"content": answer.content}, written.finish_reason
    message["tool_calls"] = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in answer.calls
    ]
    return message, "tool_calls" if written.finish_reason == "stop" else written.finish_reason

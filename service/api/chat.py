"""`POST /v1/chat/completions`: messages in, the assistant's next one out."""

import time
import uuid

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model.errors import InvalidRequest
from service.api import body as request_body
from service.api.connection import while_connected
from service.api.schemas import ChatRequest
from service.api.sse import ChunkWriter, EventStream, event
from service.call import Call, call_of
from service.completion import Completion, Delta, Service, encode
from service.metrics import IngressMetrics

router = APIRouter()


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request) -> Response:
    """Write the assistant's next message."""
    service: Service = request.app.state.service
    body = await request_body.read(request, ChatRequest, service.model_name)
    return await while_connected(request, service.metrics, _answer(service, call_of(request), body))


async def _answer(service: Service, call: Call, body: ChatRequest) -> Response:
    prompt = await _render(service, body)
    try:
        completion = await Completion.start(service, call, [prompt], body, body.token_limit)
    except InvalidRequest as error:
        if error.param == "prompt":  # the engine's word for what a chat calls its messages
            error.param = "messages"
        raise
    envelope = {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    if body.stream:
        envelope["object"] = "chat.completion.chunk"
        return _stream(completion, service.metrics, envelope, body.n or 1, with_usage=body.include_usage)
    return await _whole(completion, envelope)


async def _render(service: Service, body: ChatRequest) -> list[int]:
    if service.chat_template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    text = service.chat_template.render([message.for_template() for message in body.messages])
    # The template writes the special tokens itself.
    (prompt,) = await encode(service, [text], add_special_tokens=False)
    return prompt


def _stream(
    completion: Completion, metrics: IngressMetrics, envelope: dict[str, object], n: int, *, with_usage: bool
) -> EventStream:
    writer = ChunkWriter(envelope, '"delta":{"content":', '},"logprobs":null', with_usage=with_usage)
    closing = ChunkWriter(envelope, '"delta":', ',"logprobs":null', with_usage=with_usage)
    opening = ChunkWriter(
        envelope, '"delta":{"role":"assistant","content":', '},"logprobs":null', with_usage=with_usage
    )

    def write(deltas: list[Delta]) -> bytes:
        chunks = []
        for choice, text, finish_reason in deltas:
            if text:
                chunks.append(writer.chunk(choice, text, None))
            if finish_reason is not None:
                chunks.append(closing.chunk(choice, None, finish_reason))
        return b"".join(chunks)

    def last() -> bytes:
        return event({**envelope, "choices": [], "usage": completion.usage()}) if with_usage else b""

    first = b"".join(opening.chunk(choice, "", None) for choice in range(n))
    return EventStream(completion, metrics, write, first=first, last=last)


async def _whole(completion: Completion, envelope: dict[str, object]) -> JSONResponse:
    try:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": reason,
            }
            for i, (text, reason) in enumerate(await completion.texts())
        ]
        return JSONResponse({**envelope, "choices": choices, "usage": completion.usage()})
    finally:
        completion.close()

"""`POST /v1/completions`: text or token ids in, text out."""

import time
import uuid

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from service.api import body as request_body
from service.api.connection import while_connected
from service.api.schemas import CompletionRequest
from service.api.sse import ChunkWriter, EventStream, event
from service.call import Call, call_of
from service.completion import Completion, Delta, Service, encode
from service.metrics import IngressMetrics

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
    completion = await Completion.start(service, call, prompts, body, body.max_tokens or DEFAULT_MAX_TOKENS)
    envelope = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.model_name,
    }
    if body.stream:
        return _stream(completion, service.metrics, envelope, with_usage=body.include_usage)
    return await _whole(completion, envelope)


def _stream(
    completion: Completion, metrics: IngressMetrics, envelope: dict[str, object], *, with_usage: bool
) -> EventStream:
    writer = ChunkWriter(envelope, '"text":', ',"logprobs":null', with_usage=with_usage)

    def write(deltas: list[Delta]) -> bytes:
        return b"".join(writer.chunk(*delta) for delta in deltas)

    def last() -> bytes:
        return event({**envelope, "choices": [], "usage": completion.usage()}) if with_usage else b""

    return EventStream(completion, metrics, write, last=last)


async def _whole(completion: Completion, envelope: dict[str, object]) -> JSONResponse:
    try:
        choices = [
            {"index": i, "text": text, "logprobs": None, "finish_reason": reason}
            for i, (text, reason) in enumerate(await completion.texts())
        ]
        return JSONResponse({**envelope, "choices": choices, "usage": completion.usage()})
    finally:
        completion.close()

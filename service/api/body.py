"""Reads a request's body: bounded in size, strict in form."""

import json
from typing import TypeVar

import pydantic_core
from fastapi import Request

from model.errors import InvalidRequest
from service.api.schemas import SamplingFields, parse
from service.errors import BodyTooLarge, NotFound

MAX_BODY_BYTES = 1 << 20

RequestBody = TypeVar("RequestBody", bound=SamplingFields)


async def read(request: Request, schema: type[RequestBody], model_name: str) -> RequestBody:
    """The body as `schema`, for this model. Raises `InvalidRequest`, `BodyTooLarge` or `NotFound`."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequest("send the body as JSON, with the header content-type: application/json")
    raw = await _read_bounded(request)
    try:
        # Not the standard library's parser: it takes NaN, lone surrogates and any depth.
        decoded = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    body = parse(schema, decoded)
    if body.model is not None and body.model != model_name:
        raise unknown_model(body.model, model_name)
    return body


def unknown_model(asked: str, served: str) -> NotFound:
    """The refusal of a model that is not served here."""
    name = json.dumps(asked[:100])
    return NotFound(f"there is no model {name}; this service has {served}", param="model", code="model_not_found")


async def _read_bounded(request: Request) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise _too_large()
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise _too_large()
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large() -> BodyTooLarge:
    return BodyTooLarge(f"the body exceeds {MAX_BODY_BYTES} bytes", code="body_too_large")

"""Reads a request's body: bounded in size and time, strict in form."""

import asyncio
import json
import re
from typing import TypeVar

import jiter
from fastapi import Request
from starlette.requests import ClientDisconnect

from model.errors import InvalidRequest
from service.api.connection import ClientLeft
from service.api.schemas.sampling import GenerationFields
from service.api.schemas.strict import Body, parse
from service.call import call_of
from service.completion import Service
from service.errors import BodyTooLarge, BodyTooSlow, NotFound
from service.limits import Limits

NUL = rb"\u0000"  # as JSON writes it; the bare byte is no JSON

LARGE_BODY = 16 << 10
MAX_KEYS = 2048  # of one object; each that is not known costs an error
MAX_VALUES = 150_000
WEIGHT_OF_A_LIST = 8
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)

TEXTS = ("prompt", "messages", "input", "instructions")  # what the log tells of a body, where the operator wants it

RequestBody = TypeVar("RequestBody", bound=Body)


async def read(request: Request, schema: type[RequestBody], model_name: str) -> RequestBody:
    """The body as `schema`, for this model.

    Raises `InvalidRequest`, `BodyTooLarge`, `BodyTooSlow`, `ClientLeft`, `NotFound`, or `Overloaded` where nobody would
    take it.
    """
    service: Service = request.app.state.service
    call = call_of(request)
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type != "application/json":
        raise InvalidRequest("send the body as JSON, with the header content-type: application/json")
    try:
        raw = await _read_bounded(request, service.limits)
    except (ClientDisconnect, asyncio.CancelledError) as left:  # we saw it, or Serve did
        service.metrics.disconnects.inc()
        if isinstance(left, asyncio.CancelledError):
            raise
        raise ClientLeft("the client left before its request was here") from None
    if issubclass(schema, GenerationFields):
        service.dispatcher.check_room()  # before parsing and tokenizing for nothing

    def work() -> RequestBody:
        decoded = decode(raw)
        if call.logs_prompts and isinstance(decoded, dict):
            call.log.update({name: decoded[name] for name in TEXTS if name in decoded})
        return parse(schema, decoded)

    # A large body is read in a thread, or everybody's streams would wait for it.
    body = work() if len(raw) <= LARGE_BODY else await asyncio.to_thread(work)
    if body.model is not None and body.model != model_name:
        raise unknown_model(body.model, model_name)
    if isinstance(body, GenerationFields):
        service.limits.check(body)
        if body.deadline_ms is not None:
            call.limit_to(body.deadline_ms)
        call.wants_receipt = bool(body.receipt)
    return body


def decode(raw: bytes) -> object:
    """A JSON text as Python's objects. Raises `InvalidRequest` with the place of what is wrong.

    Not the standard library's parser: it takes NaN, lone surrogates, any depth, and of two equal keys the second.
    """
    if len(raw) > LARGE_BODY:
        _check_size(raw)
    try:
        decoded: object = jiter.from_json(raw, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if NUL in raw or len(raw) > LARGE_BODY:
        _check(decoded)
    return decoded


def _check_size(raw: bytes) -> None:
    """Raises `InvalidRequest` for more values than any request needs: each is an object of Python's."""
    num_texts = (raw.count(b'"') - raw.count(b'\\"')) // 2
    if num_texts > MAX_VALUES or (_num_values(raw) > MAX_VALUES and _num_values(STRING.sub(b"", raw)) > MAX_VALUES):
        raise InvalidRequest(f"the body holds more than {MAX_VALUES} values; send fewer in one request")


def _num_values(raw: bytes) -> int:
    """At most so many values; those in texts are counted, too. A list costs as much as several numbers."""
    return raw.count(b",") + WEIGHT_OF_A_LIST * (raw.count(b"[") + raw.count(b"{"))


def _check(decoded: object) -> None:
    """Raises `InvalidRequest` for what JSON allows and no honest client sends."""
    ahead = [decoded]
    while ahead:
        value = ahead.pop()
        if isinstance(value, list):
            ahead += value
        elif isinstance(value, dict):
            if len(value) > MAX_KEYS:
                raise InvalidRequest(f"an object in the body has {len(value)} keys; at most {MAX_KEYS} are taken")
            ahead += value
            ahead += value.values()
        elif isinstance(value, str) and "\0" in value:
            raise InvalidRequest("the body is not valid JSON for us: a text in it holds the character NUL")


def unknown_model(asked: str, served: str) -> NotFound:
    """The refusal of a model that is not served here."""
    name = json.dumps(asked[:100])
    return NotFound(f"there is no model {name}; this service has {served}", param="model", code="model_not_found")


async def _read_bounded(request: Request, limits: Limits) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limits.max_body_bytes:
        raise _too_large(limits)
    chunks, size = [], 0
    try:
        async with asyncio.timeout(limits.max_body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body_bytes:
                    raise _too_large(limits)
                chunks.append(chunk)
    except TimeoutError:
        raise BodyTooSlow(
            f"the body did not arrive within {limits.max_body_seconds:g} s", code="body_too_slow"
        ) from None
    return b"".join(chunks)


def _too_large(limits: Limits) -> BodyTooLarge:
    return BodyTooLarge(f"the body exceeds {limits.max_body_bytes} bytes", code="body_too_large")

"""The whole HTTP application: the routes, what surrounds them, and the document that describes them."""

from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.access_log import AccessLog
from service.api import chat, completions, document, errors, operations, responses, tokens
from service.api.document import describe_api
from service.api.envelope import REQUEST_ID, TRACE_RESPONSE, Envelope
from service.api.gate import DEADLINE_HEADER, SESSION_HEADER, Gate
from service.completion import Service
from service.door import Door
from service.keys import KeyRing
from service.request_book import RequestBook

if TYPE_CHECKING:
    from service.tracing import Tracer


def create_api(service: Service, door: Door, tracer: "Tracer | None" = None) -> FastAPI:
    """The application for one service. It knows nothing of Ray beyond the dispatcher.

    Raises `ConfigError` for a file of keys that cannot be read.
    """
    keys = KeyRing(Path(door.api_keys_file)) if door.api_keys_file else None
    api = FastAPI(title="Attendant", version=__version__, openapi_url=None, redirect_slashes=False)
    api.state.service = service
    for part in (completions, chat, responses, tokens, operations, document):
        api.include_router(part.router)
    errors.install(api)
    # The last one added is the outermost. A browser asks its question of CORS without a key.
    api.add_middleware(Gate, door=door, keys=keys, drain=service.drain)
    if door.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=door.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=[
                *("authorization", "content-type", "traceparent", "tracestate"),
                *(REQUEST_ID, DEADLINE_HEADER, SESSION_HEADER),
            ],
            expose_headers=[REQUEST_ID, "retry-after", TRACE_RESPONSE],
        )
    log = AccessLog(door.access_log) if door.access_log else None
    slow_seconds = door.telemetry.slow_request_seconds
    book = RequestBook(service.model_name, log, tracer, slow_seconds)
    api.add_middleware(Envelope, metrics=service.metrics, book=book)
    api.state.document = describe_api(api)
    return api

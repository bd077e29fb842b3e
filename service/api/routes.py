"""The whole HTTP application: the routes, what surrounds them, and the document that describes them."""

import logging
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import __version__
from service.api import chat, completions, errors, operations
from service.api.schemas import ChatRequest, CompletionRequest
from service.completion import Service

logger = logging.getLogger(__name__)

SCHEMA_REF = "#/components/schemas/{model}"
BODIES: dict[str, type[BaseModel]] = {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatRequest}


def create_api(service: Service) -> FastAPI:
    """The application for one service. It knows nothing of Ray beyond the dispatcher."""
    api = FastAPI(title="Attendant", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.state.service = service
    for part in (completions, chat, operations):
        api.include_router(part.router)
    errors.install(api)
    api.add_middleware(Envelope, service=service)
    document = _document(api)
    api.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's own way to override it
    return api


class Envelope:
    """Around every request: the count of its answer, and an honest 500 for what nobody foresaw."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._metrics = service.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started = False

        async def send_counted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self._metrics.responded(_route(scope), message["status"])
            await send(message)

        try:
            await self._app(scope, receive, send_counted)
        except Exception as error:
            # Serve gives every request an id, the client's own if it sent one, and returns it in the answer.
            logger.exception("request %s failed", Headers(scope=scope).get("x-request-id"))
            if not started:
                await errors.error_response(error)(scope, receive, send_counted)


def _route(scope: Scope) -> str:
    """The pattern that matched, never the path that was asked for: clients must not create label values."""
    route = scope.get("route")
    return getattr(route, "path", "none")


def _document(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. The bodies are read by our own strict reader, so FastAPI does not know of them."""
    document = api.openapi()
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for path, model in BODIES.items():
        schema = model.model_json_schema(ref_template=SCHEMA_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        reference = {"schema": {"$ref": SCHEMA_REF.format(model=model.__name__)}}
        document["paths"][path]["post"]["requestBody"] = {"required": True, "content": {"application/json": reference}}
    return document

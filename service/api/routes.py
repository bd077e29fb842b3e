"""The whole HTTP application: the routes, what surrounds them, and the document that describes them."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from service import __version__
from service.access_log import AccessLog
from service.api import chat, completions, errors, operations, responses, tokens
from service.api.envelope import REQUEST_ID, Envelope
from service.api.gate import DEADLINE_HEADER, Gate
from service.api.schemas.chat import ChatRequest
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.responses import ResponseRequest
from service.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from service.completion import Service
from service.door import Door
from service.keys import KeyRing

SCHEMA_REF = "#/components/schemas/{model}"
BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponseRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}


def create_api(service: Service, door: Door) -> FastAPI:
    """The application for one service. It knows nothing of Ray beyond the dispatcher.

    Raises `ConfigError` for a file of keys that cannot be read.
    """
    keys = KeyRing(Path(door.api_keys_file)) if door.api_keys_file else None
    api = FastAPI(title="Attendant", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    api.state.service = service
    for part in (completions, chat, responses, tokens, operations):
        api.include_router(part.router)
    errors.install(api)
    # The last one added is the outermost. A browser asks its question of CORS without a key.
    api.add_middleware(Gate, door=door, keys=keys)
    if door.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=door.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", REQUEST_ID, DEADLINE_HEADER],
            expose_headers=[REQUEST_ID, "retry-after"],
        )
    log = AccessLog(door.access_log) if door.access_log else None
    api.add_middleware(Envelope, metrics=service.metrics, log=log)
    document = _document(api)
    api.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's own way to override it
    return api


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

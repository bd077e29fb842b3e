"""The OpenAPI document, and a page that shows it. The page loads nothing from elsewhere.

Bodies are read by our own strict reader and answers are written by hand, so FastAPI knows of neither: their schemas
come from the models here. What a schema cannot say (a prompt that is too long, fields that contradict one another) is
said in a 400.
"""

from pathlib import Path
from typing import Any, NamedTuple

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel
from starlette.responses import HTMLResponse, JSONResponse, Response

from service.api import answers
from service.api.schemas.chat import ChatRequest
from service.api.schemas.completions import CompletionRequest
from service.api.schemas.responses import ResponseRequest
from service.api.schemas.strict import Body
from service.api.schemas.tokens import DetokenizeRequest, TokenizeRequest

REF = "#/components/schemas/{model}"
# One server-sent event: `data` is a chunk in JSON, or [DONE].
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
    "required": ["data"],
}
PAGE = Path(__file__).with_name("docs.html")


class Operation(NamedTuple):
    """What goes in and what comes out; `streams` where the answer may be events."""

    answer: type[BaseModel] | None
    body: type[Body] | None = None
    streams: bool = False


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/v1/completions"): Operation(answers.CompletionAnswer, CompletionRequest, streams=True),
    ("post", "/v1/chat/completions"): Operation(answers.ChatAnswer, ChatRequest, streams=True),
    ("post", "/v1/responses"): Operation(answers.ResponseAnswer, ResponseRequest, streams=True),
    ("post", "/tokenize"): Operation(answers.TokenizeAnswer, TokenizeRequest),
    ("post", "/detokenize"): Operation(answers.DetokenizeAnswer, DetokenizeRequest),
    ("get", "/v1/models"): Operation(answers.ModelList),
    ("get", "/v1/models/{model}"): Operation(answers.ModelCard),
    ("get", "/health"): Operation(answers.Status),
    ("get", "/ready"): Operation(answers.Status),
    ("get", "/version"): Operation(answers.Version),
    ("get", "/metrics"): Operation(None),
    ("get", "/metrics/targets"): Operation(answers.Targets),
}

router = APIRouter()


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request) -> Response:
    """The document."""
    return JSONResponse(request.app.state.document)


@router.get("/docs", include_in_schema=False)
async def docs() -> Response:
    """A page that shows the document."""
    return HTMLResponse(PAGE.read_text(encoding="utf-8"))


def describe_api(api: FastAPI) -> dict[str, Any]:
    """The document of an application that has all of its routes."""
    document = api.openapi()
    schemas: dict[str, Any] = {"Error": _schema(answers.Error, {})}
    document["components"] = {"schemas": schemas}
    for path, methods in document["paths"].items():
        for method, described in methods.items():
            operation = OPERATIONS[method, path]
            described["responses"] = _responses(operation, schemas)
            if operation.body is not None:
                reference = _reference(operation.body, schemas)
                described["requestBody"] = {"required": True, "content": {"application/json": reference}}
    return document


def _responses(operation: Operation, schemas: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if operation.answer is not None:
        content = {"application/json": _reference(operation.answer, schemas)}
    if operation.streams:
        content["text/event-stream"] = {"schema": EVENT}
    error = {"schema": {"$ref": REF.format(model="Error")}}
    return {
        "200": {"description": "Done.", "content": content},
        "default": {"description": "Refused or failed, and why.", "content": {"application/json": error}},
    }


def _reference(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    schemas[model.__name__] = _schema(model, schemas)
    return {"schema": {"$ref": REF.format(model=model.__name__)}}


def _schema(model: type[BaseModel], schemas: dict[str, Any]) -> dict[str, Any]:
    """A model's schema; what it refers to goes to `schemas`. A body's known but idle fields are in it, too."""
    schema = model.model_json_schema(ref_template=REF)
    schemas.update(schema.pop("$defs", {}))
    if issubclass(model, Body):
        for name, values in model.no_op.items():
            schema["properties"][name] = {"enum": [None, *values], "description": "Known, but not done here."}
    return schema

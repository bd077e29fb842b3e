"""`POST /v1/responses` in its stateless form: a chat underneath, items and events around it."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from model.errors import InvalidRequest
from model.text.tokenizer import Tokenizer
from service.api import body as request_body
from service.api.chat import start
from service.api.connection import while_connected
from service.api.errors import describe
from service.api.logprobs import chat_logprobs
from service.api.schemas.chat import ChatRequest
from service.api.schemas.responses import ResponseRequest, in_own_words
from service.api.sse import EventStream
from service.api.tools import CallDelta, ToolPlan, ToolReader
from service.call import Call, call_of
from service.completion import Completion, Delta, Service

router = APIRouter()


@router.post("/v1/responses")
async def create_response(request: Request) -> Response:
    """Answer, and keep nothing."""
    service: Service = request.app.state.service
    body = await request_body.read(request, ResponseRequest, service.model_name)
    chat = body.as_chat()
    service.limits.check(chat)
    return await while_connected(request, service.metrics, _answer(service, call_of(request), body, chat))


async def _answer(service: Service, call: Call, body: ResponseRequest, chat: ChatRequest) -> Response:
    try:
        completion, plan = await start(service, call, chat)
    except InvalidRequest as error:
        raise in_own_words(error) from None
    writer = ResponseWriter(service, body, plan)
    if body.stream:

        def write(deltas: list[Delta]) -> bytes:
            return b"".join(writer.event(name, **fields) for delta in deltas for name, fields in writer.feed(delta))

        async def last() -> bytes:
            return b"".join(writer.event(name, **fields) for name, fields in writer.finish(completion))

        return EventStream(completion, service.metrics, write, first=writer.opening(), last=last, failed=writer.failure)
    return await _whole(completion, writer)


async def _whole(completion: Completion, writer: "ResponseWriter") -> JSONResponse:
    """The same items as a stream's, without the events that lead to them."""
    try:
        (written,) = await completion.whole()
        for _ in writer.feed(Delta(0, written.text, written.finish_reason, written.tokens)):
            pass
        for _ in writer.finish(completion):
            pass
        return JSONResponse(writer.response)
    finally:
        completion.close()


Event = tuple[str, dict[str, Any]]


class ResponseWriter:
    """Builds the response from what the model writes, and tells each step of it as an event.

    response: as it stands.
    """

    def __init__(self, service: Service, body: ResponseRequest, plan: ToolPlan | None) -> None:
        self.response = _unfinished(service, body)
        self._tokenizer: Tokenizer = service.tokenizer
        self._logprobs = bool(body.include)
        self._reader = None if plan is None else ToolReader(plan.syntax)
        self._open = False  # whether the last item goes on
        self._sequence_number = 0
        self._finish_reason = ""

    def event(self, name: str, /, **fields: object) -> bytes:
        """One event, numbered."""
        body = {"type": name, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return f"event: {name}\ndata: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

    def opening(self) -> bytes:
        """The events before any output."""
        names = ("response.created", "response.in_progress")
        return b"".join(self.event(name, response=self.response) for name in names)

    def failure(self, error: Exception) -> bytes:
        """The event that ends a stream which cannot go on."""
        fault = describe(error)[1]["error"]
        return self.event("error", code=fault["code"], message=fault["message"], param=fault["param"])

    def feed(self, delta: Delta) -> Iterator[Event]:
        """What new text comes to."""
        parts: list[str | CallDelta] = [delta.text] if delta.text else []
        if self._reader is not None:
            parts = self._reader.feed(delta.text)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            parts.append(self._reader.flush() if self._reader is not None else "")
        logprobs = chat_logprobs(self._tokenizer, delta.tokens) if self._logprobs else []
        for part in parts:
            if isinstance(part, CallDelta):
                yield from self._add_to_call(part)
            elif part:
                yield from self._add_text(part, logprobs)
                logprobs = []
        if logprobs:  # tokens whose text is still held back, or which have none
            yield from self._add_text("", logprobs)

    def finish(self, completion: Completion) -> Iterator[Event]:
        """The end of the last item, and of the response."""
        if not self._output:
            yield from self._add_text("", [])
        yield from self._close(whole=self._finish_reason != "length")
        usage = completion.usage()
        self.response["usage"] = {
            "input_tokens": usage["prompt_tokens"],
            # The cache is written of itself, never at a client's word.
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }
        status = "completed"
        if self._finish_reason == "length":
            status = "incomplete"
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["status"] = status
        yield f"response.{status}", {"response": self.response}

    @property
    def _output(self) -> list[dict[str, Any]]:
        output: list[dict[str, Any]] = self.response["output"]
        return output

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    def _add_text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        if not self._open or self._output[-1]["type"] != "message":
            yield from self._close()
            message = {"id": _name("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
            yield self._begin(message | {"content": []})
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield "response.content_part.added", {**self._place(), "content_index": 0, "part": dict(part)}
            self._output[-1]["content"].append(part)
        part = self._output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        if text or logprobs:
            yield (
                "response.output_text.delta",
                {
                    **self._place(),
                    "content_index": 0,
                    "delta": text,
                    "logprobs": logprobs,
                },
            )

    def _add_to_call(self, part: CallDelta) -> Iterator[Event]:
        if part.name is not None:
            yield from self._close()
            call = {"id": _name("fc"), "type": "function_call", "status": "in_progress"}
            yield self._begin(call | {"call_id": part.id, "name": part.name, "arguments": ""})
        else:
            self._output[-1]["arguments"] += part.arguments
            yield "response.function_call_arguments.delta", {**self._place(), "delta": part.arguments}

    def _begin(self, item: dict[str, Any]) -> Event:
        self._output.append(item)
        self._open = True
        shown = item | ({"content": []} if "content" in item else {})
        return "response.output_item.added", {"output_index": len(self._output) - 1, "item": shown}

    def _close(self, *, whole: bool = True) -> Iterator[Event]:
        if not self._open:
            return
        self._open = False
        item = self._output[-1]
        item["status"] = "completed" if whole else "incomplete"
        if item["type"] == "message":
            (part,) = item["content"]
            place = {**self._place(), "content_index": 0}
            yield "response.output_text.done", {**place, "text": part["text"], "logprobs": part["logprobs"]}
            yield "response.content_part.done", {**place, "part": part}
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", {**self._place(), **done}
        yield "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}


def _unfinished(service: Service, body: ResponseRequest) -> dict[str, Any]:
    """The response before anything was written. What was not asked for is told as it is."""
    form = body.text.format if body.text is not None else None
    return {
        "id": _name("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": service.model_name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True)},
        "tool_choice": _sent(body.tool_choice) or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }


def _sent(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _name(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"

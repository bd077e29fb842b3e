"""Every refusal in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from model.errors import AttendantError, InvalidRequest
from service.call import call_of
from service.errors import ServiceError


def error_body(
    message: str, type_: str, *, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, Any]]:
    """The one error shape, for answers and for the last event of a broken stream."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


def describe(error: Exception) -> tuple[int, dict[str, dict[str, Any]]]:
    """Status and body for an error. One that was not raised on purpose tells the client nothing of its inside."""
    if isinstance(error, InvalidRequest):
        return 400, error_body(str(error), "invalid_request_error", param=error.param)
    if isinstance(error, ServiceError):
        return error.status, error_body(str(error), error.type, param=error.param, code=error.code)
    if isinstance(error, AttendantError):
        return 500, error_body(str(error), "server_error")
    return 500, error_body(
        "The server failed on this request; its log has the cause under x-request-id.", "server_error"
    )


def error_response(error: Exception) -> JSONResponse:
    """The whole answer to a request that failed before its headers were sent."""
    status, body = describe(error)
    headers = error.headers if isinstance(error, ServiceError) else None
    return JSONResponse(body, status_code=status, headers=headers)


def install(app: FastAPI) -> None:
    """Fold what FastAPI and Starlette answer by themselves (404, 405) into our shape."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        call_of(request).failed(error)
        return error_response(error)

    async def no_route(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        message = f"{error.detail}: {request.method} {request.url.path}"
        body = error_body(message, "invalid_request_error")
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)

    app.add_exception_handler(AttendantError, refused)
    app.add_exception_handler(HTTPException, no_route)

"""What the service refuses or fails to do, one class for each HTTP status a client can act upon."""

from typing import ClassVar

from model.errors import AttendantError

RETRY_AFTER_S = 5


class ServiceError(AttendantError):
    """Base: an answer other than success. The class gives the status, the instance the words."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    @property
    def headers(self) -> dict[str, str]:
        """What the answer's header says beside the usual."""
        return {}


class Unauthorized(ServiceError):  # noqa: N818 - named as the HTTP status is
    """No API key, or none that is known here."""

    status = 401
    type = "invalid_request_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")

    @property
    def headers(self) -> dict[str, str]:
        """How to do better."""
        return {"www-authenticate": "Bearer"}


class NotFound(ServiceError):  # noqa: N818 - named as the HTTP status is
    """There is no such model or route."""

    status = 404
    type = "invalid_request_error"


class DeadlineExceeded(ServiceError):  # noqa: N818 - named for what happened
    """The time that the client gave its request is over. Nothing of it runs any more."""

    status = 408
    type = "timeout_error"

    def __init__(self) -> None:
        super().__init__("the deadline that the request set has passed", code="deadline_exceeded")

    @property
    def headers(self) -> dict[str, str]:
        """Not again by itself: OpenAI's clients take a 408 for a mishap, and would ask twice more, for nobody."""
        return {"x-should-retry": "false"}


class Unread(ServiceError):  # noqa: N818 - named for what became of the body
    """Not all of the request was read, so its connection cannot carry another one."""

    @property
    def headers(self) -> dict[str, str]:
        """The connection ends: a client could go on sending for ever."""
        return {"connection": "close"}


class BodyTooSlow(Unread):
    """The request's body did not arrive in time."""

    status = 408
    type = "timeout_error"


class BodyTooLarge(Unread):
    """The request body exceeds the limit; nothing of it was read into the engine."""

    status = 413
    type = "invalid_request_error"


class HeadersTooLarge(Unread):
    """The request's header exceeds the limit."""

    status = 431
    type = "invalid_request_error"


class Overloaded(ServiceError):  # noqa: N818 - named for the state of the service
    """Too much to do, for the service or for one key. `retry_after_s`: whole seconds until it is worth another try."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int, code: str = "overloaded") -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """When to come back."""
        return {"retry-after": str(self.retry_after_s)}


class Unavailable(ServiceError):  # noqa: N818 - named for the state of the service
    """No engine answers: it is starting, restarting or gone. The same request may succeed later."""

    status = 503
    type = "server_error"

    @property
    def headers(self) -> dict[str, str]:
        """When to come back: about as long as a replica takes to start."""
        return {"retry-after": str(RETRY_AFTER_S)}


class StartError(AttendantError):
    """The service cannot start; the text names what to change."""

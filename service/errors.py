"""What the service refuses or fails to do, one class for each HTTP status a client can act upon."""

from typing import ClassVar

from model.errors import AttendantError


class ServiceError(AttendantError):
    """Base: an answer other than success. The class gives the status, the instance the words."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class NotFound(ServiceError):  # noqa: N818 - named as the HTTP status is
    """There is no such model or route."""

    status = 404
    type = "invalid_request_error"


class BodyTooLarge(ServiceError):  # noqa: N818 - named as the HTTP status is
    """The request body exceeds the limit; nothing of it was read into the engine."""

    status = 413
    type = "invalid_request_error"


class Overloaded(ServiceError):  # noqa: N818 - named for the state of the service
    """Every queue is full. `retry_after_s`: whole seconds after which it is worth trying again."""

    status = 429
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message, code="overloaded")
        self.retry_after_s = retry_after_s


class Unavailable(ServiceError):  # noqa: N818 - named for the state of the service
    """No engine answers: it is starting, restarting or gone. The same request may succeed later."""

    status = 503
    type = "server_error"


class StartError(AttendantError):
    """The service cannot start; the text names what to change."""

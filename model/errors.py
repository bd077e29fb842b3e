"""What can go wrong, by who can mend it. Every message says what was wrong, where, and what to do."""


class AttendantError(Exception):
    """Base of every error that this project raises on purpose. Its text is meant for a person."""


class ConfigError(AttendantError):
    """The operator asked for something that cannot be had: a device, a dtype, a memory size."""


class CheckpointError(AttendantError):
    """A model directory cannot be used. The text names the file and the reason."""


class InvalidRequest(AttendantError):  # noqa: N818 - named for what the client sent, as an HTTP 400 is
    """The client asked for something that cannot be served. Refused before it reaches the engine thread.

    `param` is the field at fault, in the API's own words, where one field is.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Busy(AttendantError):  # noqa: N818 - named for the state of who was asked
    """Too many ask for the same at once. A moment later the same request may be served."""


class GrammarError(AttendantError):
    """A request's output cannot go on under its grammar. That request ends with an error; the others do not notice."""


class GroupLost(AttendantError):  # noqa: N818 - named for what happened
    """Another process that holds a part of the model is gone, and with it what this one has. The engine ends, not the
    requests: who keeps their tokens may go on with them elsewhere.
    """


class StepError(AttendantError):
    """A batch that the native step refuses: a bug of ours, caught before it could read or write where it must not."""

"""Reads a decoded body into its schema, and says which field is at fault in the words of who wrote it.

Three kinds of fields: those declared on a schema are honoured; those in its `no_op` are known but not done, and pass
only with a value that asks for nothing; any other is unknown. Types are strict: `true` is no integer.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError
from pydantic_core import ErrorDetails

from model.errors import InvalidRequest

# Fields of several forms, in words: pydantic would complain about one of the forms at random.
FORMS: dict[str, str] = {
    "prompt": "a string, a list of token ids, or a list of at most 128 of either",
    "stop": "a string of 1 to 256 characters, or a list of at most 16 of them",
    "tool_choice": '"none", "auto", "required", a function by its name, or allowed_tools',
}


class FirstFault(FailFast):
    """`FailFast`, and hashable: `|` between types asks for that."""

    __hash__ = object.__hash__


Member = TypeVar("Member")
# A list of which the first fault is told: a body may hold a million, and describing them all takes seconds.
ListOf = Annotated[list[Member], FirstFault()]


class Strict(BaseModel):
    """No coercion, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Body(Strict):
    """A whole body. `model` may be left out: a service has one.

    no_op: for each field that is known but not done, the values that ask for nothing. `null` always does.
    """

    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str | None = None


Schema = TypeVar("Schema", bound=Body)


def parse(schema: type[Schema], body: object) -> Schema:
    """A decoded JSON body as `schema`. Raises `InvalidRequest` that names the field at fault."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    asked = {name: value for name, value in body.items() if not _asks_for_nothing(schema, name, value)}
    for name in asked:
        if name in schema.no_op:
            raise InvalidRequest(f"{name} is not supported here; leave it out", param=name)
    try:
        return schema.model_validate(asked)
    except ValidationError as error:
        if not any(fault["type"] == "int_type" and _is_whole(fault["input"]) for fault in error.errors()):
            raise _fault(error, asked) from None
    try:  # JSON has one kind of number: 5.0 is as good an integer as 5
        return schema.model_validate(_with_integers(asked))
    except ValidationError as error:
        raise _fault(error, asked) from None


def _is_whole(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


def _with_integers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _with_integers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_integers(inner) for inner in value]
    return int(value) if _is_whole(value) else value


def _asks_for_nothing(schema: type[Body], name: str, value: object) -> bool:
    if name not in schema.no_op:
        return False
    # `False == 0` in Python, but `false` where a number belongs is a wrong type, not a harmless one.
    idle = schema.no_op[name]
    return value is None or any(value == nothing and type(value) is type(nothing) for nothing in idle)


def _fault(error: ValidationError, body: Mapping[str, Any]) -> InvalidRequest:
    """The deepest thing that pydantic found: in a union, the branch that was meant got furthest."""
    faults = error.errors(include_url=False, include_input=False)
    path, fault = max(((_path(fault, body), fault) for fault in faults), key=lambda found: len(found[0]))
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]
    if fault["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown field: {name}", param=name)
    if fault["type"] == "missing":
        return InvalidRequest(f"{name} is required", param=name)
    if path[0] in FORMS:
        return InvalidRequest(f"{path[0]} must be {FORMS[str(path[0])]}", param=str(path[0]))
    return InvalidRequest(f"{name}: {fault['msg']}", param=name)


def _path(fault: ErrorDetails, body: Mapping[str, Any]) -> list[int | str]:
    """A place in the body, without pydantic's names of types and branches: those lead nowhere in it."""
    path: list[int | str] = []
    here: Any = body
    for step in fault["loc"]:
        if isinstance(here, dict) and step in here:
            here = here[step]
            path.append(step)
        elif isinstance(here, list) and isinstance(step, int):
            here = here[step] if step < len(here) else None
            path.append(step)
    if fault["type"] == "missing":
        path.append(fault["loc"][-1])
    elif fault["type"].startswith("union_tag"):  # a message of no known role, a part of no known type
        name = fault["ctx"]["discriminator"].strip("'")
        path.append("type" if name.endswith("()") else name)  # a function's name: what it reads is the type
    return path or [fault["loc"][0]]

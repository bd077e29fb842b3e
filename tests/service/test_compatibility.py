"""Every field of the `openai` package's own request types is honoured, and a test sees it, or refused by name."""

import pytest

from model.errors import InvalidRequest
from service.api.schemas.chat import ChatRequest
from service.api.schemas.strict import parse
from tests.service.compatibility import ASKING, DOCUMENT, ENDPOINTS, MESSAGES, Endpoint, names, proofs, refusal, write

OPENAIS = [(endpoint, field) for endpoint in ENDPOINTS for field in endpoint.fields]
HONOURED = [(endpoint, field) for endpoint in ENDPOINTS for field in sorted(names(endpoint.schema))]


def called(value: object) -> str:
    return value.name if isinstance(value, Endpoint) else str(value)


@pytest.mark.parametrize(("endpoint", "field"), OPENAIS, ids=called)
def test_a_field_of_openais_is_honoured_or_refused_by_name(endpoint: Endpoint, field: str) -> None:
    refused = refusal(endpoint, field)
    assert refused is not None, "no field takes just anything"
    assert (refused.param or "").split(".")[0].split("[")[0] == field
    if field not in names(endpoint.schema):
        assert "not supported" in str(refused) or "unknown field" in str(refused)


@pytest.mark.parametrize(("endpoint", "field"), OPENAIS, ids=called)
def test_a_field_of_openais_is_known_here(endpoint: Endpoint, field: str) -> None:
    """A field that is new in the package must be decided upon: declared in the schema, or named among its `no_op`."""
    assert field in names(endpoint.schema) or field in endpoint.schema.no_op


@pytest.mark.parametrize(("endpoint", "field"), HONOURED, ids=called)
def test_a_field_that_is_honoured_has_a_test_that_sees_its_effect(endpoint: Endpoint, field: str) -> None:
    assert proofs().get(f"{endpoint.name}.{field}"), f'mark one with @pytest.mark.honours("{endpoint.name}.{field}")'


def test_every_mark_names_a_field_that_is_honoured() -> None:
    assert set(proofs()) <= {f"{endpoint.name}.{field}" for endpoint, field in HONOURED}


@pytest.mark.parametrize(("role", "field"), [(m.role, field) for m in MESSAGES for field in m.fields])
def test_a_field_of_openais_messages_is_taken_or_refused_by_name(role: str, field: str) -> None:
    given = {"content": "x"} | ({"tool_call_id": "1"} if role == "tool" else {})
    with pytest.raises(InvalidRequest) as refused:
        parse(ChatRequest, {"messages": [{"role": role, **given, field: ASKING}]})
    assert refused.value.param == f"messages[0].{'role' if role == 'function' else field}"


def test_the_published_table_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == write(), "run `make compatibility`"

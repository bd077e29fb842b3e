"""Every field of the `openai` package's own request types is honoured, and a test sees it, or refused by name."""

import pytest

from tests.service.compatibility import DOCUMENT, ENDPOINTS, Endpoint, names, proofs, refusal, write

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


def test_the_published_table_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == write(), "run `make compatibility`"

"""S8: a key on every route but the probes, on a real service; and comparing takes as long for a wrong one."""

import hmac
from pathlib import Path
from typing import Any

import pytest

from service import keys
from service.api.gate import PROBES
from service.errors import Unauthorized
from tests.faults.conftest import Guarded, InProcess
from tests.service.test_gate import routes_of

pytestmark = [pytest.mark.faults]


@pytest.mark.slow
def test_no_route_of_a_real_service_answers_without_a_key(guarded: Guarded, in_process: Any) -> None:
    """vLLM's key leaves `/tokenize` and others open: there, this fails at the first of them."""
    service: InProcess = in_process()
    routes = routes_of(service.api.routes)
    assert len(routes) > 10
    with guarded.client(key=None) as client:
        for method, path in sorted(routes):
            answer = client.request(method, path.replace("{model:path}", "tiny"))
            assert (answer.status_code == 401) == (path not in PROBES), f"{method} {path}: {answer.status_code}"


@pytest.mark.slow
def test_neither_a_key_nor_a_part_of_it_is_in_any_log(guarded: Guarded) -> None:
    with guarded.client() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer att-000000000000-wrong"}).status_code == 401
    secret = guarded.keys[0].split("-", 2)[2]
    files = [file for file in guarded.logs().rglob("*") if file.is_file()]
    assert any("Ingress" in file.name for file in files)
    for file in files:
        assert secret.encode() not in file.read_bytes(), file


def test_a_wrong_key_is_compared_as_a_right_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-59425: `==` stops at the first difference, and its time tells how many characters are right.

    Whatever is wrong, one hash is computed and two of one length are compared, by `hmac.compare_digest`.
    """
    right = keys.add(tmp_path / "keys.json", "one")
    ring = keys.KeyRing(tmp_path / "keys.json")
    compared: list[tuple[str, str]] = []
    equal = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return equal(a, b)

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    _, key_id, secret = right.split("-", 2)
    for wrong in (f"att-{key_id}-{secret[:-1]}", f"att-{key_id}-", f"att-ffffffffffff-{secret}", "x", ""):
        with pytest.raises(Unauthorized, match="not known"):
            ring.authenticate(f"Bearer {wrong}")
    ring.authenticate(f"Bearer {right}")
    assert len(compared) == 6
    assert {len(text) for pair in compared for text in pair} == {64}

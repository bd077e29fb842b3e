"""S9: two tenants, one prefix: neither can tell from the cache what the other has asked (CVE-2025-46570)."""

import pytest

from tests.faults.conftest import Guarded

pytestmark = [pytest.mark.slow, pytest.mark.faults]

PREFIX = "Once upon a time there was a fox who kept a lantern in the deep forest, and a secret in it. " * 4


def cached(guarded: Guarded, key: int, prompt: str, **fields: object) -> int:
    with guarded.client(key) as client:
        answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1, **fields})
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
    count: int = usage["prompt_tokens_details"]["cached_tokens"]
    return count


def test_a_prefix_is_found_again_by_its_own_tenant_only(guarded: Guarded) -> None:
    """With the prompt alone as the cache's key, the second tenant finds all of the first one's blocks."""
    prompt = "a" + PREFIX
    assert cached(guarded, 0, prompt) == 0
    assert cached(guarded, 0, prompt) > 16
    assert cached(guarded, 1, prompt) == 0


def test_a_salt_keeps_the_users_of_one_tenant_apart(guarded: Guarded) -> None:
    prompt = "b" + PREFIX
    assert cached(guarded, 0, prompt, cache_salt="alice") == 0
    assert cached(guarded, 0, prompt, cache_salt="alice") > 16
    assert cached(guarded, 0, prompt, cache_salt="bob") == 0
    assert cached(guarded, 0, prompt) == 0


def test_no_salt_opens_another_tenants_cache(guarded: Guarded) -> None:
    """A salt that is put behind the tenant's own without a mark between them can be chosen to spell another's."""
    prompt = "c" + PREFIX
    ids = [key.split("-")[1] for key in guarded.keys]
    cached(guarded, 0, prompt)
    for salt in (ids[0], f"{ids[0]}/", f"/{ids[0]}/", f"../{ids[0]}", f"{ids[0]}/{ids[0]}"):
        assert cached(guarded, 1, prompt, cache_salt=salt) == 0, salt

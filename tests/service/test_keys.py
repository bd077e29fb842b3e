"""The file of API keys, and what one key may have in use."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from model.errors import ConfigError
from service import keys, quota
from service.errors import Overloaded, Unauthorized
from service.keys import ApiKey, KeyRing
from service.quota import Quota


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def ring_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], KeyRing]:
    """Looks at its file at each request."""
    monkeypatch.setattr(keys, "RELOAD_PERIOD_S", 0)
    return KeyRing


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_key_opens_what_its_file_guards(file: Path) -> None:
    key = keys.add(file, "team-a", max_concurrent=3)
    entry = KeyRing(file).authenticate(bearer(key))
    assert (entry.name, entry.max_concurrent) == ("team-a", 3)


def test_neither_the_key_nor_its_secret_stands_in_the_file(file: Path) -> None:
    key = keys.add(file, "team-a")
    assert key not in file.read_text()
    assert key.split("-", 2)[2] not in file.read_text()


def test_only_its_owner_may_read_the_file(file: Path) -> None:
    keys.add(file, "team-a")
    assert file.stat().st_mode & 0o077 == 0


def test_equal_secrets_would_have_different_hashes(file: Path) -> None:
    keys.add(file, "a")
    keys.add(file, "b")
    a, b = keys.read(file)
    assert a.salt != b.salt


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: None,
        lambda key: "",
        lambda key: key,
        lambda key: f"Basic {key}",
        lambda key: f"Bearer {key[:-1]}",
        lambda key: f"Bearer {key}x",
        lambda key: f"Bearer att-000000000000-{key.split('-', 2)[2]}",
        lambda key: f"Bearer att-0-{key.split('-', 2)[2]}",
        lambda key: "Bearer att-0-",
        lambda key: "Bearer \xff",
    ],
    ids=["none", "empty", "no scheme", "basic", "cut", "longer", "another id", "nobody", "nobody's empty", "no ASCII"],
)
def test_anything_but_a_whole_key_is_refused(file: Path, spoil: Callable[[str], str | None]) -> None:
    key = keys.add(file, "team-a")
    with pytest.raises(Unauthorized):
        KeyRing(file).authenticate(spoil(key))


def test_an_expired_key_is_refused(file: Path) -> None:
    key = keys.add(file, "team-a", expires=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(Unauthorized, match="expired"):
        KeyRing(file).authenticate(bearer(key))


def test_a_key_counts_from_when_it_is_added_until_it_is_removed(file: Path, ring_of: Callable[[Path], KeyRing]) -> None:
    keys.add(file, "first")
    ring = ring_of(file)
    key = keys.add(file, "second")
    assert ring.authenticate(bearer(key)).name == "second"
    keys.remove(file, "second")
    with pytest.raises(Unauthorized):
        ring.authenticate(bearer(key))


def test_a_file_that_has_become_unreadable_leaves_the_keys_as_they_were(
    file: Path, ring_of: Callable[[Path], KeyRing], caplog: pytest.LogCaptureFixture
) -> None:
    key = keys.add(file, "team-a")
    ring = ring_of(file)
    file.write_text("{")
    with caplog.at_level(logging.ERROR):
        assert ring.authenticate(bearer(key)).name == "team-a"
    assert str(file) in caplog.text


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"keys": [{"id": "1"}]}', '{"secrets": []}', '{"keys": [{"name": "x", "key": "plain"}]}'],
)
def test_a_file_of_another_form_is_refused_by_its_name(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=str(file)):
        KeyRing(file)


def test_no_two_keys_have_one_name(file: Path) -> None:
    keys.add(file, "team-a")
    with pytest.raises(ConfigError, match="already"):
        keys.add(file, "team-a")


def test_a_name_that_could_forge_a_line_of_the_log_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match="name"):
        keys.add(file, "a\nb")


def test_removing_a_key_that_is_not_there_is_an_error(file: Path) -> None:
    keys.add(file, "team-a")
    with pytest.raises(ConfigError, match="team-b"):
        keys.remove(file, "team-b")


def test_a_file_in_a_place_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-place"):
        keys.add(tmp_path / "no-such-place" / "keys.json", "team-a")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(quota.time, "monotonic", lambda: now[0])
    return now


def key_with(**limits: int) -> ApiKey:
    return ApiKey(id="1", name="team-a", salt="00", sha256="00", **limits)


def test_a_key_has_as_many_requests_open_as_it_may() -> None:
    key, used = key_with(max_concurrent=2), Quota(max_streams=100)
    used.enter(key)
    used.enter(key)
    with pytest.raises(Overloaded, match="2 are allowed"):
        used.enter(key)
    used.leave()
    used.enter(key)


def test_a_key_without_a_limit_of_its_own_has_the_operators() -> None:
    used = Quota(max_streams=1)
    used.enter(key_with())
    with pytest.raises(Overloaded):
        used.enter(key_with())


def test_a_refusal_says_when_there_are_tokens_enough(clock: list[float]) -> None:
    key, used = key_with(tokens_per_minute=600), Quota(max_streams=1)
    used.spend(key, 500)
    with pytest.raises(Overloaded) as refused:
        used.spend(key, 150)
    assert refused.value.retry_after_s == 5, "50 tokens are missing, and 10 come back each second"
    clock[0] += 5
    used.spend(key, 150)


def test_of_two_ingresses_each_gives_half_of_a_keys_tokens(clock: list[float]) -> None:
    key, used = key_with(tokens_per_minute=600), Quota(max_streams=1, num_ingresses=2)
    used.spend(key, 300)
    with pytest.raises(Overloaded) as refused:
        used.spend(key, 100)
    assert refused.value.retry_after_s == 20, "100 tokens are missing, and 5 come back each second"
    clock[0] += 20
    used.spend(key, 100)


def test_what_was_reserved_and_not_used_comes_back(clock: list[float]) -> None:
    key, used = key_with(tokens_per_minute=600), Quota(max_streams=1)
    used.spend(key, 600)
    used.refund(590)
    used.spend(key, 590)


def test_a_request_larger_than_a_minute_passes_when_nothing_is_spent_and_is_paid_off(clock: list[float]) -> None:
    key, used = key_with(tokens_per_minute=600), Quota(max_streams=1)
    used.spend(key, 1200)
    clock[0] += 60
    with pytest.raises(Overloaded):
        used.spend(key, 10)
    clock[0] += 1
    used.spend(key, 10)


def test_a_new_file_replaces_the_old_one_in_one_go(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader must never see half a file: what is written has another name until it is whole."""
    keys.add(file, "first")
    before = file.stat().st_ino
    keys.add(file, "second")
    assert file.stat().st_ino != before
    assert [entry.name for entry in file.parent.iterdir()] == ["keys.json"]

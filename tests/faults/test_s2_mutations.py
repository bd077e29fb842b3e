"""S2: bodies that are not what they should be: each gets a 4xx, and none holds up the event loop for 50 ms."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.faults.conftest import InProcess, scaled

pytestmark = pytest.mark.faults

STALL_LIMIT_S = 0.050
WORK_LIMIT_S = 0.5  # of a thread beside it, which takes turns with the loop
TEXT = "Once upon a time"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": TEXT, "max_tokens": 4, "stop": ["x"], "logit_bias": {"5": 1.5}},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}], "n": 2, "max_tokens": 4},
}
DEEP = 10_000


ITEMS = [b"true", b"[]", b"{}", b'"x"', b"1.5", b'{"role": "user"}', b"[true]"]
SIZES = [15_000, 700_000]  # read where it arrives, and in a thread
LISTS = [("/v1/completions", "prompt"), ("/v1/completions", "stop"), ("/v1/chat/completions", "messages")]


def cut(body: dict[str, Any], rng: random.Random) -> bytes:
    text = json.dumps(body).encode()
    return text[: rng.randrange(len(text))]


def deep(body: dict[str, Any], rng: random.Random) -> bytes:
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    return with_value(body, rng, opening * DEEP + b"1" + closing * DEEP)


def number_that_is_none(body: dict[str, Any], rng: random.Random) -> bytes:
    return with_value(body, rng, rng.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"0x1", b"01"]))


def duplicate_key(body: dict[str, Any], rng: random.Random) -> bytes:
    text, name = json.dumps(body), rng.choice(list(body))
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(body[name])}}}".encode()


def lone_surrogate(body: dict[str, Any], rng: random.Random) -> bytes:
    return with_text(body, rng.choice([rb'"\ud800"', rb'"x\udfff"', rb'"\ud800\ud800"', b'"\xed\xa0\x80"']))


def nul(body: dict[str, Any], rng: random.Random) -> bytes:
    return with_text(body, rng.choice([b'"a\0b"', rb'"a\u0000b"', b"\0"]))


def bad_utf8(body: dict[str, Any], rng: random.Random) -> bytes:
    return with_text(body, rng.choice([b'"\xff"', b'"\xc0\x80"', b'"\xe2\x82"', b'"\xf8\x88\x80\x80\x80"']))


def bad_byte(body: dict[str, Any], rng: random.Random) -> bytes:
    text = bytearray(json.dumps(body).encode())
    text[rng.randrange(len(text))] = rng.choice([0x00, 0x01, 0x80, 0xFE, 0xFF])
    return bytes(text)


def wrong_type(body: dict[str, Any], rng: random.Random) -> bytes:
    return with_value(body, rng, rng.choice([b"true", b'{"a": 1}', b"[[[]]]", b"[null]", b'[{"role": 1}]']))


def much_of_the_wrong_type(body: dict[str, Any], rng: random.Random) -> bytes:
    """Up to as large as a body may be: whoever describes every fault in it is busy for seconds."""
    item, size = rng.choice(ITEMS), rng.choice(SIZES)
    entries = b",".join(b'"k%d":' % i + item for i in range(size // (len(item) + 11)))
    return with_value(body, rng, rng.choice([b"{" + entries + b"}", list_of(item, size)]))


def list_of(item: bytes, size: int) -> bytes:
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


def many_unknown_fields(body: dict[str, Any], rng: random.Random) -> bytes:
    fields = b",".join(b'"field_%d":1' % i for i in range(rng.choice([1_000, 10_000, 50_000])))
    return json.dumps(body).encode()[:-1] + b"," + fields + b"}"


def with_value(body: dict[str, Any], rng: random.Random, value: bytes) -> bytes:
    """The body with something else as the value of one of its fields."""
    name = rng.choice(list(body))
    return json.dumps({**body, name: "@@"}).encode().replace(b'"@@"', value)


def with_text(body: dict[str, Any], value: bytes) -> bytes:
    """The body with something else as its text, where any text would do."""
    return json.dumps(body).encode().replace(json.dumps(TEXT).encode(), value)


MUTATIONS = [cut, deep, number_that_is_none, duplicate_key, lone_surrogate, nul, bad_utf8, bad_byte, wrong_type]
LARGE = [much_of_the_wrong_type, many_unknown_fields]


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
async def test_a_mutated_body_gets_a_4xx_at_once(in_process: Callable[..., InProcess], mutate: Any) -> None:
    """Read by `json.loads`, NaN, duplicate keys and lone surrogates pass, and 10,000 brackets end in a 500."""
    rng = random.Random(mutate.__name__)
    service = in_process()
    for i in range(scaled(24, 500)):
        path = rng.choice(list(BODIES))
        await refuse(service, path, mutate(BODIES[path], rng), f"{mutate.__name__} {i}")


@pytest.mark.parametrize("mutate", LARGE, ids=lambda mutate: mutate.__name__)
async def test_a_large_body_of_the_wrong_kind_gets_a_4xx_at_once(
    in_process: Callable[..., InProcess], mutate: Any
) -> None:
    """With every fault described to the end, the loop would stand still for as long as that takes."""
    rng = random.Random(mutate.__name__)
    service = in_process()
    for i in range(scaled(12, 250)):
        path = rng.choice(list(BODIES))
        await refuse(service, path, mutate(BODIES[path], rng), f"{mutate.__name__} {i}")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("item", ITEMS, ids=bytes.decode)
async def test_a_list_of_the_wrong_kind_gets_a_4xx_at_once(
    in_process: Callable[..., InProcess], item: bytes, size: int
) -> None:
    """The first fault is told: describing all of a list of 140,000 times `true` would hold up everybody."""
    service = in_process()
    for path, name in LISTS:
        body = json.dumps({**BODIES[path], name: "@@"}).encode().replace(b'"@@"', list_of(item, size))
        await refuse(service, path, body, f"{name} {item!r}")


async def refuse(service: InProcess, path: str, body: bytes, what: str) -> None:
    answer = await service.post(path, body)
    place = f"{what}: {body[:80]!r} -> {answer.status} {answer.body[:80]!r}"
    assert 400 <= answer.status < 500, place
    assert answer.stall < STALL_LIMIT_S, f"{place} after {answer.stall:.3f} s"
    assert answer.work < WORK_LIMIT_S, f"{place} after {answer.work:.3f} s of work"
    assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}, place
    assert not service.fleet.replicas["a"].submitted, "nothing of it reached an engine"

"""Servers take turns under the same load, and a round that did not go well is no round."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from loadtest import versus
from loadtest.stream import StreamError
from loadtest.versus import Load, Outcome

pytestmark = pytest.mark.fast

LOAD = Load(clients=3, requests=2, prompt=5, output=4, vocab_size=300)
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
TEXT = b'data: {"choices": [{"text": "a"}]}\n\n'
END = b'data: {"choices": [], "usage": {"completion_tokens": 4}}\n\ndata: [DONE]\n\n'


def chunked(*pieces: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (*pieces, b""))


@asynccontextmanager
async def server(answer: bytes, seen: Callable[[dict[str, object]], object] = print) -> AsyncIterator[str]:
    """Gives everyone the same answer."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in head.splitlines() if line.startswith(b"Content-Length"))
        seen(json.loads(await reader.readexactly(length)))
        writer.write(answer)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1")
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


async def test_a_round_counts_what_the_server_counted_wherever_its_chunks_are_cut():
    bodies: list[dict[str, object]] = []
    stream = TEXT + END
    async with server(chunked(stream[:20], stream[20:50], stream[50:]), bodies.append) as url:
        outcome = await versus.play(url, "m", LOAD, seed=1)
    assert len(bodies) == 6
    assert all(body["ignore_eos"] and body["stream"] and body["max_tokens"] == 4 for body in bodies)
    prompts = [tuple(body["prompt"]) for body in bodies]  # type: ignore[arg-type]
    assert len(set(prompts)) == 6
    assert all(256 <= token < 300 for prompt in prompts for token in prompt)
    assert outcome.rate > 0
    assert outcome.ttft > 0


async def test_the_same_seed_asks_the_same():
    asked: list[list[object]] = [[], []]
    for bodies in asked:
        async with server(chunked(TEXT, END), lambda body, to=bodies: to.append(body["prompt"])) as url:  # type: ignore[misc]
            await versus.play(url, "m", LOAD, seed=7)
    assert sorted(map(str, asked[0])) == sorted(map(str, asked[1]))


async def test_another_number_of_clients_asks_nothing_that_a_cache_may_know():
    asked: list[object] = []
    async with server(chunked(TEXT, END), lambda body: asked.append(body["prompt"])) as url:
        for clients in (1, 3):
            await versus.play(url, "m", replace(LOAD, clients=clients), seed=7)
    assert len(asked) == len(set(map(str, asked))) == 2 * (1 + 3)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 429 Too Many Requests\r\n\r\nfull", "429 Too Many Requests: full"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + TEXT, "no stream"),
        (chunked(END), "no text"),
        (chunked(TEXT), "no usage"),
        (chunked(b'data: {"error": {"message": "tired"}}\n\n'), "tired"),
        (chunked(TEXT, END.replace(b"4", b"3")), "3 tokens instead of 4"),
        (HEAD + b"40\r\ndata:", "the connection broke"),
    ],
)
async def test_a_round_with_a_bad_answer_is_refused(answer: bytes, why: str):
    async with server(answer) as url:
        with pytest.raises(StreamError, match=why):
            await versus.play(url, "m", LOAD, seed=1)


async def test_servers_take_turns_and_the_order_turns_around(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[str, int]] = []

    async def play(url: str, model: str, load: Load, seed: int) -> Outcome:
        asked.append((url, seed))
        return Outcome(1.0, 1.0)

    monkeypatch.setattr(versus, "play", play)
    monkeypatch.setattr(versus, "served_model", lambda url: "m")
    outcomes = await versus.take_turns({"ours": "A", "theirs": "B"}, LOAD, rounds=2)
    assert asked == [("A", 0), ("B", 0), ("A", 1), ("B", 1), ("B", 2), ("A", 2)]
    assert [len(rounds) for rounds in outcomes.values()] == [2, 2]


def test_the_table_compares_the_first_with_the_others_within_each_round():
    ours = [Outcome(1000.0, 0.2), Outcome(500.0, 0.5), Outcome(900.0, 0.3)]
    theirs = [Outcome(250.0, 2.0), Outcome(125.0, 3.0), Outcome(100.0, 4.0)]
    assert versus.table({"ours": ours, "theirs": theirs}).splitlines()[2:] == [
        "| ours | 900 | 300 ms | 1.00 |",
        "| theirs | 125 | 3,000 ms | 4.00 |",
    ]


async def several(urls: dict[str, str], load: Load, rounds: int) -> dict[str, list[Outcome]]:
    """In place of `take_turns`: the rate is the number of completions."""
    return {name: [Outcome(float(load.clients * load.requests), 0.1)] * rounds for name in urls}


def test_each_number_of_clients_has_a_table_of_at_least_sixteen_completions_a_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(versus, "take_turns", several)
    versus.main(["a=http://x", "--clients", "1", "6", "32", "--rounds", "2", "--json", str(tmp_path / "seen.json")])
    tables = [text.splitlines() for text in capsys.readouterr().out.strip().split("\n\n")]
    assert [title for [title] in tables[::2]] == ["1 client", "6 clients", "32 clients"]
    assert [rows[2] for rows in tables[1::2]] == [f"| a | {n} | 100 ms | 1.00 |" for n in (16, 18, 64)]
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [each["load"]["requests"] for each in seen["loads"]] == [16, 3, 2]
    assert [len(each["rounds"]["a"]) for each in seen["loads"]] == [2, 2, 2]


def test_a_server_that_is_not_there_is_told_in_one_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        versus.main(["nobody=http://127.0.0.1:1"])
    assert exit_.value.code == 1
    assert "refused" in capsys.readouterr().err


def test_a_server_without_a_name_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        versus.main(["http://127.0.0.1:8000"])
    assert "is not NAME=http://HOST:PORT" in capsys.readouterr().err

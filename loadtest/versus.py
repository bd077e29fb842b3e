"""Servers under the same load, taking turns, so that their ratio holds on a machine that is noisy.

    python -m loadtest.versus attendant=http://127.0.0.1:8000 llama-server=http://127.0.0.1:8080

A round: `--clients` readers ask for `--requests` completions each, one after another: random token ids in, `--output`
tokens out, streamed, EOS ignored. No server tokenizes a prompt, and all compute the same number of tokens. Of several
numbers of clients each has rounds and a table of its own.

The client reads its sockets itself and looks into few of the events: it lives on the servers' cores, and the faster
server would pay more for it.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from loadtest.stream import StreamError

MIN_REQUESTS = 16  # in a round, whatever the number of clients: the median of two says little


@dataclass(frozen=True)
class Load:
    """What a round asks of a server. prompt: token ids of each; they are drawn from [256, vocab_size)."""

    clients: int
    requests: int
    prompt: int
    output: int
    vocab_size: int


@dataclass(frozen=True)
class Outcome:
    """A round. rate: generated tokens a second over all clients; ttft: the median, in seconds."""

    rate: float
    ttft: float


@dataclass(frozen=True)
class Completion:
    """One request, seconds from its send. tokens: as the server counts them."""

    ttft: float
    tokens: int


async def play(url: str, model: str, load: Load, seed: int) -> Outcome:
    """One round. Raises `StreamError` where a request does not end well: such a round says nothing."""

    async def client(number: int) -> list[Completion]:
        rng = random.Random(f"{seed}/{load.clients}/{number}")  # no prompt of another load: it would be cached
        seen = []
        for _ in range(load.requests):
            prompt = [rng.randrange(256, load.vocab_size) for _ in range(load.prompt)]
            seen.append(await complete(url, {"model": model, "prompt": prompt, "max_tokens": load.output}))
        return seen

    started = time.perf_counter()
    completions = list(chain.from_iterable(await asyncio.gather(*map(client, range(load.clients)))))
    seconds = time.perf_counter() - started
    if short := [each.tokens for each in completions if each.tokens != load.output]:
        raise StreamError(f"{url}: a completion has {short[0]} tokens instead of {load.output}")
    rate = sum(each.tokens for each in completions) / seconds
    return Outcome(rate, statistics.median(each.ttft for each in completions))


async def complete(url: str, body: dict[str, Any]) -> Completion:
    """Send one request and read its stream to the end. Raises `StreamError`."""
    parts = urlsplit(url)
    fields = {"temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    payload = json.dumps(body | fields).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        writer.write(head.encode() + payload)
        ttft, tokens = None, None
        async for line in body_lines(reader):
            if ttft is None and has_text(line):
                ttft = time.perf_counter() - started
            if b'"completion_tokens"' in line:
                tokens = json.loads(line.removeprefix(b"data:"))["usage"]["completion_tokens"]
            if line.startswith(b"data:") and b'"error"' in line:
                raise StreamError(f"{url}: {line.decode()}")
    except (OSError, asyncio.IncompleteReadError) as error:
        raise StreamError(f"{url}: the connection broke: {error!r}") from None
    finally:
        writer.close()
    if ttft is None or tokens is None:
        raise StreamError(f"{url}: the stream has no {'text' if ttft is None else 'usage'}")
    return Completion(ttft, tokens)


async def body_lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a chunked answer, each as soon as it has arrived, wherever the chunks are cut."""
    status = await reader.readline()
    headers = [line async for line in _until_empty(reader)]
    if status.split()[1:2] != [b"200"]:
        raise StreamError(f"{status.decode().strip()}: {(await reader.read(300)).decode(errors='replace')}")
    if b"transfer-encoding: chunked" not in (line.lower().strip() for line in headers):
        raise StreamError("the answer does not come in chunks, so it is no stream")
    rest = b""
    while size := int(await reader.readline() or b"0", 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line


async def _until_empty(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while line := (await reader.readline()).strip():
        yield line


def has_text(line: bytes) -> bool:
    """Whether this line of a stream is an event that adds to the text."""
    if not line.startswith(b"data: {"):
        return False
    return any(choice.get("text") for choice in json.loads(line.removeprefix(b"data:")).get("choices", ()))


def served_model(url: str) -> str:
    """The first model that the server lists."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
        name: str = json.load(response)["data"][0]["id"]
    return name


def load_of(clients: int, args: argparse.Namespace) -> Load:
    """A round of so many clients."""
    requests = max(args.requests, math.ceil(MIN_REQUESTS / clients))
    return Load(clients, requests, args.prompt, args.output, args.vocab_size)


async def take_turns(urls: dict[str, str], load: Load, rounds: int) -> dict[str, list[Outcome]]:
    """So many rounds of each server, in an order that turns around, after a short one that does not count."""
    models = {name: served_model(url) for name, url in urls.items()}
    outcomes: dict[str, list[Outcome]] = {name: [] for name in urls}
    for name, url in urls.items():
        await play(url, models[name], Load(load.clients, 1, load.prompt, 4, load.vocab_size), seed=0)
    for seed in range(1, rounds + 1):
        for name in urls if seed % 2 else reversed(urls):
            outcomes[name].append(await play(urls[name], models[name], load, seed))
    return outcomes


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """A markdown table of medians; the first server by each of the others, as the median of ratios within rounds."""
    first, *_ = outcomes
    lines = [f"| server | tokens/s | TTFT p50 | {first} over it |", "|---|---|---|---|"]
    for name, rounds in outcomes.items():
        rate, ttft = (statistics.median(values) for values in zip(*((r.rate, r.ttft) for r in rounds), strict=True))
        by = statistics.median(ours.rate / its.rate for ours, its in zip(outcomes[first], rounds, strict=True))
        lines.append(f"| {name} | {rate:,.0f} | {1000 * ttft:,.0f} ms | {by:.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.versus", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("server", nargs="+", help="NAME=URL; the first is compared with the others")
    parser.add_argument("--clients", type=int, nargs="+", default=[32])
    parser.add_argument(
        "--requests", type=int, default=2, help=f"of each client in a round; {MIN_REQUESTS} at least in all"
    )
    parser.add_argument("--prompt", type=int, default=64, help="token ids of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of each completion")
    parser.add_argument("--vocab-size", type=int, default=49152, help="prompts are drawn from ids below it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if bad := [server for server in args.server if "=http://" not in server]:
        parser.error(f"{bad[0]!r} is not NAME=http://HOST:PORT")
    urls = dict(server.split("=", 1) for server in args.server)
    seen = []
    for clients in args.clients:
        load = load_of(clients, args)
        try:
            outcomes = asyncio.run(take_turns(urls, load, args.rounds))
        except (StreamError, OSError) as error:
            parser.exit(1, f"versus: {error}\n")
        print(f"{clients} client{'s' * (clients > 1)}\n\n{table(outcomes)}\n", flush=True)
        rounds = {name: [asdict(outcome) for outcome in each] for name, each in outcomes.items()}
        seen.append({"load": asdict(load), "rounds": rounds})
    if args.json:
        args.json.write_text(json.dumps({"urls": urls, "loads": seen}, indent=2) + "\n")


if __name__ == "__main__":
    main()

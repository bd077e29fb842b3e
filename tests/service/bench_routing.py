"""Measures what prefix routing is worth: `python -m tests.service.bench_routing`.

Three replicas of the embedded model, each with a cache that holds ten of 24 prefixes of 896 tokens. Requests with a
tail of their own behind a prefix drawn at random come from a few clients in turn; then many ask for one new prefix at
once. Our router and power of two choices take the same requests, each with a service of its own.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service.data_plane import free_port
from tests.conftest import STORYTELLER
from tests.service.conftest import Running, stop

ROOT = Path(__file__).parent.parent.parent
ROUTERS = {
    "prefix affinity and load": "service.router:PinnedRouter",
    "power of two choices": "tests.service.baselines:PowerOfTwoRouter",
}
LAUNCH = "import sys, service.app, service.cli; service.app.ROUTER = sys.argv.pop(1); service.cli.main()"
OPTIONS = ["--dtype", "fp32", "--replicas", "3", "--kv-cache-tokens", "10240", "--max-num-seqs", "8"]

NUM_PREFIXES, PREFIX_TOKENS, TAIL_TOKENS = 24, 896, 24
NUM_CLIENTS, NUM_WARM_UP, NUM_REQUESTS, SHORT = 3, 72, 240, 8
NUM_HOT, NUM_HOT_CLIENTS, LONG = 96, 32, 64


class Answer(NamedTuple):
    """Seconds to the first token, and how much of the prompt was found in a cache."""

    ttft: float
    cached_share: float


def launch(router: str) -> Running:
    """`attendant serve`, with this router."""
    port = free_port()
    words = ["serve", "--model", str(STORYTELLER), "--port", str(port), *OPTIONS]
    command = [sys.executable, "-c", LAUNCH, router, *words]
    # Serve's own processes import the baselines, too.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    banner = process.stdout.readline()
    assert "ready" in banner, banner
    return Running(process, f"http://127.0.0.1:{port}", STORYTELLER.name, banner)


async def ask(client: httpx.AsyncClient, prompt: list[int], max_tokens: int) -> Answer:
    """One streamed completion."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "seed": 1}
    started, ttft, usage = time.perf_counter(), 0.0, {}
    async with client.stream(
        "POST", "/v1/completions", json={"prompt": prompt, "max_tokens": max_tokens, **options}
    ) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                ttft = ttft or time.perf_counter() - started
                usage = json.loads(line[len("data: ") :]).get("usage") or usage
    return Answer(ttft, usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"])


async def closed_loop(url: str, prompts: list[list[int]], clients: int, max_tokens: int) -> list[Answer]:
    """All prompts, so many at a time; answers in the order in which they came."""
    waiting, answers = iter(prompts), []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one_client() -> None:
            for prompt in waiting:
                answers.append(await ask(client, prompt, max_tokens))

        await asyncio.gather(*(one_client() for _ in range(clients)))
    return answers


def tokens_by_replica(url: str) -> dict[str, float]:
    """Prompt tokens that each replica has looked up."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    samples = [sample for family in families for sample in family.samples]
    return {s.labels["replica"]: s.value for s in samples if s.name == "attendant_prefix_cache_queries_total"}


def measure(router: str) -> dict[str, Any]:
    """Both workloads through one router."""
    rng = random.Random(7)

    def ids(count: int) -> list[int]:
        return [rng.randrange(10, 2000) for _ in range(count)]

    prefixes = [ids(PREFIX_TOKENS) for _ in range(NUM_PREFIXES)]
    prompts = [rng.choice(prefixes) + ids(TAIL_TOKENS) for _ in range(NUM_WARM_UP + NUM_REQUESTS)]
    hot = ids(PREFIX_TOKENS)
    hot_prompts = [hot + ids(TAIL_TOKENS) for _ in range(NUM_HOT)]
    running = launch(router)
    try:
        answers = asyncio.run(closed_loop(running.url, prompts, NUM_CLIENTS, SHORT))[NUM_WARM_UP:]
        before = tokens_by_replica(running.url)
        hot_answers = asyncio.run(closed_loop(running.url, hot_prompts, NUM_HOT_CLIENTS, LONG))
        after = tokens_by_replica(running.url)
    finally:
        stop(running)
    share = sorted((after[name] - before[name] for name in after), reverse=True)
    return {
        "hit rate": statistics.fmean(answer.cached_share for answer in answers),
        "TTFT p50": statistics.median(answer.ttft for answer in answers),
        "TTFT p90": statistics.quantiles([answer.ttft for answer in answers], n=10)[-1],
        "hot TTFT p50": statistics.median(answer.ttft for answer in hot_answers),
        "hot TTFT p90": statistics.quantiles([answer.ttft for answer in hot_answers], n=10)[-1],
        "hot, by replica": [round(tokens / sum(share), 2) for tokens in share],
    }


def main() -> None:
    """A table, one router a line."""
    for number, (name, router) in enumerate(ROUTERS.items()):
        row = measure(router)
        if number == 0:
            print("| router | " + " | ".join(row) + " |\n|---" + "|---" * len(row) + "|")
        cells = [
            f"{1000 * value:.0f} ms" if "TTFT" in key else f"{value:.1%}" if key == "hit rate" else str(value)
            for key, value in row.items()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

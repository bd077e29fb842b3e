"""One scrape of many processes: their texts gathered, joined, and on demand told once more in vLLM's words.

Nothing is summed here. Every series carries the replica that it is of, so that a restart is seen as one and rates are
right; adding up is for whoever asks.
"""

import asyncio
import contextvars
import logging
import re
import time
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, start_http_server
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from service.engines import within
from service.instruments import PREFIX

logger = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# A replica that does not answer is shown as it was last seen for so long: its counters would else fall to nothing and
# rise again, which looks like a restart.
KEEP_S = 30.0

# Of our families those that vLLM has too, by their names there where they differ.
VLLM_NAMES = dict.fromkeys(
    """
    num_requests_running num_requests_waiting num_preemptions_total prefix_cache_queries_total prefix_cache_hits_total
    prompt_tokens_total prompt_tokens_cached_total generation_tokens_total request_success_total cache_config_info
    spec_decode_num_draft_tokens_total spec_decode_num_accepted_tokens_total time_to_first_token_seconds
    inter_token_latency_seconds request_time_per_output_token_seconds e2e_request_latency_seconds
    request_queue_time_seconds request_prefill_time_seconds request_decode_time_seconds request_prompt_tokens
    request_generation_tokens
    """.split()
) | {"kv_cache_usage_ratio": "kv_cache_usage_perc", "iteration_tokens": "iteration_tokens_total"}
VLLM_LABELS = {"model": "model_name", "replica": "engine"}


class Exposition(NamedTuple):
    """What one process counts, as text; and where it exposes the same by itself (`host:port`), if it does."""

    deployment: str
    replica: str
    text: str
    target: str | None = None


class Seen(NamedTuple):
    """The last exposition of a replica; when: on `time.monotonic`'s clock."""

    exposition: Exposition
    when: float


class Replicas:
    """All replicas of one deployment, asked for their expositions.

    pins: whether its router sends a call with `pin` to that very replica.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, pins: bool) -> None:
        self._handle = handle
        self._pins = pins
        self._seen: dict[str, Seen] = {}

    async def read(self, timeout_s: float) -> tuple[list[Exposition], int]:
        """Each replica's exposition, and how many of them are new; the others have not answered in time."""
        answers, complete = await self._ask(timeout_s)
        now = time.monotonic()
        kept = {} if complete else {name: seen for name, seen in self._seen.items() if now - seen.when < KEEP_S}
        self._seen = kept | {answer.replica: Seen(answer, now) for answer in answers}
        return [seen.exposition for seen in self._seen.values()], len(answers)

    async def _ask(self, timeout_s: float) -> tuple[list[Exposition], bool]:
        """What came, and whether all that there are have answered."""
        try:
            answers = await self._handle.broadcast("metrics").results_async(timeout_s=timeout_s, return_exceptions=True)
        except Exception as error:  # a timeout is of the whole, because of one: so each that we know by itself
            logger.info("not every replica told its metrics: %r", error)
            known = list(self._seen) if self._pins else []
            asked = (self._ask_one(replica, timeout_s / 2) for replica in known)
            answers = [*await asyncio.gather(*asked, return_exceptions=True), None]
        good = [answer for answer in answers if isinstance(answer, Exposition)]
        return good, len(good) == len(answers)

    async def _ask_one(self, replica: str, timeout_s: float) -> Exposition:
        async def call() -> Exposition:
            answer: Exposition = await self._handle.metrics.remote(pin=replica)
            return answer

        # In a context of its own: all calls of one HTTP request have one id with Serve, and its router, looking for the
        # second of two at once by that, goes round without end for 10 s and stops the whole event loop.
        return await within(timeout_s, asyncio.create_task(call(), context=contextvars.Context()))


class View(NamedTuple):
    """What an ingress shows of the others. peers: all ingresses; None: there is but one.

    replica, target: its own, as in `Exposition`; speaks_vllm: whether it tells its page in vLLM's words too.
    """

    peers: Replicas | None = None
    replica: str = "local"
    target: str | None = None
    speaks_vllm: bool = False

    def own(self, text: str) -> Exposition:
        """This ingress."""
        return Exposition("Ingress", self.replica, text, self.target)

    async def others(self, timeout_s: float) -> list[Exposition]:
        """The other ingresses."""
        found = [] if self.peers is None else (await self.peers.read(timeout_s))[0]
        return [one for one in found if one.replica != self.replica]

    def page(self, expositions: Iterable[Exposition]) -> str:
        """All of them in one text."""
        text = merge(exposition.text for exposition in expositions)
        return text + as_vllm(text) if self.speaks_vllm else text


ALONE = View()


class Watching(NamedTuple):
    """What an operator chose about metrics.

    exporter_host: where each process exposes its own on a free port, beside the ingress' `/metrics`; None: nowhere.
    vllm_metrics: whether `/metrics` says it in vLLM's words, too. num_engines: engine replicas that there should be.
    """

    exporter_host: str | None = None
    vllm_metrics: bool = False
    num_engines: int = 1


def address(text: str) -> str:
    """An IP address. Raises `ValueError` for anything else."""
    return str(ip_address(text))


def export(registry: CollectorRegistry, host: str) -> str:
    """Expose a registry on a free port of `host`, from a thread. The address, as another machine writes it."""
    server, _ = start_http_server(0, host, registry)
    if ip_address(host).is_unspecified:
        host = str(get_node_ip_address())  # type: ignore[no-untyped-call]
    return f"[{host}]:{server.server_port}" if ":" in host else f"{host}:{server.server_port}"


def targets(expositions: Iterable[Exposition]) -> list[dict[str, object]]:
    """The processes that expose themselves, as Prometheus' `http_sd` reads them."""
    return [
        {
            "targets": [exposition.target],
            "labels": {
                "__meta_attendant_deployment": exposition.deployment,
                "__meta_attendant_replica": exposition.replica,
            },
        }
        for exposition in expositions
        if exposition.target is not None
    ]


def merge(texts: Iterable[str]) -> str:
    """Several registries' texts as one: each family keeps one header, followed by the samples of all.

    The format allows a family's header only once, so the texts cannot simply follow one another.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}  # headers, samples
    for text in texts:
        headers: list[str] = []
        samples: list[str] = []
        is_known = False
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                is_known = name in families
                headers, samples = families.setdefault(name, ([], []))
            if not line.startswith("#"):
                samples.append(line)
            elif not is_known:
                headers.append(line)
    return "".join("\n".join(headers + samples) + "\n" for headers, samples in families.values())


def as_vllm(text: str) -> str:
    """The families that vLLM has too, under its names and labels, for dashboards and tools that were made for it."""
    lines, ours, theirs = [], "", ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            ours = line.split(" ", 3)[2].removeprefix(PREFIX)
            theirs = (VLLM_NAMES[ours] or ours) if ours in VLLM_NAMES else ""
        if theirs:
            line = line.replace(PREFIX + ours, f"vllm:{theirs}", 1)
            lines.append(line if line.startswith("#") else _relabelled(line))
    return "".join(f"{line}\n" for line in lines)


def _relabelled(sample: str) -> str:
    return re.sub(r"(?<=[{,])(model|replica)(?==\")", lambda found: VLLM_LABELS[found[0]], sample)

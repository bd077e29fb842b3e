"""What it takes to start a service, and to run one in this process; `served.py` has what a session shares."""

import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer

from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer
from service import replica as replica_module
from service.api.routes import create_api
from service.completion import Service
from service.data_plane import free_port
from service.dispatch import Dispatcher
from service.door import Door
from service.limits import Limits
from service.metrics import IngressMetrics
from service.replica import EngineReplica, Queue
from service.tracing import Tracer
from tests.conftest import write_llama
from tests.service.fakes import LocalFleet

CORPUS = ["Once upon a time there was a fox and a lantern in the deep forest. She told him a story of the moon."] * 20
TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }} Call them with <tool_call>.</s>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATE_WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}<|user|>{{ tools | tojson }} Call them with <tool_call>.{% endif %}"
    "{% for m in messages %}<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_model(directory: Path) -> Path:
    """A tiny random Llama with a byte-level tokenizer and a chat template: everything the service needs."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    write_llama(
        directory,
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )
    return directory


@dataclass
class Running:
    """A service in a process of its own."""

    process: subprocess.Popen[str]
    url: str
    model: str
    banner: str

    def metrics(self) -> dict[str, float]:
        """Every sample by its name, summed over labels."""
        totals: dict[str, float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=10).text):
            for sample in family.samples:
                totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
        return totals

    def wait_for(self, name: str, value: float, seconds: float = 30) -> None:
        """Poll /metrics until a sample has a value; the time limit only keeps a failure from hanging."""
        done = threading.Event()
        for _ in range(int(seconds / 0.1)):
            if self.metrics()[name] == value:
                return
            done.wait(0.1)
        raise AssertionError(f"{name} is {self.metrics()[name]} after {seconds} s, not {value}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_processes(self) -> list[psutil.Process]:
        return [child for child in self.children() if ":Engine" in command_of(child)]

    def engines_at_work(self) -> list[psutil.Process]:
        """Those that have requests, the busiest first. An idle one may die without a stream that notices: routing by
        prefix gives it none where the other has told the same stories before.
        """
        exposition = text_string_to_metric_families(httpx.get(f"{self.url}/metrics", timeout=10).text)
        samples = (sample for family in exposition for sample in family.samples)
        running = {s.labels["replica"]: s.value for s in samples if s.name == "attendant_num_requests_running"}
        load = {process: running.get(_replica_of(process), 0.0) for process in self.engine_processes()}
        return sorted((process for process in load if load[process]), key=load.__getitem__, reverse=True)


def command_of(process: psutil.Process) -> str:
    """With its arguments; of one that is just going, nothing."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _replica_of(engine: psutil.Process) -> str | None:
    """The name by which the metrics know it: Serve gives it to the log that the process writes."""
    logs = (Path(file.path) for file in engine.open_files())
    return next((log.stem.rpartition("_")[2] for log in logs if log.name.startswith("replica_attendant_Engine_")), None)


def start(model: Path, *options: str) -> Running:
    """Start `attendant serve` and wait until it says that it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "service", "serve", "--model", str(model), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:  # on a machine without a network, Ray complains of that before
        said.append(line)
        if "ready" in line:
            return Running(process, f"http://127.0.0.1:{port}", model.name, line)
    raise AssertionError("".join(said))


def stop(running: Running, number: int = signal.SIGTERM) -> int:
    """Stop it as a user does; its exit code. What would outlive it is killed, and is the failure of a test."""
    children = running.children()
    running.process.send_signal(number)
    return wait_until_gone(running, children)


def wait_until_gone(running: Running, children: list[psutil.Process]) -> int:
    """Its exit code, once nothing of it is left."""
    code = running.process.wait(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    for orphan in alive:
        orphan.kill()
    assert not alive, f"left behind: {alive}"
    return code


ENGINE_OPTIONS = {"dtype": "fp32", "device": "cpu", "kv_cache_tokens": 8192, "num_threads": 1}


@pytest.fixture
def max_num_seqs() -> int:
    return 8


@pytest.fixture
async def live(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, max_num_seqs: int
) -> AsyncIterator[httpx.AsyncClient]:
    """The HTTP application over a real engine, all in this process, without Ray."""
    async with in_process(tiny_model, monkeypatch, Door(), max_num_seqs=max_num_seqs) as (client, _):
        yield client


@asynccontextmanager
async def in_process(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    door: Door,
    *,
    max_num_seqs: int = 8,
    tracers: tuple[Tracer | None, Tracer | None] = (None, None),
) -> AsyncIterator[tuple[httpx.AsyncClient, EngineReplica]]:
    """The same, with a door; tracers: of the ingress and of the engine."""
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r1"))
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: context)
    options = ENGINE_OPTIONS | {"max_num_seqs": max_num_seqs}
    replica = EngineReplica(str(tiny_model), "tiny", options, Queue(max_waiting=64))
    replica._tracer = tracers[1]
    metrics = IngressMetrics("tiny")
    dispatcher = Dispatcher(LocalFleet(replica), metrics)  # type: ignore[arg-type]
    template = ChatTemplate.from_directory(tiny_model)
    service = Service("tiny", 0, Tokenizer.from_directory(tiny_model), template, dispatcher, metrics, Limits())
    transport = httpx.ASGITransport(create_api(service, door, tracers[0]))
    async with httpx.AsyncClient(transport=transport, base_url="http://attendant", timeout=60) as client:
        yield client, replica
    dispatcher.close()
    replica.__del__()


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_model)


@pytest.fixture(params=["completions", "chat"])
def endpoint(request: pytest.FixtureRequest) -> str:
    return request.param

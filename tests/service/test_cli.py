"""The console command: what it prints, how it refuses, and that nothing outlives it."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from service.app import AppArgs, build
from service.cli import app
from tests.service.conftest import Running, start, stop, wait_until_gone, write_model


def attendant(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that was refused."""
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.slow
def test_generate_prints_one_object_with_what_came_out(tiny_model: Path) -> None:
    arguments = [
        "generate",
        "Once upon",
        "--model",
        str(tiny_model),
        "--max-tokens",
        "6",
        "--seed",
        "1",
        "--ignore-eos",
    ]
    result = json.loads(attendant(*arguments, "--json").stdout)
    assert set(result) == {"token_ids", "text", "finish_reason", "usage"}
    assert len(result["token_ids"]) == result["usage"]["completion_tokens"] == 6
    assert result["finish_reason"] == "length"
    assert attendant(*arguments).stdout == f"Once upon{result['text']}\n"


@pytest.mark.slow
def test_generate_takes_token_ids_where_there_is_no_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    result = attendant(
        "generate", "--token-ids", "1,2,3", "--model", str(tmp_path / "bare"), "--max-tokens", "3", "--json"
    )
    assert json.loads(result.stdout)["text"] is None
    assert json.loads(result.stdout)["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], "PROMPT or --token-ids"),
        (["generate", "--token-ids", "1,x"], "numbers"),
        (["generate", "hello", "--model", "/no/such/place"], "/no/such/place: no such model directory"),
        (["serve", "--model", "/no/such/place"], "/no/such/place: no such model directory"),
        (["evaluate", "--model", "/no/such/place"], "/no/such/place: no such model directory"),
        (["serve", "--host", "0.0.0.0"], "without API keys, everybody who reaches 0.0.0.0 could use the service"),
        (["serve", "--api-keys-file", "/no/such/keys"], "/no/such/keys: the API keys cannot be read"),
        (["serve", "--limit", "max_patience=3"], "limit max_patience"),
        (["serve", "--limit", "max_choices=129"], "limit max_choices"),
        (["keys", "list", "--api-keys-file", "/no/such/keys"], "/no/such/keys"),
        (["serve", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization must lie in (0, 1], not 1.5"),
        (["serve", "--gpu-memory-utilization", "0.5", "--kv-cache-tokens", "99"], "both say how large the cache is"),
        (["serve", "--max-num-batched-tokens", "63"], "must be at least max_num_seqs (64)"),
        (["serve", "--overlap", "--speculative-tokens", "2"], "overlap and speculative_tokens exclude each other"),
        (["generate", "hello", "--gpu-memory-utilization", "0"], "gpu_memory_utilization must lie in (0, 1], not 0.0"),
        (["generate", "hello", "--device", "cpu", "--cuda-graphs"], "cuda_graphs is for a GPU, and the engine runs on"),
        (["generate", "hello", "--device", "cpu", "--kv-cache-dtype", "fp8"], "kv_cache_dtype 'fp8' is for a GPU"),
        (["generate", "hello", "--url", "http://127.0.0.1:9", "--no-overlap"], "leave that out with --url"),
        (["serve", "--kv-cache-dtype", "int8", "--dtype", "fp32"], "kv_cache_dtype 'int8' is for native kernels"),
        (["generate", "hello", "--device", "cpu", "--kv-cache-dtype", "int8"], "the weights are float32"),
    ],
    ids=[
        "no prompt",
        "bad ids",
        "no model to run",
        "no model to serve",
        "no model to score",
        "open to all",
        "no keys",
        "unknown limit",
        "limit beyond its ceiling",
        "no keys to list",
        "more memory than there is",
        "two sizes of the cache",
        "a step too small for all who run",
        "guesses from unread tokens",
        "no memory",
        "graphs of a CPU",
        "fp8 on a CPU",
        "the engine of a service",
        "int8 cache of fp32 weights",
        "int8 cache where torch computes",
    ],
)
def test_a_wrong_command_is_refused_in_one_line(arguments: list[str], words: str) -> None:
    assert words in refusal(attendant(*arguments))


def test_a_key_is_printed_once_listed_by_name_and_removed(tmp_path: Path) -> None:
    file = ["--api-keys-file", str(tmp_path / "keys.json")]
    key = attendant("keys", "add", "team-a", *file, "--tokens-per-minute", "600", "--expires", "2100-01-01").stdout
    assert key.startswith("att-")
    assert attendant("keys", "list", *file).stdout == "team-a tokens_per_minute=600 expires=2100-01-01T00:00:00Z\n"
    attendant("keys", "remove", "team-a", *file)
    assert attendant("keys", "list", *file).stdout == ""


def test_how_many_processes_there_are_reaches_the_application(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[AppArgs] = []
    monkeypatch.setattr("service.serve.run", lambda args, *_, **__: served.append(args))
    options = ["--ingresses", "3", "--tensor-parallel", "2"]
    assert CliRunner().invoke(app, ["serve", "--model", str(tiny_model), *options]).exit_code == 0
    assert (served[0].ingresses, served[0].tensor_parallel) == (3, 2)
    assert build(served[0])._bound_deployment.num_replicas == 3


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (["--threads", "3"], "num_threads", 3),
        (["--gpu-memory-utilization", "0.5"], "gpu_memory_utilization", 0.5),
        (["--kv-cache-dtype", "fp8"], "kv_cache_dtype", "fp8"),
        (["--max-num-batched-tokens", "4096"], "max_num_batched_tokens", 4096),
        (["--no-overlap"], "overlap", False),
        (["--cuda-graphs"], "cuda_graphs", True),
        ([], "cuda_graphs", None),
    ],
)
def test_an_option_reaches_the_engine(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], name: str, value: object
) -> None:
    served: list[AppArgs] = []
    monkeypatch.setattr("service.serve.run", lambda args, *_, **__: served.append(args))
    assert CliRunner().invoke(app, ["serve", "--model", str(tiny_model), *options]).exit_code == 0
    assert served[0].engine_options[name] == value


def test_a_port_in_use_is_named(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refusal(attendant("serve", "--model", str(tiny_model), "--port", port))


@pytest.mark.slow
def test_a_broken_checkpoint_stops_the_start_and_names_the_file(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "broken")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "model.safetensors" in refusal(attendant("serve", "--model", str(directory), "--port", "8999"))


@pytest.fixture(scope="module")
def on_serves_own_proxy(tiny_model: Path) -> Iterator[Running]:
    running = start(tiny_model, "--data-plane", "default", "--kv-cache-tokens", "2048")
    yield running
    if running.process.poll() is None:
        stop(running)


@pytest.mark.slow
def test_the_one_line_at_the_start_tells_the_dtype_and_a_curl_to_try(on_serves_own_proxy: Running) -> None:
    assert "ready with tiny in bf16." in on_serves_own_proxy.banner
    assert f"curl -N {on_serves_own_proxy.url}/v1/completions" in on_serves_own_proxy.banner


@pytest.mark.slow
def test_on_sigterm_an_open_stream_is_finished_and_nothing_is_left_behind(on_serves_own_proxy: Running) -> None:
    running = on_serves_own_proxy
    children = running.children()
    body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.process.send_signal(signal.SIGTERM)
        *_, done, _ = lines
    assert done == "data: [DONE]"
    assert wait_until_gone(running, children) == 0


def test_the_help_names_every_command() -> None:
    text = attendant("--help").stdout
    assert all(command in text for command in ("serve", "top", "generate", "keys", "train", "evaluate", "version"))

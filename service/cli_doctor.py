"""`attendant doctor`, in the terminal."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from model.config import CacheDtype, Device, Dtype
from service.data_plane import DataPlane
from service.hub import EMBEDDED

BAD = 1
STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def doctor(
    model: Annotated[Path, typer.Option(help="The model directory that is to be served.")] = EMBEDDED,
    host: Annotated[str, typer.Option(help="Where it would listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    dtype: Annotated[Dtype, typer.Option(help="As for `serve`, like the others.")] = "auto",
    device: Annotated[Device, typer.Option()] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1)] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1)] = 64,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1)] = 512,
    kv_cache_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    kv_cache_dtype: Annotated[CacheDtype, typer.Option()] = "auto",
    gpu_memory_utilization: Annotated[float | None, typer.Option()] = None,
    data_plane: Annotated[DataPlane, typer.Option()] = "haproxy",
    api_keys_file: Annotated[Path | None, typer.Option(envvar="ATTENDANT_API_KEYS_FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
) -> None:
    """Look over this machine: what it has, what is wrong, what to do. Exit code 1 where something is bad."""
    from service.doctor import Patient, as_dicts, examine
    from service.serve import Address

    options = {
        "dtype": dtype,
        "device": device,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "kv_cache_tokens": kv_cache_tokens,
        "kv_cache_dtype": kv_cache_dtype,
        "gpu_memory_utilization": gpu_memory_utilization,
    }
    findings = examine(Patient(model, Address(host, port), data_plane, api_keys_file, tuple(options.items())))
    if as_json:
        print(json.dumps(as_dicts(findings), indent=1))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for each in findings:
            console.print(f"[{STYLES[each.level]}]{each.level:<5}[/] {each.name:<12} ", end="")
            console.print(each.value, markup=False)
            if each.remedy:
                console.print(f"{'':<19}-> {each.remedy}", markup=False)
    if any(finding.level == "bad" for finding in findings):
        sys.exit(BAD)

"""A GPU: every kernel checked and timed, whole models decoded and prefilled, and `transformers` beside them.

On a machine with PyTorch, Triton and a CUDA device: `python -m model.bench gpu --all`. It takes under ten minutes,
prints as it goes and writes JSON after every row. Each part runs in a process of its own with a time of its own: a row
that crashes, hangs or breaks the device leaves the others' results, and `--resume` measures only what is missing.
Random weights: speed does not depend on what they say. `--interpret` rehearses all of it without a GPU, at tiny sizes,
in Triton's interpreter: its checks of correctness count, its times mean nothing.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from model.bench import report
from model.bench.gpu.apart import GO_ON, LEAST_SECONDS, run_part
from model.bench.gpu.results import Results, read_rows, shown, told

NO_DEVICE = 2  # exit code
FAILED = 1


@dataclass(frozen=True)
class Part:
    """module: has `run(results, scale, arguments)`. seconds: what it may take."""

    module: str
    seconds: float
    arguments: tuple[str, ...] = ()


# The order is that of worth: what the time runs out for comes last.
PARTS = {
    "check": Part("check", 120),
    "kernels": Part("kernels", 100),
    "decode-small": Part("models", 90, ("small",)),
    "decode-large": Part("models", 130, ("large",)),
    "workload": Part("workload", 60),
    "transformers-small": Part("rival", 100, ("small",)),
    "transformers-large": Part("rival", 130, ("large",)),
    "decode-large-int8": Part("models", 130, ("large", "int8")),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every part (as without --parts: said for the reader)")
    which.add_argument("--parts", nargs="+", choices=PARTS, metavar="PART", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts together (default: %(default).0f)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder of the results (default: %(default)s)"
    )
    parser.add_argument("--resume", action="store_true", help="keep what is in the folder; measure what is missing")
    parser.add_argument("--interpret", action="store_true", help="rehearse without a GPU, at tiny sizes")
    parser.add_argument("--only", choices=PARTS, help=argparse.SUPPRESS)  # one part, in this process
    parser.add_argument(GO_ON, action="store_true", help=argparse.SUPPRESS)  # it has been begun by another process


def run(args: argparse.Namespace) -> None:
    """Run the parts one after another. Exits with 2 where there is no GPU, with 1 if a check failed or a part broke."""
    if not args.interpret and not torch.cuda.is_available():
        print("no CUDA device here: torch sees none. `--interpret` rehearses the run without one", file=sys.stderr)
        sys.exit(NO_DEVICE)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.only:
        measure(args.only, args)
        return
    names = args.parts or list(PARTS)
    if not args.resume:
        for name in names:
            rows_file(args.out, name).unlink(missing_ok=True)
    deadline = time.monotonic() + args.seconds
    endings: dict[str, str] = {}
    for name in names:
        endings[name] = measure_apart(name, args, deadline - time.monotonic())
        summary = summarize(args.out, endings, args)  # after each part: nobody knows whether there is a next one
    print_summary(summary)
    sys.exit(FAILED if has_failed(summary) else 0)


def rows_file(out: Path, name: str) -> Path:
    """Where a part keeps its rows."""
    return out / f"{name}.json"


def measure(name: str, args: argparse.Namespace) -> None:
    """Run one part here."""
    from model.bench.gpu.scale import CARD, REHEARSAL

    part = PARTS[name]
    module = import_module(f"model.bench.gpu.{part.module}")
    torch.manual_seed(time.time_ns() % 2**32)  # fresh inputs every time
    results = Results(rows_file(args.out, name), keep_errors=args.go_on)
    try:
        module.run(results, REHEARSAL if args.interpret else CARD, *part.arguments)
    except Exception as error:
        results.add("the part itself", error=told(error))
        raise


def measure_apart(name: str, args: argparse.Namespace, seconds_left: float) -> str:
    """Run one part in processes of its own, and say how it ended: `done`, or why not."""
    seconds = min(PARTS[name].seconds, seconds_left)
    if seconds < LEAST_SECONDS:
        return "not started: the time was up"
    print(f"\n{name} (at most {seconds:.0f} s)", flush=True)
    command = [sys.executable, "-m", "model.bench", "gpu", "--only", name, "--out", str(args.out)]
    environment = dict(os.environ)
    if args.interpret:
        command.append("--interpret")
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return run_part(command, environment, rows_file(args.out, name), seconds)


def summarize(out: Path, endings: dict[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """Everything in one place, also written to `gpu.json`: what was not measured is not there."""
    summary = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": report.machine() | card(),
        "interpreted": args.interpret,
        "parts": {name: {"ended": ended, "rows": read_rows(rows_file(out, name))} for name, ended in endings.items()},
    }
    (out / "gpu.json").write_text(json.dumps(summary, indent=1, default=str) + "\n")
    return summary


def card() -> dict[str, Any]:
    """The GPU and what drives it."""
    import triton

    about: dict[str, Any] = {"triton": triton.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory >> 20
        about |= {"gpu": properties.name, "gpu_memory_mib": memory, "cuda": torch.version.cuda}
    return about


def has_failed(summary: dict[str, Any]) -> bool:
    """Whether any part ended early, any row is an error, or any check is beyond its tolerance."""
    rows = [row for part in summary["parts"].values() for row in part["rows"]]
    early = any(part["ended"] != "done" for part in summary["parts"].values())
    return early or any("error" in row or row.get("ok") is False for row in rows)


def print_summary(summary: dict[str, Any]) -> None:
    """The table: one line a row of every part, as Markdown."""
    machine = summary["machine"]
    print(f"\n{machine.get('gpu', 'no GPU')}, torch {machine['torch']}, triton {machine['triton']}, {summary['date']}")
    if summary["interpreted"]:
        print("a rehearsal in Triton's interpreter, at tiny sizes: the times mean nothing")
    for name, part in summary["parts"].items():
        print(f"\n| {name}: {part['ended']} | |\n|---|---|")
        for row in part["rows"]:
            numbers = ", ".join(f"{key} {shown(value)}" for key, value in row.items() if key not in ("name", "took"))
            print(f"| {row['name']} | {numbers} |")

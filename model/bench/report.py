"""How results are printed and kept: aligned columns on the screen, JSON with the machine and the command beside it."""

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch

QUIET = 0.5  # processes that run, on the average of the last minute


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark."""
    threads = torch.get_num_threads()
    parser.add_argument("--threads", type=int, default=threads, help="default: one a core, %(default)s here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured to this file")


def print_row(*cells: object) -> None:
    """One line of a table."""
    print("".join(f"{cell:>11}" for cell in cells), flush=True)


def warn_if_busy() -> None:
    """Say so where something else runs: threads that wait for each other by spinning then lose most of their time."""
    load = os.getloadavg()[0]
    if load > QUIET:
        print(f"this machine is not quiet (load average {load:.1f}): the numbers below are worth little\n", flush=True)


def write(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the results where `--json` says, if it does: a number without its machine and command says nothing."""
    if args.json is None:
        return
    options = {name: value for name, value in vars(args).items() if name != "run"}
    text = json.dumps({"machine": machine(), "options": options} | results, indent=2, default=str)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(text + "\n")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }

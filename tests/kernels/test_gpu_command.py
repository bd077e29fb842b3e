"""`python -m model.bench gpu`, rehearsed without a GPU: the command itself and all of its parts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from model.bench.gpu import apart
from model.bench.gpu.apart import run_part
from model.bench.gpu.command import PARTS
from model.bench.gpu.results import read_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
# What a bare machine does not have: a child that imports any of these breaks.
ABSENT = "ray pydantic fastapi llguidance jinja2 typer rich httpx prometheus_client huggingface_hub jiter"
BARE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in "{ABSENT}".split():
            raise ModuleNotFoundError(f"No module named {{name!r}}")
sys.meta_path.insert(0, Absent())
"""


def run_command(*options: str) -> subprocess.CompletedProcess[str]:
    code = f"from model.bench.__main__ import main\nmain({['gpu', *options]!r})"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_a_rehearsal_checks_and_measures_and_says_that_times_mean_nothing(tmp_path):
    names = ["check", "kernels", "decode-small", "decode-large-int8", "workload"]
    ended = run_command("--interpret", "--parts", *names, "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stdout
    summary = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["ended"] for name, part in summary["parts"].items()} == dict.fromkeys(names, "done")
    assert all(row["ok"] for row in summary["parts"]["check"]["rows"])
    assert len(summary["parts"]["check"]["rows"]) >= 2 * 12 + 4
    assert "an fp8 cache" in ended.stdout
    assert {row["name"] for row in summary["parts"]["decode-small"]["rows"]} >= {"batch 1", "batch 2"}
    assert summary["parts"]["workload"]["rows"][0]["output_tokens"] > 0
    assert "the times mean nothing" in ended.stdout
    assert "| greedy tokens of the embedded model | tokens 6, ok True |" in ended.stdout


def test_nothing_is_imported_that_a_bare_machine_lacks():
    modules = ", ".join(f"model.bench.gpu.{part.module}" for part in PARTS.values())
    code = f"{BARE}\nimport {modules}\nfrom model.bench.__main__ import main"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    ended = run_command("--all", "--out", str(tmp_path / "none"))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("no CUDA device here")
    assert not (tmp_path / "none").exists()


# Rows of every kind of trouble; the device is one that takes no more work once something has gone wrong.
TROUBLED = """
import os, sys, time, torch
from pathlib import Path
from model.bench.gpu.results import Results
broken = []
def synchronize():
    if broken: raise RuntimeError("an illegal memory access was encountered")
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, synchronize
results = Results(Path(sys.argv[1]), keep_errors="--go-on" in sys.argv)
for name in ("well", "crashes", "prints", "hangs", "breaks the device", "well, too"):
    if results.missing([name]):
        with results.row(name) as row:
            if name == "crashes": os.abort()
            if name == "prints": os.write(1, bytes(range(256))); os.write(2, b"]}" * 99)
            if name == "hangs": time.sleep(1000)
            if name == "breaks the device": broken.append(True)
            synchronize()  # as every row does: in this process no other one can succeed
            row["us"] = 1.0
"""


def test_a_row_that_crashes_hangs_or_breaks_the_device_costs_that_row_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(apart, "ROW_SECONDS", 2.0)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    rows = tmp_path / "part.json"
    assert run_part([sys.executable, "-c", TROUBLED, str(rows)], environment, rows, 100.0) == "done"
    found = {row["name"]: row.get("error", row.get("us")) for row in read_rows(rows)}
    assert found == {
        "well": 1.0,
        "crashes": "broke off with exit code -6",
        "prints": 1.0,
        "hangs": "hung for 2 s",
        "breaks the device": "RuntimeError: an illegal memory access was encountered",
        "well, too": 1.0,
    }


def test_what_breaks_outside_of_any_row_is_not_tried_again(tmp_path):
    rows = tmp_path / "part.json"
    code = f"open({str(tmp_path / 'tries')!r}, 'a').write('.'); raise SystemExit(7)"
    assert run_part([sys.executable, "-c", code], os.environ, rows, 100.0) == "broke off with exit code 7"
    assert (tmp_path / "tries").read_text() == "."


def test_the_row_that_the_time_of_its_part_ends_in_is_told(tmp_path):
    rows = tmp_path / "part.json"
    code = f"""
import time
from pathlib import Path
from model.bench.gpu.results import Results
with Results(Path({str(rows)!r})).row("long"): time.sleep(1000)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert run_part([sys.executable, "-c", code], environment, rows, 6.0) == "cut off after 6 s"
    assert read_rows(rows) == [{"name": "long", "error": "cut off after 6 s"}]

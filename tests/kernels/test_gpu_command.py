"""`python -m model.bench gpu`, rehearsed without a GPU: the command itself and all of its parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from model.bench.gpu.command import PARTS

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
    assert len(summary["parts"]["check"]["rows"]) >= 2 * 11 + 2
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

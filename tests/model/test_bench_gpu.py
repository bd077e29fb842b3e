"""The measurements of a GPU: what is left when a part breaks, what counts as failed, and what is compared."""

import json
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from model.attention.dense import DenseCausalAttention
from model.bench.gpu import command, models, rival, workload
from model.bench.gpu.apart import LEAST_SECONDS
from model.bench.gpu.check import relative_error
from model.bench.gpu.command import Part
from model.bench.gpu.results import Results, read_rows
from model.bench.gpu.scale import CARD, REHEARSAL
from model.bench.gpu.timing import replayed
from model.bench.gpu.workload import draw
from model.bench.rounds import Ask

pytestmark = pytest.mark.fast


def arguments(out: Path, **changes: object) -> Namespace:
    given = {
        "out": out,
        "parts": None,
        "resume": False,
        "interpret": True,
        "only": None,
        "seconds": 100.0,
        "go_on": False,
    }
    return Namespace(**given | changes)


@pytest.fixture
def broken_parts(monkeypatch):
    """A part that breaks behind its first row, one that hangs there, and one that is well."""
    parts = {"breaks": Part("breaks", 60), "hangs": Part("hangs", 60), "well": Part("well", 60)}
    monkeypatch.setattr(command, "PARTS", parts)
    endings = {"breaks": "exit 5", "hangs": "exec sleep 100", "well": "exit 0"}

    def popen(argv, **options):
        if "--only" not in argv:
            return real(argv, **options)
        name = argv[argv.index("--only") + 1]
        out = Path(argv[argv.index("--out") + 1])
        row = json.dumps([{"name": name, "us": 1.0}])
        shell = f"echo '{row}' > {out}/{name}.json; {endings[name]}"
        return real(["bash", "-c", shell], **options)

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)


@pytest.mark.usefixtures("broken_parts")
def test_a_part_that_breaks_or_hangs_leaves_its_rows_and_the_other_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(command.PARTS, "hangs", Part("hangs", LEAST_SECONDS))
    with pytest.raises(SystemExit) as ended:
        command.run(arguments(tmp_path))
    assert ended.value.code == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [(name, part["ended"], len(part["rows"])) for name, part in parts.items()] == [
        ("breaks", "broke off with exit code 5", 1),
        ("hangs", "cut off after 5 s", 1),
        ("well", "done", 1),
    ]
    assert "| well | us 1 |" in capsys.readouterr().out


@pytest.mark.usefixtures("broken_parts")
def test_what_is_measured_so_far_is_summed_up_before_the_next_part_begins(tmp_path, monkeypatch):
    seen = []
    popen = subprocess.Popen

    def look(argv, **options):
        if "--only" in argv:
            file = tmp_path / "gpu.json"
            seen.append(list(json.loads(file.read_text())["parts"]) if file.exists() else [])
        return popen(argv, **options)

    monkeypatch.setattr(subprocess, "Popen", look)
    with pytest.raises(SystemExit):
        command.run(arguments(tmp_path, parts=["well", "breaks"]))
    assert seen == [[], ["well"]]


@pytest.mark.parametrize("garbage", [b"\xff\x00 not JSON", b"{}[", b'{"name": 1}', b"[3]", b'[{"us": 1}]'])
def test_a_file_of_rows_that_nobody_can_read_is_an_error_of_its_part(tmp_path, garbage):
    (tmp_path / "part.json").write_bytes(garbage)
    (row,) = read_rows(tmp_path / "part.json")
    assert row["name"] == "part.json"
    assert row["error"].startswith("is no list of rows: ")


def test_a_part_that_breaks_outside_of_its_rows_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(workload, "run", lambda results, scale: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command.measure("workload", arguments(tmp_path))
    rows = read_rows(tmp_path / "workload.json")
    assert rows == [{"name": "the part itself", "error": "ZeroDivisionError: division by zero"}]


def test_what_is_no_number_is_written_as_text(tmp_path):
    Results(tmp_path / "part.json").add("row", error_found=float("inf"), rate=float("nan"))
    assert "Infinity" not in (tmp_path / "part.json").read_text()
    assert read_rows(tmp_path / "part.json") == [{"name": "row", "error_found": "inf", "rate": "nan"}]


@pytest.mark.usefixtures("broken_parts")
def test_when_the_time_is_up_no_part_is_started(tmp_path):
    with pytest.raises(SystemExit):
        command.run(arguments(tmp_path, parts=["well"], seconds=1.0))
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert parts == {"well": {"ended": "not started: the time was up", "rows": []}}


@pytest.mark.usefixtures("broken_parts")
@pytest.mark.parametrize("resume", [False, True])
def test_old_rows_are_kept_only_where_that_is_asked_for(tmp_path, resume):
    (tmp_path / "hangs.json").write_text('[{"name": "old", "us": 2.0}]')
    with pytest.raises(SystemExit):
        command.run(arguments(tmp_path, parts=["hangs"], seconds=1.0, resume=resume))
    assert read_rows(tmp_path / "hangs.json") == ([{"name": "old", "us": 2.0}] if resume else [])


def test_a_row_that_goes_wrong_is_told_and_measured_again_the_next_time(tmp_path):
    results = Results(tmp_path / "part.json")
    with results.row("good") as row:
        row["us"] = 3.0
    with results.row("bad") as row:
        row["us"] = 1 / 0
    again = Results(tmp_path / "part.json")
    assert again.missing(["good", "bad", "new"]) == ["bad", "new"]
    assert Results(tmp_path / "part.json", keep_errors=True).missing(["good", "bad", "new"]) == ["new"]
    assert again.rows[1]["error"] == "ZeroDivisionError: division by zero"
    assert command.has_failed({"parts": {"part": {"ended": "done", "rows": again.rows}}})
    assert not command.has_failed({"parts": {"part": {"ended": "done", "rows": again.rows[:1]}}})


def test_a_check_beyond_its_tolerance_fails_the_run():
    assert command.has_failed({"parts": {"check": {"ended": "done", "rows": [{"name": "norm", "ok": False}]}}})


def test_an_error_is_measured_against_the_largest_number_and_nan_is_infinitely_wrong():
    expected = torch.tensor([0.0, 4.0, -8.0])
    assert relative_error(torch.tensor([0.0, 5.0, -8.0]), expected) == 0.125
    assert relative_error(torch.tensor([0.0, torch.nan, -8.0]), expected) == float("inf")
    assert relative_error(torch.tensor([0.0, 4.0]), expected) == float("inf")


def test_a_kernel_is_timed_as_a_graph_and_where_it_cannot_be_captured_that_is_said(capsys):
    calls = []

    def kernel() -> None:
        calls.append("called")

    def capture(run):
        run()
        return lambda: calls.append("replayed")

    def refuse(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    replayed(kernel, capture)()
    assert calls == ["called", "replayed"]
    assert not capsys.readouterr().out
    replayed(kernel, refuse)()
    assert calls == ["called", "replayed", "called"]
    assert "not captured" in capsys.readouterr().out


def test_the_workload_is_that_of_nano_vllm():
    prompts, lengths = draw(CARD.sequences, CARD.longest)
    assert (sum(map(len, prompts)), sum(lengths)) == (142_827, 133_966)


def test_transformers_is_given_the_very_weights_that_we_run():
    ids = torch.arange(5, 25)
    theirs = rival.same_model(REHEARSAL.small, REHEARSAL)
    decoder = models.random_decoder(REHEARSAL.small, REHEARSAL)
    with torch.no_grad():
        hidden = decoder(ids, torch.arange(20), DenseCausalAttention(1, 20))
        torch.testing.assert_close(decoder.logits(hidden), theirs(ids[None]).logits[0], atol=1e-4, rtol=0)


def test_transformers_generates_what_it_is_asked_for():
    answer = rival.generate(rival.same_model(REHEARSAL.small, REHEARSAL), Ask(2, 9, 3, seed=1))
    assert answer.decode_tokens == 2 * 2
    assert 0 < answer.decode_seconds < answer.seconds

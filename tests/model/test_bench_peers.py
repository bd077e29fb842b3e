import json
import os
import signal
import sys
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest

from model.bench import __main__ as command
from model.bench import contenders, peers, roofline, shapes
from model.bench.contenders import Contender, Worker, WorkerError
from model.bench.rounds import Answer, Ask
from model.bench.workers.protocol import Setup

pytestmark = pytest.mark.slow  # processes are started

OURS = Contender("attendant int8", "attendant", "int8", abroad=False)
QUICK, SLOW = Contender("quick int8", "quick", "int8"), Contender("slow bf16", "slow", "bf16")
ASK = Ask(batch=2, prompt_tokens=3, output_tokens=4, seed=5)

FAKE = """
    import sys
    from model.bench.rounds import Answer
    from model.bench.workers.protocol import NotInstalledError, serve

    def load(setup):
        print("a library greets")
        {load}
        def play(ask):
            print("a library talks")
            {play}
            return Answer(float(ask.batch), float(ask.prompt_tokens), float(ask.output_tokens), ask.seed)
        return "fake 1.0", play

    serve(load)
"""


def fake_worker(directory: Path, load: str = "", play: str = "") -> Worker:
    script = directory / "fake.py"
    script.write_text(textwrap.dedent(FAKE).format(load=load, play=play))
    options = ["--model", str(directory), "--dtype", "int8", "--threads", "1", "--converted", str(directory / "made")]
    program = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    return Worker(QUICK, [sys.executable, "-c", program, *options], directory / "fake.log")


def test_a_worker_answers_rounds_whatever_its_libraries_print(tmp_path: Path):
    worker = fake_worker(tmp_path)
    try:
        assert worker.version == "fake 1.0"
        assert worker.ask(ASK) == Answer(2.0, 3.0, 4.0, 5)
        assert worker.ask(ASK).decode_tokens == 5
    finally:
        worker.close()
    assert "a library talks" in (tmp_path / "fake.log").read_text()


def test_a_worker_sleeps_while_another_is_measured(tmp_path: Path):
    worker = fake_worker(tmp_path)
    try:
        stopped = os.waitid(os.P_PID, worker._process.pid, os.WSTOPPED | os.WNOWAIT)
        assert stopped is not None
        assert stopped.si_status == signal.SIGSTOP
    finally:
        worker.close()


def test_what_is_missing_is_told_as_not_installed(tmp_path: Path):
    with pytest.raises(WorkerError, match=r"^not installed: no_such_engine$"):
        fake_worker(tmp_path, load="import no_such_engine")
    with pytest.raises(WorkerError, match=r"^not installed: the tool$"):
        fake_worker(tmp_path, load="raise NotInstalledError('the tool')")
    with pytest.raises(WorkerError, match=r"^not installed: no /nowhere/bin/python$"):
        contenders.start(QUICK, tmp_path, work=tmp_path / "work", peers=Path("/nowhere"), threads=1)


def test_a_failed_round_is_told_and_the_next_one_is_played(tmp_path: Path):
    worker = fake_worker(tmp_path, play="assert ask.seed != 5, 'seed 5'")
    try:
        with pytest.raises(WorkerError, match="failed: AssertionError"):
            worker.ask(ASK)
        assert worker.ask(Ask(1, 1, 1, 6)).decode_tokens == 6
    finally:
        worker.close()


def test_a_worker_that_dies_is_told_with_its_log(tmp_path: Path):
    worker = fake_worker(tmp_path, play="sys.exit(3)")
    try:
        with pytest.raises(WorkerError, match=r"it ended, see .*fake\.log"):
            worker.ask(ASK)
        worker._process.kill()
        worker._process.wait()
        with pytest.raises(WorkerError, match=r"it ended, see .*fake\.log"):
            worker.ask(ASK)
    finally:
        worker.close()


def test_a_conversion_that_was_cut_off_is_not_taken_for_a_model(tmp_path: Path):
    setup = Setup(tmp_path, "int8", 1, tmp_path / "made")

    def fail(target: Path) -> None:
        target.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        setup.convert(fail)
    assert not setup.converted.exists()
    assert setup.convert(lambda target: [None, target.write_text("whole")][0]).read_text() == "whole"
    assert setup.convert(fail).read_text() == "whole"


class FakeWorker:
    def __init__(self, contender: Contender, asked: list[tuple[str, Ask]]) -> None:
        self.contender, self._asked, self.version = contender, asked, "fake"

    def ask(self, ask: Ask) -> Answer:
        self._asked.append((self.contender.name, ask))
        if self.contender is SLOW and ask.seed == 2:
            raise WorkerError("failed: tired")
        return Answer(2.0, 1.0, 1.0, 7)

    def close(self) -> None:
        pass


def test_contenders_take_turns_and_the_order_turns_around(capsys: pytest.CaptureFixture[str]):
    asked: list[tuple[str, Ask]] = []
    workers = [FakeWorker(contender, asked) for contender in (OURS, SLOW)]
    played = peers.play(workers, {ASK: 2})  # type: ignore[arg-type]
    counted = [(name, ask.seed) for name, ask in asked if ask.prompt_tokens == 3]
    assert counted == [("attendant int8", 1), ("slow bf16", 1), ("slow bf16", 2), ("attendant int8", 2)]
    assert played[ASK]["slow bf16"] == [Answer(2.0, 1.0, 1.0, 7), None]
    assert "slow bf16, batch 2: failed: tired" in capsys.readouterr().out


def test_a_run_without_peers_names_each_of_them_and_measures_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shape = shapes.SHAPES["storyteller"] | {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 1}
    shapes.write_random(shape, tmp_path / "tiny")
    machine = roofline.Machine(bandwidth=1e10, rates={"fp32": 1e11, "bf16": 1e11, "int8": 1e11})
    monkeypatch.setattr(roofline, "measure_machine", lambda: machine)
    file = tmp_path / "peers.json"
    only = ["attendant int8", "llama.cpp Q8_0", "CTranslate2 int8"]
    where = ["--work", str(tmp_path), "--peers", str(tmp_path / "nowhere"), "--json", str(file)]
    options = ["--batch", "2", "--rounds", "1", "--prefill-rounds", "1", "--threads", "1"]
    command.main(["peers", "--model", str(tmp_path / "tiny"), *where, *options, "--only", *only])
    printed = capsys.readouterr().out
    assert printed.count("| CTranslate2 int8 | not installed: no ") == 3
    written = json.loads(file.read_text())
    assert sorted(written["absent"]) == ["CTranslate2 int8", "llama.cpp Q8_0"]
    assert written["versions"] == {"attendant int8": "this tree"}
    assert [round_["ask"] for round_ in written["rounds"]] == [asdict(Ask(2, 64, 64, 0)), asdict(Ask(2, 512, 1, 0))]
    assert written["rounds"][0]["answers"]["attendant int8"][0]["decode_tokens"] == 126

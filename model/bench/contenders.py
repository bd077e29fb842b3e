"""Who is measured, and the process that each of them runs in. Only one of them is awake at a time.

A worker that is not asked is stopped by a signal, threads and all: no barrier that spins, no thread that polls can take
the cores from the one that is measured.
"""

import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.bench.rounds import Answer, Ask

ROOT = Path(__file__).parent.parent.parent  # the worker's modules are imported from here, whatever Python it runs in


@dataclass(frozen=True)
class Contender:
    """One engine in one dtype.

    worker: its module in `model.bench.workers`. dtype: what its weights are kept in, fp32, bf16 or int8.
    abroad: it runs in the Python of the peers, not in ours.
    """

    name: str
    worker: str
    dtype: str
    abroad: bool = True

    @property
    def is_ours(self) -> bool:
        """Whether it is the engine of this repository."""
        return self.worker == "attendant"


CONTENDERS = (
    Contender("attendant int8", "attendant", "int8", abroad=False),
    Contender("attendant bf16", "attendant", "bf16", abroad=False),
    Contender("llama.cpp Q8_0", "llama_cpp", "int8"),
    Contender("llama.cpp bf16", "llama_cpp", "bf16"),
    Contender("OpenVINO int8", "openvino", "int8"),
    Contender("OpenVINO bf16", "openvino", "bf16"),
    Contender("CTranslate2 int8", "ctranslate2", "int8"),
    Contender("transformers bf16", "transformers", "bf16", abroad=False),
    Contender("transformers fp32", "transformers", "fp32", abroad=False),
)


class WorkerError(Exception):
    """A contender does not run here. Its text says why: it is not installed, or what failed."""


class Worker:
    """A contender's process, its model loaded. It is stopped whenever `ask` is not under way.

    version: what it says of itself.
    """

    def __init__(self, contender: Contender, command: list[str], log: Path) -> None:
        """Start it and wait until its model is loaded. Raises `WorkerError`.

        log: the file that takes whatever the engine and its libraries print.
        """
        self.contender = contender
        self._log = log
        with log.open("w") as errors:
            try:
                self._process = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
            except FileNotFoundError:
                raise WorkerError(f"not installed: no {command[0]}") from None
        try:
            self.version = str(self._read()["ready"])
        except BaseException:
            self.close()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, ask: Ask) -> Answer:
        """Run one round. Raises `WorkerError` where it failed; a later round may still go well."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(asdict(ask)) + "\n")
            self._process.stdin.flush()
            return Answer(**self._read())
        except BrokenPipeError:
            raise WorkerError(f"failed: it ended, see {self._log}") from None
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process, stopped or not."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a question that it never took
                    pipe.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"failed: it ended, see {self._log}")
        message: dict[str, Any] = json.loads(line)
        if "missing" in message:
            raise WorkerError(f"not installed: {message['missing']}")
        if "error" in message:
            raise WorkerError(f"failed: {message['error']}, see {self._log}")
        return message


def start(contender: Contender, model: Path, *, work: Path, peers: Path, threads: int) -> Worker:
    """Start a contender's worker on this model directory. Raises `WorkerError`.

    work: where converted models and logs are kept. peers: the virtual environment that `make peers` built.
    """
    python = peers.absolute() / "bin" / "python" if contender.abroad else Path(sys.executable)
    work.mkdir(parents=True, exist_ok=True)
    converted = work.absolute() / f"{model.absolute().name}-{contender.worker}-{contender.dtype}"
    options = {"--model": model.absolute(), "--dtype": contender.dtype, "--threads": threads, "--converted": converted}
    words = [str(word) for option in options.items() for word in option]
    command = [str(python), "-m", f"model.bench.workers.{contender.worker}", *words]
    return Worker(contender, command, converted.with_name(f"{converted.name}.log"))

"""Faults that the system has no signal for: on one of two signals, a process' engine fails, and all else lives.

Python imports `sitecustomize` at its start, from wherever PYTHONPATH says; so the product under test needs no hook.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never

DIES, STICKS = signal.SIGRTMIN + 5, signal.SIGRTMIN + 6  # the engine's thread, in its next step
ROOT = Path(__file__).parents[2]


@contextmanager
def sabotaged(directory: Path) -> Iterator[None]:
    """Whatever Python process starts in this block, or from one that did, heeds the two signals."""
    (directory / "sitecustomize.py").write_text("from tests.faults.sabotage import lie_in_wait\n\nlie_in_wait()\n")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(directory), str(ROOT), before]))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def lie_in_wait() -> None:
    """Called before there is any other thread: those to come have the signals blocked, too, so that ours gets them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {DIES, STICKS})
    threading.Thread(target=_strike, daemon=True).start()


def _strike() -> None:
    number = signal.sigwait({DIES, STICKS})
    from model.engine.engine import Engine

    Engine.step = _die if number == DIES else _stick  # type: ignore[method-assign, assignment]


def _die(engine: object) -> Never:
    raise SystemExit("sabotage")  # no `Exception`: nothing survives it


def _stick(engine: object) -> None:
    threading.Event().wait()

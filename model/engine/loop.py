"""The engine's own thread. Everybody else talks to it through a queue, so the engine needs no lock."""

import logging
import queue
import threading
from collections.abc import Callable, Iterable

from model.engine.engine import Engine
from model.engine.request import Request, TokenOutput
from model.engine.stats import StepStats
from model.errors import GroupLost

logger = logging.getLogger(__name__)

IDLE_SECONDS = 1.0  # without work: time to look at the books
MAX_FAILED_STEPS = 3  # in a row: then it is the engine that is broken, not a request

Deliver = Callable[[list[TokenOutput], StepStats], None]


class EngineLoop:
    """Steps an engine for as long as it has work, and sleeps when it has none.

    deliver: called in the engine's thread after each step, with the step's outputs and numbers, and once more when
        aborts leave nothing to do. It must not block.
    failure: the exception that ended the loop, if one did: the replica is then of no use.
    num_rounds: how often it has gone round, is_idle: whether it waits for something to do. Of a loop that is not idle
        and goes round no more, a step is stuck.
    """

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        self.engine = engine
        self.failure: BaseException | None = None
        self.num_rounds = 0
        self.is_idle = True
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether steps are still being taken."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequest` here, in the caller's thread."""
        self.engine.validate(request.token_ids[: request.num_prompt_tokens], request.params, request.attention)
        self._inbox.put(lambda: self.engine.scheduler.add(request))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests before the next step. Those that are gone already are passed over."""
        ids = list(request_ids)
        self._inbox.put(lambda: [self.engine.abort(request_id) for request_id in ids])

    def stop(self, timeout_s: float | None = None) -> None:
        """End the loop after the step in progress, and wait for it, so long at most."""
        self._stopping.set()
        self._inbox.put(lambda: None)  # wakes an idle loop
        self._thread.join(timeout_s)

    def _run(self) -> None:
        failed = 0  # steps in a row
        try:
            while not self._stopping.is_set():
                self.num_rounds += 1
                self._drain_inbox()
                if self.engine.has_work:
                    failed = 0 if self._step() else failed + 1
                    if failed == MAX_FAILED_STEPS:
                        raise RuntimeError(f"{failed} steps failed in a row")
                else:  # what came in ended the last request: whoever watches the numbers must see them fall
                    self._deliver([], self.engine.stats)
        except BaseException as error:
            self.failure = error
            logger.critical("the engine loop has ended: %s", error)

    def _step(self) -> bool:
        """Take one step and hand out what it gave. False if it failed: its requests have then ended with an error."""
        try:
            outputs, computed = self.engine.step(), True
        except GroupLost:  # no fault of the requests
            raise
        except Exception:
            logger.exception("a step failed; its requests end with an error")
            outputs, computed = self.engine.fail_step(), False
        self._deliver(outputs, self.engine.stats)
        return computed

    def _drain_inbox(self) -> None:
        """Carry out what has come in; with nothing to compute, wait for something to come in."""
        if not self.engine.has_work:
            self.is_idle = True
            command = self._wait_for_a_command()
            self.is_idle = False
            command()
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _wait_for_a_command(self) -> Callable[[], object]:
        """Sleep until something comes in. Idle for a second, check that no block was lost, or else end the loop."""
        try:
            return self._inbox.get(timeout=IDLE_SECONDS)
        except queue.Empty:
            self.engine.check_integrity()
            return self._inbox.get()

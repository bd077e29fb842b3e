"""Sends the requests of one process: its part of the schedule in an open loop, one after another in a closed one."""

import time
from typing import Any

import gevent
from gevent.pool import Group
from locust.contrib.fasthttp import FastHttpSession

from loadtest.client import converse
from loadtest.health import Health
from loadtest.plan import Plan
from loadtest.results import Record, Results
from loadtest.schedule import share
from loadtest.workload import Conversation

GRACE_S = 1.0  # for a schedule that is sent late up to its end: the report tells how late


class Sender:
    """worker: the number of this process among the plan's. Results and health are taken from it now and then."""

    def __init__(self, plan: Plan, worker: int) -> None:
        self.results = Results(plan.measured_from)
        self.health = Health()
        self._plan = plan
        self._workloads = plan.workloads()
        self._schedule = share(plan.schedule(), worker, plan.num_workers) if plan.open_loop else []
        self._next_index = worker
        self._stopping = False
        self._sending = False
        self._busy = Group()
        self._watch = gevent.spawn(self.health.watch)

    @property
    def open_loop(self) -> bool:
        """Whether there is a schedule to keep."""
        return self._plan.open_loop

    @property
    def stopping(self) -> bool:
        """Whether users of a closed loop are to leave."""
        return self._stopping

    def converse_once(self, http: FastHttpSession) -> None:
        """A user of a closed loop: one conversation, sent now, to its end."""
        conversation = self._workloads.conversation(self._next_index)
        self._next_index += self._plan.num_workers
        self._start(http, conversation, time.time()).join()

    def keep_schedule(self, http: FastHttpSession) -> None:
        """An open loop: each arrival at its time, whether or not those before it were answered."""
        self._sending = True
        for arrival in self._schedule:
            conversation = self._workloads.conversation(  # made before its time, not at it
                arrival.index, input_tokens=arrival.input_tokens, output_tokens=arrival.output_tokens
            )
            due = self._plan.starts_at + arrival.seconds
            sleep_until(due)
            if self._stopping:
                break
            self._start(http, conversation, due)
        self._sending = False

    def drain(self, *, until: float, seconds: float) -> None:
        """Send what is due until then (Unix time), wait for the answers at most so many seconds, give up the rest."""
        while self._sending and time.time() < until + GRACE_S:
            gevent.sleep(0.05)
        self._stopping = True
        self._busy.join(timeout=seconds)
        self._busy.kill()
        self._watch.kill()

    def take(self) -> dict[str, Any]:
        """What was measured since the last time."""
        return {"results": self.results.take(), "health": self.health.take()}

    def _start(self, http: FastHttpSession, conversation: Conversation, intended: float) -> gevent.Greenlet:
        return self._busy.spawn(
            converse, http, conversation, intended=intended, fields=self._plan.fields, keep=self._keep
        )

    def _keep(self, record: Record, gaps: list[float]) -> None:
        self.results.add(record, gaps)


def sleep_until(when: float) -> None:
    """Return at Unix time `when`, never before it; others run in between even where it is past."""
    gevent.sleep(max(when - time.time(), 0.0))
    while (left := when - time.time()) > 0:  # a timer may fire a little early
        gevent.sleep(left)

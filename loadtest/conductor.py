"""Plans a test, ends it and judges it: in the master, or in the only process there is."""

import time
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust.env import Environment
from locust.runners import MasterRunner

from loadtest.health import Health
from loadtest.plan import Plan
from loadtest.report import Run, print_summary, summarize, write
from loadtest.results import Results
from loadtest.schedule import ScheduleError
from loadtest.server import Check, Counters, Server
from loadtest.slo import SloError, parse
from loadtest.workload import WorkloadError

LEAD_S = 1.0  # from the plan to the first arrival: time for it to reach every worker
GRACE_S = 1.0  # by which Locust's timer may be early
SCRAPE_S = 1.0
CALIBRATION_WORDS = 100

FAILED, INVALID = 1, 2  # exit codes


class SetupError(Exception):
    """A test that cannot start. Its text says why."""


class Conductor:
    """One for each test. Raises `SetupError` at once where the options cannot be."""

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        assert options is not None
        if not environment.host:
            raise SetupError("say which server: --host http://127.0.0.1:8000")
        if not options.run_time or options.warmup >= options.run_time:
            raise SetupError("--run-time must be longer than --warmup")
        self._environment = environment
        self._options = options
        self._server = Server(environment.host, options.api_key)
        self._plan: Plan | None = None
        self._before: Counters | None = None
        self._checks: list[Check] = []
        self._gauges: list[Counters] = []
        self._scraper: gevent.Greenlet | None = None
        self._began = 0.0
        self._prepared = Event()
        self._stopped_at = 0.0
        self._num_drained = 0
        self._results = Results()
        self._health = Health()
        try:
            self._slos = [parse(text) for text in options.slo]
            plan = self._make_plan(num_workers=1, tokens_per_word=1.0)
            plan.workloads()
            self._num_arrivals = len(plan.schedule()) if plan.open_loop else None
        except (SloError, ScheduleError, WorkloadError, OSError) as error:
            raise SetupError(str(error)) from None
        if plan.open_loop:  # one user in each process keeps its schedule
            options.num_users = options.expect_workers if isinstance(environment.runner, MasterRunner) else 1
            options.spawn_rate = options.num_users

    def prepare(self) -> Plan:
        """Ask the server for what the plan needs, and read its counters. Raises `SetupError`."""
        self._began = time.time()
        try:
            return self._prepare()
        finally:
            self._prepared.set()

    def _prepare(self) -> Plan:
        num_workers = 1
        if isinstance(self._environment.runner, MasterRunner):
            num_workers = len(self._environment.runner.clients.ready)
            if self._num_arrivals is not None and num_workers != self._options.num_users:
                raise SetupError(f"{num_workers} workers, {self._options.num_users} expected: say --expect-workers")
        try:
            self._options.served_model = self._options.served_model or self._server.model()
            tokens_per_word = self._calibrate()
        except (OSError, ValueError, LookupError) as error:
            raise SetupError(
                f"{self._environment.host} does not answer as an OpenAI-compatible server: {error}"
            ) from None
        self._before = self._server.settled_counters()
        self._plan = self._make_plan(num_workers, tokens_per_word)
        self._scraper = gevent.spawn(self._scrape)
        return self._plan

    def drain(self) -> None:
        """Have all workers send what is due, wait for the answers, and collect what they measured."""
        # Locust counts the run time from before the plan was made, so it is over before the schedule is.
        now = time.time()
        is_over = now - self._began > self._options.run_time - GRACE_S  # or else somebody has stopped the test
        if self._began:
            self._prepared.wait()
        if self._plan is None or self._stopped_at:
            return
        self._stopped_at = until = self._plan.ends_at if self._plan.open_loop and is_over else now
        seconds = float(self._environment.stop_timeout or 0.0)
        runner = self._environment.runner
        assert runner is not None
        runner.send_message("drain", {"until": until, "seconds": seconds})
        deadline = until + seconds + 5.0
        while self._num_drained < self._plan.num_workers and time.time() < deadline:
            gevent.sleep(0.05)
        if self._scraper is not None:
            self._scraper.kill()
        if self._before is not None:
            self._checks = self._server.settled_checks(self._before, self._results.records)

    def on_drained(self, environment: Environment, msg: Any) -> None:
        """A worker has nothing more to do: here is what it measured."""
        self._results.merge(msg.data["results"])
        self._health.merge(msg.data["health"])
        self._num_drained += 1

    def report(self) -> int:
        """Print the summary, write the files, return the exit code."""
        if self._plan is None:
            print("INVALID\n  the test did not start")
            return INVALID
        self._results.measured_from = self._plan.measured_from
        missing = []
        if self._num_drained < self._plan.num_workers:
            missing.append(
                f"{self._num_drained} of {self._plan.num_workers} workers reported: the test was interrupted"
            )
        run = Run(
            plan=self._plan,
            results=self._results,
            health=self._health,
            ended=min(self._stopped_at or time.time(), self._plan.ends_at),
            num_arrivals=self._num_arrivals,
            checks=self._checks,
            reconciled=self._before is not None,
            gauges=self._gauges,
            slos=self._slos,
            max_lag=self._options.max_lag,
            problems=missing,
        )
        summary = summarize(run)
        print_summary(summary)
        if self._options.report:
            write(run, summary, Path(self._options.report))
        if summary["verdict"] == "INVALID":
            return INVALID
        return FAILED if summary["missed"] else 0

    def _make_plan(self, num_workers: int, tokens_per_word: float) -> Plan:
        options = self._options
        assert self._environment.host is not None
        return Plan(
            host=self._environment.host,
            model=options.served_model,
            workload=options.workload,
            arrivals=options.arrivals,
            users=0 if options.arrivals else options.num_users,
            num_workers=num_workers,
            seed=options.seed,
            starts_at=time.time() + (LEAD_S if options.arrivals else 0.0),
            seconds=options.run_time,
            warmup=options.warmup,
            max_tokens=options.max_tokens,
            ignore_eos=options.ignore_eos,
            tokens_per_word=tokens_per_word,
        )

    def _calibrate(self) -> float:
        """How many of the server's tokens one of our words is."""
        plan = self._make_plan(num_workers=1, tokens_per_word=1.0)
        conversation = plan.workloads().conversation(-1, input_tokens=CALIBRATION_WORDS, output_tokens=1)
        body = conversation.request(0, []) | plan.fields | {"stream": False}
        del body["stream_options"]
        return self._server.prompt_tokens(conversation.path, body) / len(conversation.turns[0].text.split())

    def _scrape(self) -> None:
        """The server's gauges, once a second, for the report."""
        while True:
            if (counters := self._server.counters()) is not None:
                self._gauges.append(counters)
            gevent.sleep(SCRAPE_S)

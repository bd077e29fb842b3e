"""Loads an OpenAI-compatible server and tells what its readers waited for.

    make loadtest                                              8 users for 30 s against the running service
    make loadtest ARGS="-u 32 -t 60s --report r.json"          or any option of Locust's
    make loadtest ARGS="--arrivals poisson:rate=5 --workload chat --slo ttft_p99=300ms --report r.json"

Without `--arrivals` the loop is closed: each user sends its next request when the last one has ended, so a slow server
is asked less. That compares like with like at one number of users; what a service can bear is asked in an open loop.

Exit code: 0 when all is well, 1 when an objective was missed (or, without objectives, a request failed), 2 when the run
is INVALID. Latencies are kept in our own histograms, off Locust's table: its row holds the whole time of each request.
"""

import sys
from argparse import ArgumentParser
from typing import Any

import gevent
from locust import FastHttpUser, constant, events, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, Runner, WorkerRunner

from loadtest.conductor import INVALID, Conductor, SetupError
from loadtest.plan import Plan
from loadtest.sender import Sender
from loadtest.slo import seconds


class Process:
    """The parts that play in this process."""

    conductor: Conductor
    sender: Sender


here = Process()


class Reader(FastHttpUser):
    """In a closed loop one reader, who asks and reads. In an open loop all the readers of its process."""

    wait_time = constant(0)
    connection_timeout = 10.0
    network_timeout = 120.0
    concurrency = 100_000  # connections at a time: an open loop never waits for one

    def on_start(self) -> None:
        """Say who we are to a server that asks for a key."""
        assert self.environment.parsed_options is not None
        if key := self.environment.parsed_options.api_key:
            self.client.client.default_headers["Authorization"] = f"Bearer {key}"

    @task
    def read(self) -> None:
        """Everything that there is to send, or the next conversation."""
        if here.sender.open_loop:
            here.sender.keep_schedule(self.client)
            raise StopUser
        if here.sender.stopping:
            raise StopUser
        here.sender.converse_once(self.client)


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """The options that Locust does not have."""
    group = parser.add_argument_group("text generation")
    group.add_argument("--served-model", default="", help="model to ask for; default: the first that the server lists")
    group.add_argument(
        "--workload", default="story", help="entry of loadtest/workloads.toml, or of another file as FILE:ENTRY"
    )
    group.add_argument(
        "--arrivals",
        default="",
        help="open loop, such as poisson:rate=20 (loadtest/schedule.py has the list); then -u is not looked at",
    )
    group.add_argument("--seed", type=int, default=0, help="of the arrivals and of every prompt (default: 0)")
    group.add_argument(
        "--warmup", default="0s", type=seconds, help="part of the run time that is not measured (default: 0s)"
    )
    group.add_argument("--max-tokens", type=int, default=None, help="instead of the output lengths of the workload")
    group.add_argument(
        "--ignore-eos", action="store_true", help="ask the server to go on to max_tokens (not in OpenAI)"
    )
    group.add_argument(
        "--slo", action="append", default=[], help="an objective: ttft_p99=300ms, tpot_p99=30ms, goodput=95%% ..."
    )
    group.add_argument(
        "--max-lag", default="10ms", type=seconds, help="how late the client may be at p99 before the run is INVALID"
    )
    group.add_argument("--report", default="", help="write this JSON file, and a CSV and an HTML page beside it")
    group.add_argument("--api-key", default="", env_var="OPENAI_API_KEY", help="bearer token for the server")


@events.init.add_listener
def wire(environment: Environment, runner: Any, **_: Any) -> None:
    """Give each process its part: the master, or a test of one process, conducts; a worker, or that one, sends."""
    # The loop's clock stands still while modules are imported: Locust's next timer, the run time, would end too early.
    gevent.get_hub().loop.update_now()
    if not isinstance(runner, WorkerRunner):
        try:
            here.conductor = Conductor(environment)
        except SetupError as error:
            print(f"load test: {error}", file=sys.stderr)
            sys.exit(INVALID)
        runner.register_message("drained", here.conductor.on_drained)
    if not isinstance(runner, MasterRunner):
        runner.register_message("drain", start_drain)


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    """The master first: it asks the server and makes the plan, which Locust takes to the workers among the options."""
    runner, options = environment.runner, environment.parsed_options
    assert runner is not None
    assert options is not None
    if not isinstance(runner, WorkerRunner):
        try:
            options.plan = here.conductor.prepare().to_dict()
        except SetupError as error:
            print(f"load test: {error}", file=sys.stderr)
            gevent.spawn(runner.quit)
            raise gevent.GreenletExit from None  # the greenlet that starts the users; StopTest would print a traceback
    if isinstance(runner, LocalRunner | WorkerRunner):
        here.sender = Sender(Plan(**options.plan), runner.worker_index)


@events.test_stopping.add_listener
def stop(environment: Environment, **_: Any) -> None:
    """Wait for the last answers: Locust's master would not wait for those of its workers."""
    if not isinstance(environment.runner, WorkerRunner):
        here.conductor.drain()


def start_drain(environment: Environment, msg: Any) -> None:
    """The conductor wants an end. Not here: in a test of one process it waits for us in this very greenlet."""
    gevent.spawn(drain, environment.runner, msg.data)


def drain(runner: Runner, limits: dict[str, float]) -> None:
    """Wait for the answers, then hand over what was measured."""
    here.sender.drain(**limits)
    runner.send_message("drained", here.sender.take())


@events.quitting.add_listener
def report(environment: Environment, **_: Any) -> None:
    """At the very end. Locust alone would exit with 1 for any failed request, also where an objective allows some."""
    environment.process_exit_code = 0
    if isinstance(environment.runner, LocalRunner):
        here.conductor.drain()  # Ctrl-C comes straight here; workers of a distributed test have gone by then
    if not isinstance(environment.runner, WorkerRunner):
        environment.process_exit_code = here.conductor.report()

"""Streams completions from an OpenAI-compatible server and tells what its readers waited for.

    make loadtest                                     8 users for 30 s against the running service
    make loadtest ARGS="-u 32 -t 60s --report r.json"  or any option of Locust's

Closed loop: each user sends its next request when the last one has ended, so a slow server is asked less. Percentiles
of a closed loop flatter an overloaded server; they compare like with like at one number of users.

Latencies are kept in our own histograms, off Locust's table, whose only row holds the whole time of each request.
"""

import json
import random
import time
import urllib.request
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from locust import FastHttpUser, constant, events, task
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtest.report import Report
from loadtest.stream import StreamError, read_stream

HEROES = ("fox", "bear", "rabbit", "girl", "boy", "king", "farmer", "sailor")
OBJECTS = ("lantern", "key", "map", "ring", "book", "drum", "kite", "bell")

report = Report()


class Reader(FastHttpUser):
    """Asks for a story and reads it as it comes."""

    wait_time = constant(0)
    connection_timeout = 10.0
    network_timeout = 120.0

    @task
    def read_a_story(self) -> None:
        """One streamed completion, from the send to `[DONE]`."""
        options = self.environment.parsed_options
        assert options is not None
        hero, thing = random.choice(HEROES), random.choice(OBJECTS)
        body = {
            "model": options.served_model,
            "prompt": f"Once upon a time there was a {hero} with a {thing}.",
            "max_tokens": options.max_tokens,
            "temperature": 0.8,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if options.ignore_eos:
            body["ignore_eos"] = True
        started = time.perf_counter()
        with self.client.post(
            "/v1/completions",
            json=body,
            headers={"Accept-Encoding": "identity"},
            stream=True,
            catch_response=True,
        ) as response:
            try:
                if response.status_code != 200:
                    raise StreamError(f"status {response.status_code}: {(response.text or '')[:200]}")
                # Not `iter_lines`: it reads blocks of 1,024 bytes and would see the first token late.
                timing = read_stream(lambda: response.stream.readline(b"\n"), started)
            except (StreamError, OSError, ValueError, KeyError) as error:
                report.failures += 1
                response.failure(str(error))
            else:
                report.add(timing, time.time())
                response.success()
            # With stream=True Locust's own figure is the time to the headers.
            response.request_meta["response_time"] = 1e3 * (time.perf_counter() - started)


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    """The options that Locust does not have."""
    group = parser.add_argument_group("completions")
    group.add_argument("--served-model", default="", help="model to ask for; default: the first that the server lists")
    group.add_argument("--max-tokens", type=int, default=128, help="tokens to ask for in each request (default: 128)")
    group.add_argument(
        "--ignore-eos", action="store_true", help="ask the server to go on to max_tokens (not in OpenAI)"
    )
    group.add_argument("--report", default="", help="write the summary to this JSON file")


@events.test_start.add_listener
def find_model(environment: Environment, **_: Any) -> None:
    """Ask the server for its model, outside of what is measured."""
    report.clear()
    options = environment.parsed_options
    assert options is not None
    if not options.served_model:
        with urllib.request.urlopen(f"{environment.host}/v1/models", timeout=10) as response:
            options.served_model = json.load(response)["data"][0]["id"]


@events.report_to_master.add_listener
def send_report(data: dict[str, Any], **_: Any) -> None:
    """A worker hands over what it has measured since the last time."""
    data["completions"] = report.to_dict()
    report.clear()


@events.worker_report.add_listener
def receive_report(data: dict[str, Any], **_: Any) -> None:
    """The master adds it up."""
    if "completions" in data:
        report.merge(data["completions"])


@events.quitting.add_listener
def print_report(environment: Environment, **_: Any) -> None:
    """At the very end, when every worker has reported."""
    if isinstance(environment.runner, WorkerRunner):
        return
    print(report)
    assert environment.parsed_options is not None
    if environment.parsed_options.report:
        report.write(Path(environment.parsed_options.report))
    if report.histograms["e2e"].count == 0:
        environment.process_exit_code = 1

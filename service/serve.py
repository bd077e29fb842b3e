"""Starts Ray and the application on this machine, waits, and stops both.

Whatever is wrong with the port or the model is found before anything is deployed, and ends in one line. SIGUSR1 loads
the model anew, replica by replica; SIGTERM and SIGINT let open requests end.
"""

import asyncio
import logging
import os
import re
import select
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from service.data_plane import DataPlane, environment
from service.errors import StartError
from service.keys import read
from service.preflight import Preflight

if TYPE_CHECKING:
    from service.app import AppArgs

OBJECT_STORE_BYTES = 80 * 1024 * 1024  # nothing of ours goes through the object store; Ray's minimum is 75 MB
APP_NAME = "attendant"


@dataclass(frozen=True)
class Address:
    """Where the service listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The address as a client writes it."""
        return f"http://{self.host}:{self.port}"


class Stop(BaseException):
    """SIGINT or SIGTERM arrived. No `Exception`: nothing on the way may swallow it."""


def run(args: "AppArgs", address: Address, data_plane: DataPlane, *, allow_anonymous: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Raises `StartError` when it cannot start, `ConfigError` for the file of keys."""
    check_port(address)
    check_keys(args.api_keys_file, address, allow_anonymous=allow_anonymous)
    args.telemetry.check()
    preflight = _preflight(args)  # beside Ray's start, which takes longer
    _heed_signals()
    # Stop ends it all: while it starts at once, while it serves in order, and a second one at once again.
    with (
        suppress(Stop),
        tempfile.TemporaryDirectory(prefix="attendant-") as scratch,
        _ray(environment(data_plane, Path(scratch), args.drain_seconds, args.limits.max_body_seconds)),
    ):
        verdict = preflight.finish()
        args = args.model_copy(update={"device": verdict.device})  # Ray sets GPUs aside for those that say so
        _start(args, address)
        _deploy(args)
        print(_welcome(args, address, verdict.dtype), flush=True)
        try:
            _wait(args)
        except Stop:
            print("stopping: open requests are finished first; press Ctrl-C again to cut them short", flush=True)
            _shut_down(args.drain_seconds)


def _preflight(args: "AppArgs") -> Preflight:
    return Preflight(Path(args.model), args.engine_options, args.tensor_parallel, args.max_ranks)


def check_port(address: Address) -> None:
    """Raises `StartError` when something listens there already, or nobody may."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            raise StartError(
                f"cannot listen on {address.host} port {address.port}: {os.strerror(error.errno or 0)}; "
                "stop what uses it, or choose another with --port"
            ) from None


def check_keys(file: str | None, address: Address, *, allow_anonymous: bool) -> None:
    """Read the keys once. Raises `StartError` where anybody could come in from another machine."""
    if file is not None:
        read(Path(file))
    elif not (allow_anonymous or _is_loopback(address.host)):
        raise StartError(
            f"without API keys, everybody who reaches {address.host} could use the service; make a key with "
            "`attendant keys add` and name its file with --api-keys-file, or say --allow-anonymous"
        )


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)


@contextmanager
def _ray(switches: dict[str, str]) -> Iterator[None]:
    """A Ray of our own, with these in its environment, for as long as the block runs.

    Its processes talk to one another on ports that listen on every interface, which cannot be changed; Ray asks for
    a token there by default. The service's own address is the one that was asked for.
    """
    os.environ.update(switches)
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    try:
        ray.init(
            address="local",  # never another Ray that happens to run on this machine
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        _heed_signals()  # `init` has installed its own
    except Exception as error:
        raise StartError(f"Ray did not start: {_cause(str(error))}") from None
    try:
        yield
    finally:
        ray.shutdown()


def _start(args: "AppArgs", address: Address) -> None:
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        serve.start(http_options={"host": address.host, "port": address.port}, logging_config=_logs_of_serve(args))
    except Exception as error:
        raise StartError(f"the service did not start: {_cause(str(error))}") from None


def _logs_of_serve(args: "AppArgs") -> dict[str, str]:
    return {"log_level": "WARNING", "encoding": args.telemetry.log_format.upper()}


def _deploy(args: "AppArgs") -> None:
    """Have replicas of the model as it is now; those that are there go when the new ones have come."""
    from ray import serve

    from service.app import build

    try:
        serve.run(build(args), name=APP_NAME, logging_config=_logs_of_serve(args))
    except Exception as error:
        raise StartError(f"the service did not start: {_cause(_deployment_messages() or str(error))}") from None


def _wait(args: "AppArgs") -> None:
    """Until a `Stop`. On SIGUSR1 the model is loaded anew; while it cannot be, what is there goes on."""
    wake, waker = os.pipe()
    signal.signal(signal.SIGUSR1, lambda number, frame: os.write(waker, b"1"))
    while os.read(wake, select.PIPE_BUF):  # several in the meantime are one
        try:
            _preflight(args).finish()
            _deploy(args)
        except StartError as error:
            print(f"not loaded anew, and what was there goes on: {error}", flush=True)
        else:
            print("loaded anew", flush=True)


def _deployment_messages() -> str:
    """What Serve keeps of why a replica did not start; its exception only says that one did not."""
    from ray import serve

    application = serve.status().applications.get(APP_NAME)
    return "\n".join(deployment.message for deployment in application.deployments.values()) if application else ""


def _shut_down(drain_seconds: float) -> None:
    import ray
    from ray import serve

    # Ray prints what it makes of its own actors' orderly end, from a thread of its own.
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        with suppress(TimeoutError):  # what is not done by then is cut off, with all that Serve would wait for
            asyncio.run(_drain(drain_seconds))
            serve.delete(APP_NAME)  # waits for open requests, which `shutdown` by itself cuts off at the proxy
            serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


async def _drain(seconds: float) -> None:
    """Have every ingress refuse what is new and finish what is open. Raises `TimeoutError`.

    Serve alone would take the routes away at once, and answer 404 while streams still run.
    """
    from ray import serve
    from ray.serve.exceptions import DeploymentUnavailableError

    drained = serve.get_app_handle(APP_NAME).broadcast("drain")
    try:
        await drained.results_async(timeout_s=seconds, return_exceptions=True)
    except DeploymentUnavailableError:  # no ingress lives: nothing is open
        return


def _heed_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stop


def _cause(text: str) -> str:
    """The exception at the end of the traceback that Ray puts into its message."""
    raised = re.findall(r"^\s*(?:[\w.]+\.)?(\w*(?:Error|Request|Exception)): (.+)$", text, re.MULTILINE)
    return ": ".join(raised[-1]) if raised else text.strip().splitlines()[-1]


def _welcome(args: "AppArgs", address: Address, dtype: str) -> str:
    body = '{"prompt": "Once upon a time", "max_tokens": 100, "stream": true}'
    curl = f"curl -N {address.url}/v1/completions -H 'content-type: application/json' -d '{body}'"
    return f"Attendant is ready with {args.model_name or Path(args.model).name} in {dtype}. Try: {curl}"

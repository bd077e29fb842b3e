"""How HTTP reaches the ingress: through HAProxy with Serve's throughput mode, or through Serve's own Python proxy.

HAProxy halves the time to the first token and the cost of a token (docs/benchmarks.md), for about 100 MB more.
Serve reads its switches from the environment when it is imported, in every process of the cluster.
"""

import math
import random
import socket
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Literal

from service.limits import Limits

DataPlane = Literal["haproxy", "default"]

HAPROXY = Path(sysconfig.get_path("scripts")) / "attendant-haproxy"  # installed from the script beside this file
# Above the ports of Ray's workers; below those of Serve's replicas and those that Linux gives to connections: of the
# latter one is easily taken in the seconds until Serve listens.
PORTS = range(20_000, 30_000)
RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers are nice (15) to whatever else runs. Ours are what the machine is there for, and their clients wait:
    # 667 tokens/s against 552 to 32 clients on the same two cores (docs/benchmarks.md).
    "RAY_worker_niceness": "0",
    # glibc gives almost each of a process' 35 threads an arena of its own, in which others cannot use what was freed:
    # 17,000 short requests made an ingress grow by 15 MB, and by 2 MB with two arenas, at the same rate.
    "MALLOC_ARENA_MAX": "2",
}
# Said aloud, for an environment that says otherwise, as that of an image for clusters does.
OFF = RAY | {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}


def cluster_environment(drain_seconds: float) -> dict[str, str]:
    """The switches of Ray, of HAProxy and of throughput mode, for every node of a cluster before its `ray start`.

    Ports and files are Serve's defaults (docs/deploy.md): a node is one to its machine or its container.
    """
    return RAY | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(HAPROXY),
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        # An ingress that is busy is not one that is gone: it may be silent for half a minute. Serve allows seconds.
        # One whose port is closed is left out at once, by what HAProxy sees of the traffic.
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "10s",
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # Serve's own; ours come from the application
        # A request whose ingress dies before it answers is given to another one as if it had just come: nothing that an
        # ingress does before it answers outlives it. Up to three tries more, of what fits into 64 KiB.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "3",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",
        # When replicas come or go, HAProxy's old process goes on until its streams have ended, or for this long.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(drain_seconds)),
    }


def environment(
    data_plane: DataPlane, scratch: Path, drain_seconds: float, max_body_seconds: float = Limits().max_body_seconds
) -> dict[str, str]:
    """The switches, with ports and files of this service's own, so that two on one machine do not meet.

    max_body_seconds: until a body that HAProxy waits for must be there.
    """
    switches = OFF | {
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        # Serve starts a proxy again after three checks that failed; with its own period of 10 s that is half a minute.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    }
    if data_plane == "haproxy":
        switches |= cluster_environment(drain_seconds) | {
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
            "ATTENDANT_MAX_BODY_MS": str(math.ceil(1000 * max_body_seconds)),
            # No other load balancer has to notice before we go.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        }
    return switches


def free_port() -> int:
    """A port that nothing listens on now, and that the system gives to no connection before we listen.

    Raises OSError where none is found.
    """
    for port in random.sample(PORTS, k=100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"none of a hundred ports from {PORTS.start} to {PORTS.stop - 1} is free")

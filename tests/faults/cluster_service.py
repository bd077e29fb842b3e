"""A service on several Ray nodes of one machine: `python -m tests.faults.cluster_service MODEL PORT ARGS`.

Three nodes have room for an engine each. ARGS: what `AppArgs` takes, as JSON. Prints a line once it serves; runs until
SIGTERM.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.data_plane import environment

OBJECT_STORE_BYTES = 80 * 1024 * 1024
ROOM = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}


@contextmanager
def three_nodes() -> Iterator[str]:
    """The address of a cluster whose nodes are all there."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=ROOM | {"include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**ROOM)
        yield cluster.address
    finally:
        cluster.shutdown()


def main() -> None:
    """Start, serve, stop."""
    model, port, args = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(environment("haproxy", Path(scratch), drain_seconds=60))
        with three_nodes() as address:
            import ray
            from ray import serve

            from service.app import AppArgs, build

            ray.init(address=address, log_to_driver=False)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # `init` has installed its own
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})
            serve.run(build(AppArgs(model=model, **json.loads(args))), name="attendant")
            print("ready", flush=True)
            try:
                while True:
                    signal.pause()
            finally:
                serve.shutdown()
                ray.shutdown()


if __name__ == "__main__":
    main()

"""A service on several Ray nodes of one machine: `python -m tests.faults.cluster_service KIND MODEL PORT ARGS`.

KIND: `fixed`, three nodes with room for an engine each, or `growing`, one such node to which Ray's own autoscaler may
add two. ARGS: what `AppArgs` takes, as JSON. Prints a line once it serves; runs until SIGTERM.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.data_plane import environment, free_port

OBJECT_STORE_BYTES = 80 * 1024 * 1024
ROOM = {"num_cpus": 1, "object_store_memory": OBJECT_STORE_BYTES}


@contextmanager
def fixed_nodes() -> Iterator[str]:
    """The address of a cluster whose nodes are all there."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=ROOM | {"include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(**ROOM)
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def growing_nodes() -> Iterator[str]:
    """The address of a cluster whose autoscaler starts nodes as processes on this machine.

    `AutoscalingCluster.start` would stop every Ray on the machine first, so only its configuration is used.
    """
    from ray.cluster_utils import AutoscalingCluster

    worker = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    cluster = AutoscalingCluster({"CPU": 1}, {"worker": worker}, idle_timeout_minutes=10, max_workers=2)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(cluster._config, config)
        config.flush()
        port = free_port()
        options = [f"--autoscaling-config={config.name}", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
        fake = os.environ | {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
        head = subprocess.Popen(command, env=fake, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert head.stdout is not None
            for line in head.stdout:
                if "Ray runtime started" in line:
                    break
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait()


def main() -> None:
    """Start, serve, stop."""
    kind, model, port, args = sys.argv[1:]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.update(environment("haproxy", Path(scratch), drain_seconds=60))
        nodes = fixed_nodes if kind == "fixed" else growing_nodes
        with nodes() as address:
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

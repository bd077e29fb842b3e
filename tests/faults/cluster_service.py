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

import psutil

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


STEPS = """
    initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands
    worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter
""".split()
# `AutoscalingCluster` of ray.cluster_utils would write and start this; but it stops every Ray on the machine first, and
# misses a file that the wheel of Ray 2.60.0 leaves out.
GROWING = {
    "cluster_name": "growing",
    "max_workers": 2,
    "provider": {
        "type": "fake_multinode",  # nodes are processes on this machine
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": OBJECT_STORE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 10,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    **{step: [] for step in STEPS},
    "file_mounts_sync_continuously": False,
}


@contextmanager
def growing_nodes() -> Iterator[str]:
    """The address of one node, to which Ray's own autoscaler adds others."""
    from ray.util import get_node_ip_address

    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    provider = GROWING["provider"] | {"gcs_address": address}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(GROWING | {"provider": provider}, config)
        config.flush()
        options = [f"--autoscaling-config={config.name}", f"--port={port}", "--num-cpus=1", "--include-dashboard=false"]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options]
        switches = {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "0",
            "RAY_AUTH_MODE": "disabled",
            "PYTHONUNBUFFERED": "1",
        }
        os.environ.update(switches)
        head = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            assert head.stdout is not None
            for line in head.stdout:
                print(line, end="", flush=True)
                if "Ray runtime started" in line:
                    break
            yield address
        finally:
            nodes = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            _, left = psutil.wait_procs(nodes, timeout=10)  # nodes that were added outlive the head
            for process in left:
                process.kill()
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

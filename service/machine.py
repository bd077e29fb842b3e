"""What the system says of this machine: who listens on a port, how much memory is left, whether the clock is kept."""

import ctypes
import os
from pathlib import Path

LISTENING = "0A"  # in /proc/net/tcp
UNSYNCHRONIZED = 5  # what adjtimex answers for a clock that nobody keeps
TIMEX_BYTES = 512  # more than its structure has


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that can be had without swapping, in a container at most what it may have; None where nobody says."""
    try:
        values = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = 1024 * int(values["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no container, or one without a limit: "max"
        return free


def listener(port: int, proc: Path = Path("/proc")) -> str:
    """Who listens on a TCP port, as far as we may know: "python3 (pid 12)", or "another process"."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            rows = [line.split() for line in (proc / "net" / table).read_text().splitlines()[1:]]
        except OSError:
            continue
        inodes |= {row[9] for row in rows if row[3] == LISTENING and int(row[1].rpartition(":")[2], 16) == port}
    sockets = {f"socket:[{inode}]" for inode in inodes}
    for process in proc.glob("[0-9]*"):
        try:
            if any(str(file.readlink()) in sockets for file in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:  # it has ended, or is not ours to look at
            continue
    return "another process"


def clock_is_kept() -> bool | None:
    """Whether something keeps the system's clock right (NTP or the like); None where nobody says."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != UNSYNCHRONIZED

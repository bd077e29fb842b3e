"""What the system says of this machine: who listens on a port, whether the clock is kept."""

import ctypes
from pathlib import Path

LISTENING = "0A"  # in /proc/net/tcp
UNSYNCHRONIZED = 5  # what adjtimex answers for a clock that nobody keeps
TIMEX_BYTES = 512  # more than its structure has


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

"""What this process may use: processors by affinity and quota, memory by what the machine has and a container allows.

A limit may stand at any of the control groups that this process is in, and the lowest one holds. Version 2 keeps all
of a group's files in one directory, version 1 a directory for each controller. A container without a namespace of its
own for them names a path that only the host has; its own group is then the root of what it sees.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
MEMINFO = Path("/proc/meminfo")


def cores(cgroup: Path = CGROUP, own: Path = OWN_GROUPS) -> int:
    """Processors that this process may keep busy: by its affinity, and by its quota of their time, rounded down."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _groups("cpu", cgroup, own):
        words = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdigit():  # without a limit, "max" in version 2 and -1 in version 1
            count = min(count, int(words[0]) // int(words[1]))
    return max(1, count)


def total_memory(cgroup: Path = CGROUP, own: Path = OWN_GROUPS) -> int:
    """Bytes that this machine has, in a container at most what that may have."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([installed, *(limit for limit, _ in _memory_groups(cgroup, own))])


def free_memory(meminfo: Path = MEMINFO, cgroup: Path = CGROUP, own: Path = OWN_GROUPS) -> int | None:
    """Bytes that can be had without swapping, in a container at most what it has left; None where nobody says."""
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
            return max(0, min([free, *(limit - used for limit, used in _memory_groups(cgroup, own))]))
    return None


def _memory_groups(cgroup: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each group that has a limit. Cached files that nobody reads count as free."""
    for group in _groups("memory", cgroup, own):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0].isdigit():
            stat = _words(group / "memory.stat")
            counts = dict(zip(stat[::2], stat[1::2], strict=False))
            # In version 1, those without "total_" leave out the groups below.
            reclaimable = int(counts.get("total_inactive_file", counts.get("inactive_file", 0)))
            yield int(limit[0]), int(used[0]) - reclaimable


def _groups(controller: str, cgroup: Path, own: Path) -> Iterator[Path]:
    """The directories of the groups that this process is in, for a controller of either version."""
    yield from (cgroup, cgroup / controller)
    for line in _lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = cgroup / controller if controllers else cgroup
        names = PurePosixPath(path).parts[1:]
        if ".." not in names:  # outside of what we see
            yield from (root.joinpath(*names[:depth]) for depth in range(1, len(names) + 1))


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []

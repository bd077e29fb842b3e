"""What a process may use, from made-up control groups of both versions."""

import os
from pathlib import Path

import pytest

from model import machine
from model.config import EngineConfig
from model.engine import memory
from model.engine.memory import size_cache
from tests.model.native_scene import tiny
from tests.model.test_memory import CPU

pytestmark = pytest.mark.fast

GIB = 2**30
INSTALLED = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
NO_LIMIT = 9223372036854771712  # as version 1 says it


class Groups:
    """Files of control groups, and which of them a process is in."""

    def __init__(self, directory: Path) -> None:
        self.root, self.own, self.meminfo = directory / "cgroup", directory / "own", directory / "meminfo"
        self.meminfo.write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n")

    def write(self, group: str, **files: object) -> None:
        """`cpu_max="max"` becomes the file cpu.max."""
        (self.root / group).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.root / group / name.replace("_", ".", 1)).write_text(f"{content}\n")

    @property
    def cores(self) -> int:
        return machine.cores(self.root, self.own)

    @property
    def total(self) -> int:
        return machine.total_memory(self.root, self.own)

    @property
    def free(self) -> int | None:
        return machine.free_memory(self.meminfo, self.root, self.own)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return Groups(tmp_path)


def test_without_control_groups_all_that_is_there_may_be_used(groups: Groups) -> None:
    assert (groups.cores, groups.total, groups.free) == (8, INSTALLED, 32 * GIB)


def test_where_nobody_says_what_is_free_nobody_knows(groups: Groups) -> None:
    groups.meminfo.unlink()
    assert groups.free is None


def test_a_group_without_limits_takes_nothing_away(groups: Groups) -> None:
    groups.write("", cpu_max="max 100000", memory_max="max", memory_current=1)
    groups.write("cpu", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    groups.write("memory", memory_limit_in_bytes=NO_LIMIT, memory_usage_in_bytes=1)
    assert (groups.cores, groups.total, groups.free) == (8, INSTALLED, 32 * GIB)


@pytest.mark.parametrize(("quota", "cores"), [(300000, 3), (250000, 2), (50000, 1), (1600000, 8)])
def test_a_quota_of_processors_is_kept_in_both_versions(groups: Groups, quota: int, cores: int) -> None:
    groups.write("", cpu_max=f"{quota} 100000")
    assert groups.cores == cores
    groups.write("", cpu_max="max 100000")
    groups.write("cpu", cpu_cfs_quota_us=quota, cpu_cfs_period_us=100000)
    assert groups.cores == cores


def test_a_container_has_its_limit_less_what_it_uses(groups: Groups) -> None:
    groups.write("", memory_max=GIB, memory_current=GIB // 4, memory_stat="anon 5\ninactive_file 0")
    assert (groups.total, groups.free) == (GIB, GIB * 3 // 4)


def test_so_it_is_in_version_1(groups: Groups) -> None:
    stat = f"inactive_file 1\ntotal_inactive_file {GIB // 8}"
    groups.write("memory", memory_limit_in_bytes=GIB, memory_usage_in_bytes=GIB // 4, memory_stat=stat)
    assert (groups.total, groups.free) == (GIB, GIB * 7 // 8)


def test_files_that_were_read_and_are_cached_count_as_free(groups: Groups) -> None:
    """A container that has just read its model would seem to be full."""
    groups.write("", memory_max=GIB, memory_current=GIB, memory_stat=f"inactive_file {GIB // 2}\nslab 7")
    assert groups.free == GIB // 2


def test_the_lowest_limit_of_its_own_group_and_those_above_holds(groups: Groups) -> None:
    groups.own.write_text("0::/user.slice/attendant.service\n")
    groups.write("user.slice", cpu_max="200000 100000", memory_max=GIB, memory_current=GIB // 2)
    groups.write("user.slice/attendant.service", cpu_max="600000 100000", memory_max=2 * GIB, memory_current=0)
    assert (groups.cores, groups.total, groups.free) == (2, GIB, GIB // 2)


def test_a_group_of_version_1_is_found_by_its_controller(groups: Groups) -> None:
    groups.own.write_text("5:cpuset:/pinned\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/def\n0::/\n")
    groups.write("memory/docker/abc", memory_limit_in_bytes=GIB, memory_usage_in_bytes=0)
    groups.write("cpu/docker/def", cpu_cfs_quota_us=400000, cpu_cfs_period_us=100000)
    groups.write("cpu/docker/abc", cpu_cfs_quota_us=100000, cpu_cfs_period_us=100000)
    assert (groups.cores, groups.total) == (4, GIB)


def test_a_group_outside_of_what_a_container_sees_is_passed_over(groups: Groups) -> None:
    groups.own.write_text("0::/../other\n")
    groups.write("", memory_max="max", memory_current=0)
    groups.write("../other", memory_max=GIB, memory_current=0)
    assert groups.total == INSTALLED


def blocks(monkeypatch: pytest.MonkeyPatch, *, total: int, free: int | None, processes: int = 1) -> int:
    """Of 1 MiB each, that a cache gets."""
    monkeypatch.setattr(memory, "total_memory", lambda: total)
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    config = EngineConfig(device="cpu", max_num_seqs=512, processes_per_machine=processes)
    return size_cache(tiny(max_position_embeddings=2**20), config, 2**20, CPU)[1]


def test_the_cache_is_a_tenth_of_what_the_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(monkeypatch, total=20 * GIB, free=10 * GIB) == 2048
    assert blocks(monkeypatch, total=20 * GIB, free=None) == 2048


def test_engines_of_one_machine_share_that_tenth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(monkeypatch, total=20 * GIB, free=10 * GIB, processes=4) == 512


def test_the_cache_is_never_larger_than_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert blocks(monkeypatch, total=20 * GIB, free=GIB) == 1024

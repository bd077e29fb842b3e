"""The doctor finds each thing that is broken, says what to do about it, and finds nothing where all is well."""

import json
import os
import resource
import shutil
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from model import machine
from model.kernels.cpu import build
from service import doctor, keys
from service.cli import app
from service.doctor import Finding, Patient
from service.machine import clock_is_kept, listener
from service.serve import Address
from tests.service.test_cli import attendant

HERE = Address("127.0.0.1", 0)


def level_of(findings: Any, name: str) -> str:
    (finding,) = [finding for finding in findings if finding.name == name]
    assert finding.value
    assert bool(finding.remedy) == (finding.level != "ok"), "what is wrong has a remedy, and nothing else"
    return finding.level


def broken(finding: Finding, level: str, words: str) -> None:
    assert (finding.level, words in finding.value) == (level, True), finding
    assert finding.remedy


def test_a_python_that_is_too_old_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_python().level == "ok"
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 1))
    broken(doctor.check_python(), "bad", sys.version.split()[0])


def test_a_package_of_another_version_is_named_with_the_one_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert level_of(doctor.check_packages(), "packages") == "ok"
    version = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "2.1.0+cpu" if name == "torch" else version(name))
    findings = list(doctor.check_packages())
    assert level_of(findings, "packages") == "bad"
    broken(findings[-1], "bad", "torch 2.1.0+cpu, not ==2.13.0")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.version

    def without_jiter(name: str) -> str:
        if name == "jiter":
            raise doctor.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", without_jiter)
    broken(list(doctor.check_packages())[-1], "bad", "jiter not installed")


def test_one_core_is_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 1)
    broken(doctor.check_cores(), "warn", "1")
    monkeypatch.setattr(machine, "cores", lambda: 4)
    found = doctor.check_cores()
    assert (found.level, found.value) == ("ok", "4; native kernels compute on all of them, torch on 2")


def test_a_native_step_that_was_not_built_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "DIRECTORIES", (tmp_path,))
    broken(doctor.check_native_step(), "warn", "not built")
    monkeypatch.setattr(build, "COMPILERS", ("no-such-compiler",))
    assert "g++" in doctor.check_native_step().remedy


def test_a_native_step_that_cannot_be_loaded_is_bad(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "DIRECTORIES", (tmp_path,))
    name = f"step-{build._fingerprint(build.compilation_units(), ())}-0.so"
    (tmp_path / name).write_bytes(b"no library")
    broken(doctor.check_native_step(), "bad", name)


@pytest.mark.slow
def test_a_native_step_that_was_built_is_found_with_its_instruction_set() -> None:
    built = build.build()
    found = doctor.check_native_step()
    assert found.level == "ok"
    assert build.find_built() is not None
    assert found.value.split()[0] in ("portable", "avx2", "avx512")
    assert str(built.parent) in found.value


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    broken(doctor.check_gpu(), "warn", "cannot use")
    monkeypatch.setattr(Path, "exists", lambda path: str(path) != "/dev/nvidiactl" and exists(path))
    assert doctor.check_gpu().level == "ok"


def test_a_model_is_told_with_the_cache_that_it_would_get(tiny_model: Path) -> None:
    options = (("kv_cache_tokens", 4096),)
    model, cache, numbers, memory = doctor.check_model(Patient(tiny_model, HERE, engine_options=options))
    assert {model.level, cache.level, numbers.level, memory.level} == {"ok"}
    assert numbers.value.startswith(("bfloat16", "float32"))
    assert cache.value.startswith("4096 tokens")
    assert "up to 1024" in cache.value


def test_the_command_looks_at_the_engine_that_its_options_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that left out what `serve` is told would find room in a cache of other numbers, for other lengths."""
    asked: list[Patient] = []
    monkeypatch.setattr(doctor, "examine", lambda patient: asked.append(patient) or [])
    options = {
        "dtype": "bf16",
        "device": "cpu",
        "max_model_len": 256,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 64,
        "kv_cache_tokens": 4096,
        "kv_cache_dtype": "int8",
        "gpu_memory_utilization": 0.5,
    }
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert CliRunner().invoke(app, ["doctor", *words]).exit_code == 0
    assert dict(asked[0].engine_options) == options


def test_to_look_at_a_model_builds_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "DIRECTORIES", (tmp_path,))
    _, _, numbers, _ = doctor.check_model(Patient(tiny_model, HERE))
    assert "torch computes: the native step is not built" in numbers.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_broken_file_of_the_model_is_named(tiny_model: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "broken")
    (tmp_path / "broken" / name).write_bytes(b"{")
    (only,) = doctor.check_model(Patient(tmp_path / "broken", HERE))
    broken(only, "bad", name)


def test_options_that_do_not_fit_the_model_are_named(tiny_model: Path) -> None:
    *_, cache = doctor.check_model(Patient(tiny_model, HERE, engine_options=(("kv_cache_tokens", 1),)))
    broken(cache, "bad", "1 tokens is smaller than one block")


def test_too_little_memory_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 1 << 30)
    broken(doctor.check_memory(2 << 30), "bad", "1.0 GiB free, about 2.0 needed")
    assert doctor.check_memory(1 << 29).level == "ok"
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    broken(doctor.check_memory(1), "warn", "does not say")


def test_a_port_that_is_taken_is_told_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        broken(doctor.check_port_of(Address("127.0.0.1", port)), "bad", f"(pid {os.getpid()})")
    assert doctor.check_port_of(Address("127.0.0.1", port)).level == "ok"
    assert listener(port) == "another process"


def test_keys_that_cannot_be_read_or_have_expired_or_lie_open_are_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    assert doctor.check_keys_file(None).level == "ok"
    broken(doctor.check_keys_file(file), "bad", "cannot be read")
    file.write_text('{"keys": []}')
    broken(doctor.check_keys_file(file), "bad", "holds no key")
    keys.add(file, "old", expires=datetime(2020, 1, 1, tzinfo=UTC))
    broken(doctor.check_keys_file(file), "bad", "all of them expired")
    keys.add(file, "new")
    broken(doctor.check_keys_file(file), "warn", "expired: old")
    keys.remove(file, "old")
    assert doctor.check_keys_file(file).level == "ok"
    file.chmod(0o644)
    broken(doctor.check_keys_file(file), "warn", "can be read by others")


def test_haproxy_that_does_not_run_is_bad_only_where_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert doctor.check_data_plane("haproxy").level == "ok"
    lonely = tmp_path / "bin" / "attendant-haproxy"  # the package with the binary is not beside it
    lonely.parent.mkdir()
    shutil.copy(doctor.HAPROXY, lonely)
    monkeypatch.setattr(doctor, "HAPROXY", lonely)
    broken(doctor.check_data_plane("haproxy"), "bad", "attendant-haproxy")
    assert doctor.check_data_plane("default").level == "ok"
    monkeypatch.setattr(doctor, "HAPROXY", tmp_path / "nothing")
    broken(doctor.check_data_plane("haproxy"), "bad", "nothing")


def test_a_prometheus_that_does_not_run_is_told_and_none_is_no_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.check_prometheus().level == "ok"
    binary = tmp_path / "prometheus"
    binary.write_text("#!/bin/sh\necho prometheus, version 3\n")
    binary.chmod(0o755)
    assert "version 3" in doctor.check_prometheus().value
    binary.write_text("#!/bin/sh\nexit 1\n")
    broken(doctor.check_prometheus(), "warn", str(binary))


def test_few_open_files_are_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 8192))
    found = doctor.check_open_files()
    broken(found, "warn", "1024")
    assert found.remedy == "ulimit -n 8192"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (-1, -1))
    assert doctor.check_open_files().level == "ok"


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=100 << 20, free=2 << 20))
    broken(doctor.check_disk(tmp_path), "warn", "free")
    broken(doctor.check_disk(tmp_path, needed=3 << 20), "bad", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=100 << 20, free=50 << 20))
    assert doctor.check_disk(tmp_path).level == "ok"
    monkeypatch.undo()
    broken(doctor.check_disk(tmp_path / "none"), "bad", "No such file")


def test_a_clock_that_is_past_or_not_kept_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for kept, level in ((True, "ok"), (None, "ok"), (False, "warn")):
        monkeypatch.setattr(doctor, "clock_is_kept", lambda kept=kept: kept)
        assert doctor.check_clock().level == level
    monkeypatch.setattr(doctor.time, "time", lambda: 1e9)
    broken(doctor.check_clock(), "bad", "past")


def test_the_system_is_asked_about_its_clock() -> None:
    assert clock_is_kept() in (True, False)


@pytest.mark.slow
def test_the_command_prints_every_finding_and_exits_with_1_where_one_is_bad(tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = attendant("doctor", "--model", str(tiny_model), "--port", port, "--json")
        findings = json.loads(told.stdout)
        assert told.returncode == 1
        assert [one["name"] for one in findings if one["level"] == "bad"] == ["port"]
        assert all(set(one) == {"name", "level", "value", "remedy"} for one in findings)
    told = attendant("doctor", "--model", str(tiny_model), "--port", port)
    assert told.returncode == 0
    assert len([line for line in told.stdout.splitlines() if line[:5] in ("ok   ", "warn ")]) == len(findings)

"""Compiles the native step: `python -m model.kernels.cpu.build`, which `make serve` runs as a part of installing.

A few seconds, once: the library is named by a hash of its sources, flags and compiler. It has a plain C interface and
no torch in it. Every kernel is compiled for each instruction set; which one runs, the machine that loads it decides.
"""

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from model.machine import cores

SOURCES = Path(__file__).parent
# -ffp-contract=off: a product and a sum are rounded one by one unless the source says `fma`, or bits would depend on
# what the compiler could fuse.
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -fno-exceptions -fno-rtti".split()
WARNINGS = "-Wall -Wextra -Wno-psabi -Wno-unknown-pragmas -Wno-unused-function".split()
AVX2 = "-mavx2 -mfma".split()
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16".split()
COMPILERS = ("g++", "clang++")
# Beside the sources, as where an image is built; or else in the user's own cache.
DIRECTORIES = (SOURCES / "build", Path.home() / ".cache" / "attendant")


class NoLibrary(Exception):  # noqa: N818 - not an error: torch computes the step then
    """There is no native library for this machine; the text says why."""


def build(extra_flags: Sequence[str] = ()) -> Path:
    """The compiled library, compiled now if it is not there yet. Raises `NoLibrary`.

    Where the compiler is gone (an image that was built elsewhere), any library of these sources will do.
    """
    units = compilation_units()
    name = f"step-{_fingerprint(units, extra_flags)}"
    try:
        compiler = find_compiler()
    except NoLibrary:
        if built := _built(f"{name}-*.so"):
            return built
        raise
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    name = f"{name}-{hashlib.sha256(version.encode()).hexdigest()[:8]}.so"
    return _built(name) or _compile(compiler, units, extra_flags, _writable() / name)


def find_built() -> Path | None:
    """The library of these sources, by whichever compiler, if it is there; nothing is compiled."""
    return _built(f"step-{_fingerprint(compilation_units(), ())}-*.so")


def _built(pattern: str) -> Path | None:
    return next((file for directory in DIRECTORIES for file in directory.glob(pattern)), None)


def _compile(compiler: str, units: dict[Path, list[str]], extra_flags: Sequence[str], target: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in units]
        commands = [
            [compiler, *FLAGS, *WARNINGS, *flags, *extra_flags, "-c", str(source), "-o", str(out)]
            for (source, flags), out in zip(units.items(), objects, strict=True)
        ]
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(_run, commands))
        library = Path(scratch) / target.name
        _run([compiler, "-shared", *extra_flags, *map(str, objects), "-o", str(library), "-pthread"])
        return library.replace(target)  # at once, so that several processes may build at the same time


def find_compiler() -> str:
    """The C++ compiler of this machine. Raises `NoLibrary`."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise NoLibrary(f"no C++ compiler ({' or '.join(COMPILERS)})")


def compilation_units() -> dict[Path, list[str]]:
    """The source files of this machine's library, each with the flags of its instruction set."""
    units: dict[Path, list[str]] = {source: [] for source in sorted(SOURCES.glob("*.cpp"))}
    for name, flags in (("kernels_avx2", AVX2), ("kernels_avx512", [*AVX2, *AVX512])):
        source = SOURCES / f"{name}.cpp"
        if platform.machine() in ("x86_64", "AMD64"):
            units[source] = flags
        else:
            del units[source]
    return units


def _fingerprint(units: dict[Path, list[str]], extra_flags: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((FLAGS, list(units.values()), list(extra_flags))).encode())
    for file in sorted([*units, *SOURCES.glob("*.h")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _writable() -> Path:
    for directory in DIRECTORIES:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                return directory
        except OSError:
            continue
    raise NoLibrary(f"none of {', '.join(map(str, DIRECTORIES))} can be written")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoLibrary(f"{' '.join(command)} failed:\n{done.stderr}")


def main() -> int:
    """Build, and say what came of it. Without a compiler the service still runs: torch computes the step."""
    try:
        print(f"native step: {build()}")
    except NoLibrary as reason:
        print(f"native step: not built, torch computes instead: {reason}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

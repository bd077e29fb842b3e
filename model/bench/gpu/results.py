"""What a part has measured so far: written row by row, so that a part that is cut off leaves what it had."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

BROKEN_DEVICE = 3  # exit code of a process whose device takes no more work: an error of CUDA outlives its row


class Begun:
    """Which row a part is about, in a file beside its rows, for whoever watches over it."""

    def __init__(self, rows: Path) -> None:
        self._file = rows.with_suffix(".begun")

    def set(self, name: str) -> None:
        """It begins now."""
        self._file.write_text(name)

    def clear(self) -> None:
        """No row is being measured."""
        self._file.unlink(missing_ok=True)

    def name(self) -> str | None:
        """The row, or None."""
        return self._file.read_text() if self._file.exists() else None

    def seconds(self) -> float:
        """For how long it has been; 0 for no row."""
        try:
            return time.time() - self._file.stat().st_mtime
        except FileNotFoundError:
            return 0.0


class Results:
    """The rows of one part, in a file. A row that is there already is not measured again.

    Each row has a `name`, and either numbers or an `error`. keep_errors: what failed once is not tried again.
    """

    def __init__(self, file: Path, *, keep_errors: bool = False) -> None:
        self._file, self._begun, self._keep_errors = file, Begun(file), keep_errors
        self.rows: list[dict[str, Any]] = read_rows(file)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that have no row yet, or only an error."""
        there = {row["name"] for row in self.rows if self._keep_errors or "error" not in row}
        return [name for name in names if name not in there]

    def add(self, name: str, **numbers: Any) -> None:
        """Keep a row, and print it."""
        numbers = {key: _written(value) for key, value in numbers.items()}
        self.rows = [row for row in self.rows if row["name"] != name] + [{"name": name, **numbers}]
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows, indent=1, default=str) + "\n")
        partial.replace(self._file)
        print(f"  {name:<52}" + "  ".join(f"{key} {shown(value)}" for key, value in numbers.items()), flush=True)

    @contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Fill in the row of `name`. What goes wrong is its row's error, and the part goes on; where the device is
        broken with it, the process ends.
        """
        numbers: dict[str, Any] = {}
        started = time.perf_counter()
        self._begun.set(name)
        broken = False
        try:
            yield numbers
        except Exception as error:  # whatever it was, the others' rows are worth having
            numbers = {"error": told(error)}
            broken = device_is_broken()
        self.add(name, **numbers, took=round(time.perf_counter() - started, 2))
        self._begun.clear()
        if broken:
            os._exit(BROKEN_DEVICE)  # at an orderly end torch would meet the same error again


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that a part has left in its file; none where there is no file, an error where nobody can read it."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_bytes())
        return [row for row in rows if row["name"]]
    except (ValueError, TypeError, KeyError) as error:
        return [{"name": file.name, "error": f"is no list of rows: {told(error)}"}]


def told(error: Exception) -> str:
    """An error in one line, or a few."""
    return f"{type(error).__name__}: {error}".strip()[:600]


def device_is_broken() -> bool:
    """Whether the device takes no more work from this process."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _written(value: object) -> object:
    """JSON has no infinity and nothing that is not a number."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: object) -> str:
    """A number as people read it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)

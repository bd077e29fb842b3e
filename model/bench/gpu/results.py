"""What a part has measured so far: written row by row, so that a part that is cut off leaves what it had."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Results:
    """The rows of one part, in a file. A row that is there already is not measured again.

    Each row has a `name`, and either numbers or an `error`.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rows: list[dict[str, Any]] = read_rows(file)

    def missing(self, names: Sequence[str]) -> list[str]:
        """Those of `names` that have no row yet, or only an error."""
        measured = {row["name"] for row in self.rows if "error" not in row}
        return [name for name in names if name not in measured]

    def add(self, name: str, **numbers: Any) -> None:
        """Keep a row, and print it."""
        self.rows = [row for row in self.rows if row["name"] != name] + [{"name": name, **numbers}]
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows, indent=1, default=str) + "\n")
        partial.replace(self._file)
        print(f"  {name:<52}" + "  ".join(f"{key} {shown(value)}" for key, value in numbers.items()), flush=True)

    @contextmanager
    def row(self, name: str) -> Iterator[dict[str, Any]]:
        """Fill in the row of `name`. What goes wrong is its row's error, and the part goes on."""
        numbers: dict[str, Any] = {}
        started = time.perf_counter()
        try:
            yield numbers
        except Exception as error:  # whatever it was, the others' rows are worth having
            numbers = {"error": f"{type(error).__name__}: {error}".strip()[:600]}
        self.add(name, **numbers, took=round(time.perf_counter() - started, 2))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows that a part has left in its file; none where there is no file."""
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    return rows


def shown(value: object) -> str:
    """A number as people read it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)

"""One line of JSON for each request: who asked, what became of it, how long it took. No text of prompts."""

import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any

from service.logs import json_line

STDOUT = "-"


class AccessLog:
    """Appends to a file, which may be moved away (logrotate), or writes to standard output.

    Raises `OSError` when the file cannot be opened.
    """

    def __init__(self, path: str) -> None:
        handler = logging.StreamHandler(sys.stdout) if path == STDOUT else WatchedFileHandler(path, encoding="utf-8")
        self._handler: logging.Handler = handler

    def write(self, fields: Mapping[str, Any]) -> None:
        """One line. What is not known (None) is left out."""
        text = json_line({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
        self._handler.emit(logging.makeLogRecord({"msg": text}))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()

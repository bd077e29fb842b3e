"""The worker's end of the pipe: a JSON object a line, rounds in by stdin, answers out by stdout.

First the worker says {"ready": version}, {"missing": what} or {"error": why}. Then each `Ask` is answered by an
`Answer` or {"error": why}, until stdin ends. Between rounds it waits in a read. Nothing here but the standard library.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from model.bench.rounds import Answer, Ask


class NotInstalledError(Exception):
    """What a worker needs is not on this machine. Its text says what."""


@dataclass(frozen=True)
class Setup:
    """What to load: a Hugging Face directory, the dtype, and how many threads to use.

    converted: where the engine's own form of the model is kept, written when it is first needed.
    """

    model: Path
    dtype: str
    threads: int
    converted: Path

    @property
    def vocab_size(self) -> int:
        """Ids that a prompt may hold."""
        size: int = json.loads((self.model / "config.json").read_text())["vocab_size"]
        return size

    def convert(self, write: Callable[[Path], None]) -> Path:
        """The converted model; `write` makes it at the path that it is given, and only a whole one is kept."""
        if not self.converted.exists():
            partial = self.converted.with_name(f"{self.converted.name}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            write(partial)
            partial.rename(self.converted)
        return self.converted


Play = Callable[[Ask], Answer]


def serve(load: Callable[[Setup], tuple[str, Play]]) -> None:
    """Load what the command line names, then answer rounds to the end of stdin.

    load: -> (version, what plays a round).
    """
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not be read as an answer,
    sys.stdout = sys.stderr  # and is in the log at once, however the process ends
    logging.basicConfig(level=logging.INFO)

    def say(message: dict[str, object]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        version, play = load(_setup())
    except ModuleNotFoundError as error:
        return say({"missing": error.name})
    except NotInstalledError as error:
        return say({"missing": str(error)})
    except Exception as error:  # any library's own: it is reported, and the other engines go on
        return say({"error": repr(error)})
    say({"ready": version})
    for line in sys.stdin:
        try:
            answer = play(Ask(**json.loads(line)))
        except Exception as error:
            say({"error": repr(error)})
        else:
            say(asdict(answer))
    return None


def _setup() -> Setup:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--converted", type=Path, required=True)
    return Setup(**vars(parser.parse_args()))

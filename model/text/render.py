"""Renders one chat template in a process of its own. Run as a module it is that process; it needs no torch.

A template is a program that comes with a checkpoint. Jinja's sandbox keeps it from everything outside it, but not from
running for ever (two nested loops) or from taking all the memory there is (a text doubled forty times); compiling it is
enough for that, since constant expressions are computed then. So it runs under limits that end the process.

The first line on stdin is the template and its special tokens, each further one a chat; each is answered by a line.
"""

import json
import resource
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_SECONDS = 1.0  # of processor time
MEMORY_BYTES = 256 << 20  # beside what the process has when it starts
MAX_TEXT = 4 << 20  # characters


class Refused(Exception):  # noqa: N818 - the template's own verdict
    """The template called `raise_exception`."""


def compile_template(source: str) -> Template:
    """The template, in a sandbox that cannot change what it is given. Raises whatever Jinja does."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(source)


class _Generation(Extension):
    """`{% generation %}`: marks for training what the assistant has said. What is inside is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """As `transformers` has it: Jinja's own would escape what HTML cannot bear."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def serve() -> None:
    """Answer until stdin ends. An answer has one key: `text`, `refused` or `failed`."""
    source, special_tokens = json.loads(sys.stdin.readline())
    _limit_memory()
    with _Alarm():
        template, answer = _attempt(lambda: compile_template(source))
    _say(answer or {"text": ""})
    if answer:
        return
    for line in sys.stdin:
        chat = json.loads(line)
        with _Alarm():
            text, answer = _attempt(lambda chat=chat: _render(template, {**chat, **special_tokens}))
        _say(answer or {"text": text})


def _render(template: Template, variables: Mapping[str, Any]) -> str:
    text: str = template.render(**variables)
    if len(text) > MAX_TEXT:
        raise Refused(f"they make {len(text)} characters, and at most {MAX_TEXT} are taken")
    return text


def _attempt(work: Any) -> tuple[Any, dict[str, str]]:
    """What `work` gives, or an answer that says why it gave nothing."""
    try:
        return work(), {}
    except Refused as refusal:
        return None, {"refused": str(refusal)[:400]}
    except MemoryError:
        return None, {"failed": f"it takes more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # a program of the checkpoint's may fail in any way
        return None, {"failed": f"{type(error).__name__}: {error}"[:400]}


class _Alarm:
    """Ends the process, by the signal's default action, wherever it is."""

    def __enter__(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, RENDER_SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _say(answer: Mapping[str, str]) -> None:
    print(json.dumps(answer), flush=True)


def _refuse(message: str) -> NoReturn:
    raise Refused(message)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; the end of stdin is for us
    serve()

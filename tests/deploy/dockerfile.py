"""Reads a Dockerfile: its stages, and the instructions of each in their order."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"


class Instruction(NamedTuple):
    """One instruction on one line; a RUN's mounts are taken off."""

    word: str
    rest: str


def instructions(text: str) -> list[Instruction]:
    """Every instruction of a file, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    words = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [Instruction(word, re.sub(r"--mount=\S+\s+", "", rest)) for word, _, rest in words]


def stages(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each stage by its name, without those of the stage that it builds on."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for instruction in instructions(text):
        if instruction.word == "FROM":
            current = found.setdefault(instruction.rest.rpartition(" AS ")[2], [])
        current.append(instruction)
    return found


def environment(stage: list[Instruction]) -> dict[str, str]:
    """What the ENV instructions of a stage set."""
    pairs = [word for instruction in stage if instruction.word == "ENV" for word in shlex.split(instruction.rest)]
    return dict(pair.partition("=")[::2] for pair in pairs)


def runs(stage: list[Instruction]) -> list[str]:
    """The shell commands of a stage that are Python's: what installs Debian's packages or users is left out."""
    commands = [instruction.rest for instruction in stage if instruction.word == "RUN"]
    return [command for command in commands if not command.startswith(("apt-get ", "useradd "))]


def healthcheck(stage: list[Instruction], port: int) -> list[str]:
    """The command that asks a container how it is, for this Python and another port."""
    [instruction] = [instruction for instruction in stage if instruction.word == "HEALTHCHECK"]
    python, *arguments = json.loads(instruction.rest.partition("CMD ")[2])
    assert python == "python"
    return [sys.executable, *(argument.replace("8000", str(port)) for argument in arguments)]

"""Writes the lock files beside it: every package of an install, pinned. Run it by `make lock` after editing pyproject.

`serve.txt` is what serving needs; the files of other extras add theirs to it and hold what is new.
`peers.txt` stands alone: the engines that we are compared with live in a Python of their own. So do the clients of
`clients.txt`, which want other versions of what the tests have; what both can share, torch above all, is not in it.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PYPROJECT = HERE.parent.parent / "pyproject.toml"
SHARED = ("torch", "transformers", "tokenizers", "safetensors")  # the large ones


def resolve(requirements: list[str], constraints: dict[str, str]) -> dict[str, str]:
    """Package name -> version of everything that pip would install for these requirements in an empty environment."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}=={version}\n" for name, version in constraints.items())
        file.flush()
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        output = subprocess.run(
            [*command, "--report", "-", "--constraint", file.name, *requirements],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
    metadata = (entry["metadata"] for entry in json.loads(output)["install"])
    return {item["name"].lower().replace("_", "-"): item["version"].split("+")[0] for item in metadata}


def write(name: str, pins: dict[str, str], *, includes: tuple[str, ...] = ()) -> None:
    """One lock file."""
    lines = ["# Written by `make lock`. Do not edit.", *(f"-r {include}.txt" for include in includes)]
    lines += [f"{package}=={version}" for package, version in sorted(pins.items())]
    (HERE / f"{name}.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Resolve what serving needs, then each extra on top of it."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    serve = resolve(project["dependencies"], {})
    write("serve", serve)
    extras = project["optional-dependencies"]
    pinned = dict(serve)
    for name in ("train", "load", "trace", "test"):
        pins = resolve([*project["dependencies"], *extras[name]], pinned)
        write(name, {package: pins[package] for package in pins.keys() - serve.keys()}, includes=("serve",))
        pinned |= pins
    # In one go pip's resolver gives up on these; with the last one on top of the others it does not.
    first = resolve(extras["clients"][:-1], {package: pinned[package] for package in SHARED})
    clients = resolve(extras["clients"], first)
    write("clients", {package: version for package, version in clients.items() if pinned.get(package) != version})
    write("peers", resolve(extras["peers"], {}))


if __name__ == "__main__":
    main()

"""The Dockerfile: by its linter, by what the code expects of it, and by running its steps."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from service.app import AppArgs
from service.data_plane import cluster_environment
from tests.deploy.dockerfile import DOCKERFILE, ROOT, Instruction, environment, healthcheck, runs, stages

SCRIPTS = Path(sysconfig.get_path("scripts"))
TEXT = DOCKERFILE.read_text()
STAGES = stages(TEXT)


def lint(text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPTS / "hadolint", "-"], input=text, capture_output=True, text=True, check=False)


@pytest.mark.fast
def test_the_linter_finds_nothing():
    done = lint(TEXT)
    assert done.returncode == 0, done.stdout


@pytest.mark.fast
@pytest.mark.parametrize(
    ("line", "slip"),
    [
        ("g++=4:12.2.0-3", "g++"),
        (" --no-cache-dir", ""),
        ("FROM ${PYTHON} AS base", "FROM python:latest AS base"),
        ("WORKDIR /image/src", "WORKDIR image"),
        ('ENTRYPOINT ["attendant"]', "ENTRYPOINT attendant"),
        ("FROM base AS cuda", "FROM basic AS cpu"),
    ],
)
def test_the_linter_finds_a_slip(line: str, slip: str):
    assert line in TEXT
    assert lint(TEXT.replace(line, slip)).returncode == 1


@pytest.mark.fast
def test_rays_switches_are_those_that_the_code_would_print():
    here, image = str(SCRIPTS), "/usr/local/bin"
    expected = {
        name: value.replace(here, image) for name, value in cluster_environment(AppArgs().drain_seconds).items()
    }
    assert expected.items() <= environment(STAGES["base"]).items()


@pytest.mark.fast
@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_an_image_is_not_roots(image: str):
    users = [instruction.rest for instruction in STAGES[image] if instruction.word in ("USER", "RUN")]
    assert users[-1] == "10001:10001"
    assert any("--uid 10001" in instruction.rest for instruction in STAGES["base"])


@pytest.mark.fast
def test_both_images_install_the_same_but_for_torch():
    assert runs(STAGES["cpu"]) == runs(STAGES["cuda"])
    index = [instruction.rest for instruction in STAGES["cpu"] if instruction.word == "ARG"]
    assert index == ["PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu"]


@pytest.mark.fast
def test_the_interpreter_is_the_one_that_ci_locks_for():
    [version] = [i.rest for i in stages(TEXT)["wheel"] if i.word == "FROM"]
    assert version == "${PYTHON} AS wheel"
    assert "ARG PYTHON=python:3.11." in TEXT


def copied(stage: list[Instruction]) -> list[str]:
    return [source for i in stage if i.word == "COPY" for source in i.rest.split()[:-1]]


@pytest.mark.fast
def test_what_is_copied_is_there_and_reaches_the_builder():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    sources = copied(STAGES["wheel"])
    assert all((ROOT / source).exists() for source in sources)
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == set(sources)
    assert ignored[1] == "*"


@pytest.mark.fast
def test_every_package_of_the_project_is_copied():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= set(copied(STAGES["wheel"]))


@pytest.mark.fast
def test_the_health_check_fails_where_nothing_listens():
    assert subprocess.run(healthcheck(STAGES["base"], port=9), capture_output=True, check=False).returncode != 0


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean virtual environment in which every step of the CPU image has run, in folders of its own."""
    root = tmp_path_factory.mktemp("image")
    source, venv = root / "src", root / "venv"
    source.mkdir()
    for name in copied(STAGES["wheel"]):
        target = root / "serve.txt" if name.endswith("serve.txt") else source / name
        subprocess.run(["cp", "--recursive", ROOT / name, target], check=True)
    subprocess.run(["rm", "-rf", source / "model" / "kernels" / "cpu" / "build"], check=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables = clean | environment(STAGES["wheel"]) | {"PATH": f"{venv}/bin:{os.environ['PATH']}"}
    for command in [*runs(STAGES["wheel"]), *runs(STAGES["cpu"])]:
        script = command.replace("/image/", f"{root}/").replace(" --no-cache-dir", "")
        done = subprocess.run(
            ["bash", "-euc", script], cwd=source, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    return venv


def in_image(image: Path, *words: str) -> str:
    """What a command says there, with no compiler and nothing of this repository on its path."""
    environment = {"PATH": f"{image}/bin", "HOME": str(image.parent)}
    done = subprocess.run(words, cwd="/", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_steps_of_the_image_make_a_command_that_runs(image: Path):
    installed = in_image(image, f"{image}/bin/python", "-c", "import service; print(service.__file__)")
    assert installed.startswith(str(image))
    assert in_image(image, f"{image}/bin/attendant", "version").strip()
    assert in_image(image, f"{image}/bin/attendant-haproxy", "-v").startswith("HAProxy version")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_image_has_the_native_step_and_needs_no_compiler(image: Path):
    library = in_image(image, f"{image}/bin/python", "-c", "from model.kernels.cpu.build import build; print(build())")
    assert library.startswith(str(image))
    text = in_image(image, f"{image}/bin/attendant", "generate", "Once upon", "--dtype", "bf16", "--max-tokens", "5")
    assert text.startswith("Once upon")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_installed_that_the_lock_does_not_name(image: Path):
    listed = json.loads(in_image(image, f"{image}/bin/python", "-m", "pip", "list", "--format", "json"))
    lock = (ROOT / "deploy" / "lock" / "serve.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lock if "==" in line}
    assert {entry["name"].lower().replace("_", "-") for entry in listed} == pinned | {"attendant", "pip"}

"""Imports run one way: what attention is knows nothing of how it is served."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent

# Rooms in the order of the data. A file may import from its own room and from those before it, never from later ones.
ORDER = (
    "model.errors",
    "model.machine",
    "model.config",
    "model.config_json",
    "model.families",
    "model.directory",
    "model.tensor_file",
    "model.rotary",
    "model.layers",
    "model.cache",
    "model.kernels",
    "model.attention",
    "model.decoder",
    "model.checkpoint",
    "model.split",
    "model.kernels.cpu",
    "model.kernels.gpu",
    "model.sampling",
    "model.text",
    "model.engine",
    "model.parallel",
    "model.bench",
    "model.training",
    "service",
)
FOREIGN_TO_MODEL = {"ray", "fastapi", "starlette", "pydantic", "prometheus_client", "typer", "httpx", "locust"}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield node.module or ""


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def room(module: str) -> int | None:
    rooms = [i for i, name in enumerate(ORDER) if module == name or module.startswith(f"{name}.")]
    return max(rooms, key=lambda i: len(ORDER[i]), default=None)  # the narrowest: a house may hold several rooms


def product_files() -> list[Path]:
    files = [file for top in ("model", "service", "loadtest") for file in (ROOT / top).rglob("*.py")]
    assert len(files) > 20
    return files


def test_every_room_of_the_model_has_its_place_in_the_order():
    homeless = [
        name for file in product_files() if (name := module_name(file)).startswith("model.") and room(name) is None
    ]
    assert [name for name in homeless if name != "model.__init__"] == []


@pytest.mark.parametrize("file", product_files(), ids=module_name)
def test_imports_never_run_against_the_order(file: Path):
    own = room(module_name(file))
    for imported in imports(file):
        other = room(imported)
        if own is not None and other is not None:
            assert other <= own, f"{module_name(file)} imports {imported}, which comes after it"


@pytest.mark.parametrize("file", [f for f in product_files() if f.is_relative_to(ROOT / "model")], ids=module_name)
def test_the_model_needs_no_web_or_cluster_package(file: Path):
    assert not {name.split(".")[0] for name in imports(file)} & FOREIGN_TO_MODEL


@pytest.mark.parametrize("file", [f for f in product_files() if f.is_relative_to(ROOT / "loadtest")], ids=module_name)
def test_the_load_test_speaks_http_only(file: Path):
    assert not {name.split(".")[0] for name in imports(file)} & {"model", "service"}


@pytest.mark.parametrize(
    "file", [f for room in ("cache/blocks", "cache/prefix", "engine/scheduler", "engine/request")
             for f in [ROOT / "model" / f"{room}.py"]], ids=module_name
)  # fmt: skip
def test_scheduling_is_pure_python(file: Path):
    assert "torch" not in {name.split(".")[0] for name in imports(file)}

"""S11: what listens, and what our code can be made to execute."""

import ast
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.service.conftest import Running

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
# Ours with `weights_only=True`: the trainer reads what it wrote itself.
MAY_LOAD = {"model/training/pretrain.py", "model/training/compare.py"}


def product() -> list[Path]:
    files = [file for top in ("model", "service", "loadtest") for file in sorted((ROOT / top).rglob("*.py"))]
    assert len(files) > 100
    return files


def faults_in(source: str, file: str = "") -> list[str]:
    """What could execute what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS:
            found.append(f"from {node.module}")
        elif isinstance(node, ast.Call):
            found += _dangerous(node, file)
    return found


def _dangerous(call: ast.Call, file: str) -> list[str]:
    name, keywords = ast.unparse(call.func), {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name in FORBIDDEN_CALLS:
        return [name]
    if name == "torch.load" and not (keywords.get("weights_only") == "True" and file in MAY_LOAD):
        return [name]
    if "trust_remote_code" in keywords or keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
        return [name]
    return [name] if name.startswith("yaml.") and "safe" not in name else []


@pytest.mark.fast
@pytest.mark.parametrize("file", product(), ids=lambda file: str(file.relative_to(ROOT)))
def test_our_code_executes_nothing_that_it_reads(file: Path) -> None:
    name = str(file.relative_to(ROOT))
    assert faults_in(file.read_text(), name) == []


@pytest.mark.fast
@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "eval(text)",
        "torch.load(file)",
        "torch.load(file, weights_only=True)",
        "subprocess.run(command, shell=True)",
        "yaml.load(text)",
        "numpy.load(file, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert faults_in(source) != []


def is_rays_own(process: psutil.Process, port: int) -> bool:
    """Ray's processes, and the port by which Ray reaches each of its workers, ours among them."""
    words = process.cmdline()
    return "gcs_server" in words[0] or "raylet" in words[0] or words[0].startswith("ray::")


@pytest.mark.slow
def test_what_is_ours_listens_on_loopback_alone(service: Running) -> None:
    """HAProxy's statistics listened on every interface, as Serve writes its configuration; docs/reliability.md names
    the ports of Ray that still do.
    """
    everywhere, local = set(), set()
    for process in service.children():
        for connection in process.net_connections("inet"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            name = process.cmdline()[0].split("/")[-1].split("(")[0]
            address = ip_address(connection.laddr.ip)
            (local if address.is_loopback else everywhere).add((name, connection.laddr.port))
    print(sorted(everywhere), sorted(local))
    assert any(port == int(service.url.rsplit(":", 1)[1]) for _, port in local), "the service itself"
    assert [one for one in everywhere if "haproxy" in one[0]] == []
    assert everywhere == set()

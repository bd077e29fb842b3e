"""S11: what listens, and what our code can be made to execute."""

import ast
from ipaddress import ip_address
from pathlib import Path

import httpx
import psutil
import pytest

from tests.service.conftest import Running

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
MAY_LOAD = "model/training/pretrain.py"  # with `weights_only=True`: the trainer reads what it wrote itself


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
    if name == "torch.load" and not (keywords.get("weights_only") == "True" and file == MAY_LOAD):
        return [name]
    if "trust_remote_code" in keywords or keywords.get("shell") == "True" or keywords.get("allow_pickle") == "True":
        return [name]
    return [name] if name.startswith("yaml.") and "safe" not in name else []


@pytest.mark.fast
def test_our_code_executes_nothing_that_it_reads() -> None:
    found = {name: faults_in(file.read_text(), name) for file in product() if (name := str(file.relative_to(ROOT)))}
    assert {name: faults for name, faults in found.items() if faults} == {}


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


def listeners(running: Running) -> list[tuple[str, str, int]]:
    """(process, address, port) of everything that the service's processes listen on."""
    return [
        (Path(process.cmdline()[0]).name, connection.laddr.ip, connection.laddr.port)
        for process in running.children()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def answers_as_we_do(port: int) -> bool:
    """Whether our HTTP application is what is behind a port."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).json() == {"status": "ok"}
    except (httpx.HTTPError, ValueError):
        return False


@pytest.mark.slow
def test_what_is_ours_listens_on_loopback_alone(service: Running) -> None:
    """As Serve writes its configuration, HAProxy's statistics are for everybody. What Ray needs for itself still
    listens everywhere, and wants a token.
    """
    found = listeners(service)
    open_to_all = [(name, port) for name, address, port in found if not ip_address(address).is_loopback]
    ours = [port for _, address, port in found if ip_address(address).is_loopback and answers_as_we_do(port)]
    assert httpx.URL(service.url).port in ours
    assert len(ours) >= 2, "the ingress has a port of its own behind HAProxy's"
    assert [port for _, port in open_to_all if answers_as_we_do(port)] == []
    assert [name for name, _ in open_to_all if "haproxy" in name] == []

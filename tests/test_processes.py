"""How the processes of a server speak: never by pickle, never over a network. Read from the source alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for layer in ("server", "engine", "models", "configs", "kernels") for path in (ROOT / layer).rglob("*.py")
)
# What runs code of whoever wrote the bytes.
FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "xmlrpc", "telnetlib"}
FORBIDDEN_CALLS = {"eval", "exec", "send_pyobj", "recv_pyobj", "send_pickle", "trust_remote_code"}
HTTP_ONLY = {
    "server/commands/serve.py",
    "server/http/starting.py",
}  # the one listening socket, before and after the model is there


def relative_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_no_module_unpickles_or_evaluates_anything(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        elif isinstance(node, ast.Call):
            function = node.func
            names = {function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")}
            names = (names & FORBIDDEN_CALLS) - ({"eval"} if isinstance(function, ast.Attribute) else set())
            names |= {"torch.load"} if ast.unparse(function) == "torch.load" else set()
            names |= {
                f"{k.arg}=True"
                for k in node.keywords
                if k.arg == "trust_remote_code" and ast.unparse(k.value) != "False"
            }
            assert not names, f"{relative_name(path)}:{node.lineno}: {names}"
            continue
        else:
            continue
        assert not names & FORBIDDEN_IMPORTS, f"{relative_name(path)}:{node.lineno}"


def test_processes_speak_over_a_socket_in_the_file_system_alone():
    found = {relative_name(path): path.read_text() for path in MODULES}
    binding = {name for name, text in found.items() if re.search(r"\.bind\(|\.listen\(|start_server\(", text)}
    assert binding == HTTP_ONLY | {"engine/boundary/process_client.py"}
    spelled = {name for name, text in found.items() if "tcp://" in text}
    assert spelled == {"configs/kubernetes.py"}, "which knows the variables that Kubernetes adds"
    assert "ipc://{self._folder}/engine.sock" in found["engine/boundary/process_client.py"]

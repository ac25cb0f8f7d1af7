"""Imports run strictly downwards: server -> engine -> models -> kernels. `configs` is a leaf beside them.

Read from the source alone; nothing is imported.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "server": {"server", "benchmarks", "engine", "models", "kernels", "configs"},
    "benchmarks": {"benchmarks", "engine", "models", "configs"},  # `leyden bench`
    "engine": {"engine", "models", "kernels", "configs"},
    "models": {"models", "kernels", "configs"},
    "kernels": {"kernels"},
    "configs": {"configs"},
}
FOLDERS = [layer if layer != "benchmarks" else "benchmarks/load" for layer in MAY_IMPORT]
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute dotted names of everything a file imports, relative imports resolved against `leyden`, with lines."""
    package = ["leyden", *path.relative_to(ROOT).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module or "", node.lineno))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            if node.module:
                found.append((".".join([*base, node.module]), node.lineno))
            else:
                found += [(".".join([*base, alias.name]), node.lineno) for alias in node.names]
    return found


def is_absolute(path: Path, line: int) -> bool:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "lineno", None) == line]
    return any(isinstance(n, ast.Import) or (isinstance(n, ast.ImportFrom) and n.level == 0) for n in nodes)


def relative_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_layer_is_there():
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_imports_run_downwards(path):
    layer = path.relative_to(ROOT).parts[0]
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "leyden" and len(parts) > 1 and parts[1] != "__version__":
            assert parts[1] in MAY_IMPORT[layer], f"{relative_name(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=relative_name)
def test_imports_between_folders_are_relative(path):
    for name, line in imports(path):
        first = name.split(".")[0]
        assert first not in MAY_IMPORT, f"{relative_name(path)}:{line}: `import {name}` would load a second copy"
        assert first != "leyden" or not is_absolute(path, line), f"{relative_name(path)}:{line}: write it relative"


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=relative_name)
def test_kernels_know_tensors_alone(path):
    allowed = {
        "__future__",
        "collections",
        "dataclasses",
        "functools",
        "math",
        "os",
        "torch",
        "triton",
        "typing",
        "leyden",
    }
    assert {name.split(".")[0] for name, _ in imports(path)} <= allowed


TORCH_FREE = ["sampling_params", "sequence", "scheduling/scheduler", "memory/blocks", "memory/slots", "memory/plan",
              "startup/trial_steps", "messages", "outputs", "errors", "text/detokenizer", "text/tokenizer",
              "boundary/client", "async_llm", "boundary/process", "logs"]  # fmt: skip


@pytest.mark.parametrize("module", TORCH_FREE)
def test_these_need_no_torch(module):
    """Policy, text and the API process: `process` comes to torch when it runs, and tells errors before."""
    seen: set[Path] = set()
    pending = [ROOT / "engine" / f"{module}.py"]
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.parse(path.read_text()).body:  # at module level alone
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for name in (name for name, line in imports(path) if line == node.lineno):
                assert name.split(".")[0] not in ("torch", "transformers"), f"{relative_name(path)} imports {name}"
                target = ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py")
                if name.startswith("leyden.") and target.exists():
                    pending.append(target)


def test_no_module_is_named_like_a_package_it_needs():
    """The repository root may be on sys.path: a file there would shadow a library."""
    names = {path.stem for path in ROOT.glob("*.py")} - {"__init__", "conftest", "setup"}
    assert not names & set(sys.stdlib_module_names)

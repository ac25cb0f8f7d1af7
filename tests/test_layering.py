"""Imports run strictly downwards: server -> engine -> models -> kernels. `configs` is a leaf beside them.

Inside a layer they run in the order of its rooms, and no module imports itself through others. Read from the source
alone; nothing is imported.
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
ROOMS = {  # of a layer: folders and single files, each of which imports itself and those after it
    "server": "commands http routes responses_api answers door state metrics pages parsers wire errors off_loop",
    "engine": "llm async_llm boundary core collector startup sessions execution scheduling prefix memory sequence "
    "messages text outputs sampling_params errors logs",
    "models": "families decoder mixers layers loading forward_batch specs errors",
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


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
        "fla",  # optional, by `kernels/delta/fla.py`
        "functools",
        "itertools",
        "math",
        "os",
        "torch",
        "triton",
        "typing",
        "leyden",
    }
    assert {name.split(".")[0] for name, _ in imports(path)} <= allowed


def imported_modules(path: Path, *, at_import: bool) -> set[str]:
    """The project's own files that a file names in `from ... import`.

    `at_import`: without those inside functions, which run later; those for type checkers alone belong to both.
    """
    tree, package = ast.parse(path.read_text()), path.relative_to(ROOT).parent.parts
    late = {inner for node in ast.walk(tree) if isinstance(node, FUNCTIONS) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and not (at_import and node in late):
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [base, *([*base, alias.name] for alias in node.names)]
            stems = [ROOT.joinpath(*filter(None, name)) for name in names if any(name)]
            files = [file for stem in stems for file in (stem.with_suffix(".py"), stem / "__init__.py")]
            found |= {relative_name(file) for file in files if file.exists()}
    return found


def room_of(name: str) -> str:
    return Path(name).parts[1].removesuffix(".py")


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """The nodes that are left when those without a successor, or without a predecessor, are taken away."""
    left = {node: {other for other in others if other in graph and other != node} for node, others in graph.items()}
    while True:
        reached = {other for others in left.values() for other in others}
        ends = {node for node, others in left.items() if not others or node not in reached}
        if not ends:
            return set(left)
        left = {node: others - ends for node, others in left.items() if node not in ends}


def test_rooms_import_only_rooms_after_them():
    against = set()
    for path in MODULES:
        name = relative_name(path)
        layer, order = path.relative_to(ROOT).parts[0], ROOMS.get(path.relative_to(ROOT).parts[0], "").split()
        for imported in imported_modules(path, at_import=False) if order and path.stem != "__init__" else ():
            same_layer = Path(imported).parts[0] == layer and room_of(imported) != "__init__"
            if same_layer and order.index(room_of(name)) > order.index(room_of(imported)):
                against.add((name, imported))
    assert against == set(), "rooms import rooms before them"


def test_every_room_has_its_place_in_the_order():
    for layer, order in ROOMS.items():
        rooms = {room_of(relative_name(path)) for path in (ROOT / layer).rglob("*.py")} - {"__init__", "__main__"}
        assert rooms <= set(order.split()), layer


def test_no_module_imports_itself_through_others():
    names = {relative_name(path): path for path in MODULES}
    found = in_circles({name: imported_modules(path, at_import=True) for name, path in names.items()})
    assert found == set(), "these import each other"


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert in_circles(graph) == {"b", "c"}
    assert in_circles(graph | {"c": {"d"}}) == set()


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

"""The repository root is the package root: it works from there, and from an installed wheel somewhere else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import leyden
import pytest
from tiny_models import save_minimax

ROOT = Path(__file__).parents[1]
FOLDERS = ("configs", "kernels", "models", "engine", "server", "benchmarks/load")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(code: str, *, cwd: Path, **env: str) -> str:
    """What `python -c code` prints in `cwd`, which is first on sys.path there."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_leyden_loads_no_torch():
    code = "import sys, leyden; leyden.SamplingParams; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run(code, cwd=ROOT.parent) == "False False"


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing_here"):
        leyden.nothing_here  # noqa: B018
    assert set(leyden.__all__) == {"LLM", "SamplingParams", "__version__"}


def test_transformers_works_with_the_repository_root_on_the_path(tmp_path):
    """Our folder `kernels` answers to the name of a package that transformers probes for."""
    save_minimax(tmp_path, heads=2, layer_types=("linear_attention",))
    code = (
        "import sys, os; assert os.path.isdir(os.path.join(os.getcwd(), 'kernels'))\n"
        "from transformers import AutoTokenizer\n"
        f"print(len(AutoTokenizer.from_pretrained({str(tmp_path)!r})('hello').input_ids))"
    )
    assert run(code, cwd=ROOT, PYTHONPATH=str(ROOT)) == "5"


def test_every_package_is_listed():
    folders = {path.parent for layer in FOLDERS for path in (ROOT / layer).rglob("__init__.py")}
    packages = {"leyden"} | {"leyden." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert packages == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_changelog_and_version_are_in_step():
    changelog = ROOT / "CHANGELOG.md"
    if not changelog.exists():
        pytest.skip("no changelog yet")
    assert re.search(r"^## v?(\d+\.\d+\.\d+)", changelog.read_text(), re.MULTILINE)[1] == leyden.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree, so that nothing of the build stays in it."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "tools", "results")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    return out / run(code, cwd=source).splitlines()[-1]


def test_wheel_holds_every_module_preset_and_the_embedded_model(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for layer in FOLDERS:
        expected = {f"leyden/{path.relative_to(ROOT)}" for path in (ROOT / layer).rglob("*.py")}
        assert expected <= names, sorted(expected - names)
    for pattern in ("configs/*.yaml", "models/demo/*", "server/static/*"):
        expected = {f"leyden/{path.relative_to(ROOT)}" for path in ROOT.glob(pattern) if path.is_file()}
        assert expected <= names, sorted(expected - names)
    others = {name.split("/")[0] for name in names} - {"leyden", f"leyden-{leyden.__version__}.dist-info"}
    assert others == set(), "nothing but the package"
    assert not any("tests" in name or "__pycache__" in name for name in names)


def test_installed_wheel_runs_from_another_folder(wheel, tmp_path):
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:  # what installing into a folder does
        archive.extractall(target)
    where = (
        "import leyden; print(leyden.__file__); print(leyden.SamplingParams().max_tokens); print(leyden.__version__)"
    )
    file, max_tokens, version = run(where, cwd=elsewhere, PYTHONPATH=str(target)).splitlines()
    assert Path(file).is_relative_to(target) and (max_tokens, version) == ("16", leyden.__version__)
    module, function = PYPROJECT["project"]["scripts"]["leyden"].split(":")
    script = f"import sys; sys.argv = ['leyden', '--version']; from {module} import {function}; sys.exit({function}())"
    assert leyden.__version__ in run(script, cwd=elsewhere, PYTHONPATH=str(target))
    presets = "from leyden.configs.sources import load_settings as l; from pathlib import Path; import leyden\n"
    presets += "print(len([l({}, p, {}) for p in (Path(leyden.__file__).parent / 'configs').glob('*.yaml')]))"
    assert int(run(presets, cwd=elsewhere, PYTHONPATH=str(target))) == len(list((ROOT / "configs").glob("*.yaml")))


def test_lint_passes_in_a_folder_whose_name_is_no_name_of_python(tmp_path):
    """A ZIP of the sources unpacks to leyden-main. A package in small stands for the real one, to be quick."""
    tree = tmp_path / "leyden-main"
    for layer in (*FOLDERS, "tests"):
        (tree / layer).mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tree)
    for layer in (*FOLDERS, ""):
        (tree / layer / "__init__.py").write_text("from __future__ import annotations\n")
    wrong = [tree / layer / "wrong.py" for layer in FOLDERS]
    for path in wrong:
        path.write_text('PORT: int = "8000"\n')
    (tree / "tests" / "test_layering.py").write_text("def test_nothing():\n    pass\n")
    tools = Path(sys.executable).parent
    lint = ["make", "--old-file=install", f"BIN={tools}", "PYTHON=false", "lint"]
    found = subprocess.run(lint, cwd=tree, capture_output=True, text=True, timeout=120)
    assert found.returncode
    for path in wrong:
        where = f"{path.relative_to(tree)}:1: error: Incompatible types"
        assert where in found.stdout, "the types of every folder are checked"
        path.unlink()
    passed = subprocess.run(lint, cwd=tree, capture_output=True, text=True, timeout=120)
    assert passed.returncode == 0, passed.stdout + passed.stderr

"""The frame of the project: packages, layers, light imports, the wheel, the workflow, notebooks, sizes."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "lib").rglob("*.py"))
NOTEBOOKS = sorted([*(ROOT / "notebooks").glob("*/*.ipynb"), *(ROOT / "notebooks").glob("*.ipynb")])
RUNNING = {"claims", "parameters", "records", "pages", "run", "plots"}  # may import what they need to run
HEAVY = {"papermill", "dask", "distributed", "foolbox", "pyautoattack"}


def run(command, cwd, **env):
    """(exit status, output) of a command, run away from the repository's own import path."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1", **env})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of what a wheel is made of, so that building leaves no trace in the repository."""
    target = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".importlinter"):
        shutil.copy(ROOT / name, target)
    shutil.copytree(ROOT / "lib", target / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    return target


# --- packages and layers ------------------------------------------------------------------------------

def test_environment_lists_the_packages_of_pyproject():
    conda_name = {"torch": "pytorch", "build": "python-build"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {f"python{project['requires-python']}", "pip"}
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        name, version = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()
        wanted.add(conda_name.get(name, name) + version)
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {*conda, *pip["pip"]} == wanted | {"--editable ."}


def lint_imports(cwd):
    return run([sys.executable, "-c", "from importlinter.cli import lint_imports; "
                "raise SystemExit(lint_imports(no_cache=True))"], cwd, PYTHONPATH=str(cwd))


def test_layers_hold(copy):
    status, output = lint_imports(copy)
    assert status == 0, output


def test_layers_refuse_an_import_upwards(copy, tmp_path):
    shutil.copytree(copy, tmp_path / "broken")
    with (tmp_path / "broken" / "lib" / "data.py").open("a") as file:
        file.write("\n\ndef later():\n    import lib.run\n")
    status, output = lint_imports(tmp_path / "broken")
    assert status == 1 and "lib.data -> lib.run" in output


def test_models_and_training_import_light():
    light = [m.removesuffix(".__init__") for m in MODULES if m.split(".")[1] not in RUNNING]
    assert {"lib.data", "lib.models", "lib.train", "lib.theory"} <= set(light)
    code = f"import importlib, sys; [importlib.import_module(m) for m in {light}]; " \
           f"print('loaded', sorted({HEAVY} & set(sys.modules)))"
    status, output = run([sys.executable, "-c", code], ROOT)
    assert status == 0 and output.splitlines()[-1] == "loaded []", output


def test_wheel_installs_elsewhere(copy, tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)]
    status, output = run(build, tmp_path)
    assert status == 0, output
    wheel, = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    assert packed == {m.replace(".", "/") + ".py" for m in MODULES}
    target = tmp_path / "target"
    status, output = run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet",
                          "--target", str(target), str(wheel)], tmp_path)
    assert status == 0, output
    packages = [m.removesuffix(".__init__") for m in MODULES if m.endswith(".__init__")]
    code = f"import {', '.join(packages)}, lib.data; print(lib.data.__file__)"
    status, output = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(target))
    assert status == 0 and output.strip() == str(target / "lib" / "data.py"), output


# --- workflow -----------------------------------------------------------------------------------------

def test_yaml_is_tidy():
    files = [".github", ".yamllint", "environment.yml", "CITATION.cff"]
    status, output = run([sys.executable, "-m", "yamllint", "--strict", *files], ROOT)
    assert status == 0, output


def test_workflow_calls_ci_run_and_nothing_of_its_own():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    triggers = workflow[True]  # YAML 1.1 reads the key `on` as true
    assert "push" in triggers and len(triggers["schedule"]) == 1
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["bash .ci/run"]
    assert all(step["uses"].startswith("actions/") for step in steps if "run" not in step)
    assert (ROOT / ".ci" / "run").is_file()


# --- notebooks ----------------------------------------------------------------------------------------

def faults(notebook: dict) -> list[str]:
    """What is wrong with a committed notebook, one line for each fault."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = []
    if not any(cell["outputs"] for cell in code) or any(cell["execution_count"] is None for cell in code):
        found.append("not executed")
    if any(output["output_type"] == "error" for cell in code for output in cell["outputs"]):
        found.append("stores an error")
    if any({"papermill", "execution"} & set(part["metadata"]) for part in (notebook, *cells)):
        found.append("papermill or execution metadata")
    ids = [cell.get("id") for cell in cells]
    if None in ids or len(set(ids)) < len(ids):
        found.append("cell ids missing or repeated")
    if sum("parameters" in cell["metadata"].get("tags", []) for cell in code) != 1:
        found.append("not exactly one cell tagged parameters")
    for cell in code:
        source = "".join(cell["source"])
        if len(source.splitlines()) > 30:
            found.append(f"cell over 30 lines: {cell.get('id')}")
        for node in ast.walk(ast.parse(re.sub(r"(?m)^\s*[%!].*", "", source))):
            definition = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            if definition and node.end_lineno - node.lineno >= 12:
                found.append(f"{node.name} over 12 lines, does it belong in lib?")
    return found


def names(sources, context):
    """The names that pieces of code bind (ast.Store, arguments of a lambda too) or read (ast.Load)."""
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)} if context is ast.Store else set()
    return arguments | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def leaks(notebook):
    """What cells tagged `figure` bind and others read without binding it themselves.

    Such cells do not count for staleness, so a result must not pass through them.
    """
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    drawing = ["".join(c["source"]) for c in code if "figure" in c["metadata"].get("tags", [])]
    rest = ["".join(c["source"]) for c in code if "figure" not in c["metadata"].get("tags", [])]
    return (names(drawing, ast.Store) & names(rest, ast.Load)) - names(rest, ast.Store)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_cells_that_only_draw_hand_nothing_on(path):
    assert leaks(json.loads(path.read_text())) == set()


def test_leaks_are_found():
    drawing = cell("y = 2 * x", metadata={"tags": ["figure"]})
    assert leaks({"cells": [cell("x = 1"), drawing, cell("print(y)")]}) == {"y"}


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_notebook(path):
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert faults(notebook) == []


def cell(source, **changes):
    return {"id": "a", "cell_type": "code", "metadata": {"tags": ["parameters"]}, "execution_count": 1,
            "outputs": [{"output_type": "stream"}], "source": source, **changes}


@pytest.mark.parametrize("fault, cells", [
    (None, [cell("%matplotlib inline\nx: int = 1")]),
    ("not executed", [cell("x", execution_count=None)]),
    ("not executed", [cell("x", outputs=[])]),
    ("error", [cell("x", outputs=[{"output_type": "error"}])]),
    ("papermill", [cell("x", metadata={"tags": ["parameters"], "papermill": {}})]),
    ("ids", [cell("x"), cell("y", metadata={})]),
    ("tagged parameters", [cell("x", metadata={})]),
    ("over 30 lines", [cell("\n".join(["x"] * 31))]),
    ("over 12 lines", [cell("def f():\n" + "    x\n" * 12)]),
])
def test_faults_are_found(fault, cells):
    found = faults({"metadata": {}, "cells": cells})
    assert found == [] if fault is None else len(found) == 1 and fault in found[0]


# --- sizes, and what must not be needed ---------------------------------------------------------------

def code_lines(source):
    """Lines that are neither blank nor comment nor docstring."""
    told = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.split("#")[0].strip()) for number, line in enumerate(source.splitlines(), 1) if number not in told)


def test_code_lines_are_counted():
    assert code_lines('"""Told\nover two."""\n\n# why\nx = 1  # why\n\n\ndef f():\n    """Told."""\n    return x\n') == 3


def test_lib_stays_small():
    """About 4,000 lines of code were planned for all; models that are no flow and a reader's own on trial take the rest.
    What explains them is not rationed."""
    tracked = subprocess.check_output(["git", "ls-files", "lib/*.py"], cwd=ROOT, text=True).split()
    source = {name: (ROOT / name).read_text() for name in tracked}
    assert sum(len(source[name].splitlines()) for name in ("lib/claims.py", "lib/run.py")) <= 900
    lines = {name: code_lines(text) for name, text in source.items()}
    assert sum(lines.values()) <= 4400, json.dumps(lines, indent=1)


def test_nothing_needs_the_shared_folder():
    shared = [b"../" + b"shared", b"work/" + b"shared"]
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    files = [ROOT / name for name in tracked if name and (ROOT / name).is_file()]
    assert files and [p.name for p in files if any(s in p.read_bytes() for s in shared)] == []

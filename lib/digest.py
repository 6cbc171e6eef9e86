"""One digest for stale results and for trained models: of values, and of the code in `lib` they were made by.

Code counts by its syntax tree without docstrings: a comment or a docstring changes nothing, an edit that
matters does. The tree is written out here, not by `ast.dump`, whose text differs between Python versions.
"""

import ast
import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Drawing, judging and running cannot change a number.
EXEMPT = ("lib.plots", "lib.claims", "lib.measure", "lib.records", "lib.parameters", "lib.run", "lib.pages")


def digest(value) -> str:
    """SHA-256 (hex) of plain values (numbers, strings, lists, dictionaries), as JSON with sorted keys.

    Raises TypeError for anything else: what has no canonical text has no digest.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def syntax(source: str) -> str:
    """Digest of a piece of Python by its syntax tree without docstrings; SyntaxError if it is no Python."""
    return digest(_plain(ast.parse(source)))


def _plain(node):
    """A syntax tree as nested lists, empty fields left out."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    filled = ([name, _plain(value)] for name, value in fields.items() if value not in (None, []))
    return [type(node).__name__, *filled]


def _file(module: str) -> Path | None:
    """Source file of a module of lib; None if there is no such module."""
    path = ROOT.joinpath(*module.split(".")[1:])
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def modules_of(source: str, package: str = "lib") -> set[str]:
    """The modules of lib that a piece of code imports; `package` resolves relative imports."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            # `from lib import data` may name a module or a thing inside one: both are tried below
            names.update([origin, *(f"{origin}.{alias.name}" for alias in node.names)])
    return {name for name in names if name.split(".")[0] == "lib" and name != "lib" and _file(name)}


def module_digests(modules) -> dict[str, str]:
    """{module: digest} of the given modules of lib and all they import, transitively, without EXEMPT.

    A submodule brings its packages' `__init__`. Raises ValueError for a module that is not in lib.
    """
    found, queue = {}, list(modules)
    while queue:
        module = queue.pop()
        if module in found or module in EXEMPT:
            continue
        file = _file(module)
        if file is None:
            raise ValueError(f"modules must be modules of lib, got {module!r}")
        source = file.read_text(encoding="utf-8")
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = syntax(source)
        queue.extend(modules_of(source, package))
        if package != "lib":
            queue.append(package)
    return found

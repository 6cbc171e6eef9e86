"""lib.digest: comments and docstrings do not count, edits do, imports are followed."""

import shutil
import subprocess
import sys

import pytest

from lib import digest as d

SOURCE = '''
"""Module."""
import math
def area(r):
    """Area."""
    return math.pi * r**2  # formula
'''


def test_comment_docstring_and_layout_do_not_count():
    bare = "import math\ndef area(r):\n\n    return (math.pi *\n            r**2)\n"
    assert d.syntax(SOURCE) == d.syntax(bare)


@pytest.mark.parametrize("old, new", [("r**2", "r**3"), ("math.pi", "math.tau"), ("area", "region"), ("* r", "+ r")])
def test_an_edit_counts(old, new):
    assert d.syntax(SOURCE) != d.syntax(SOURCE.replace(old, new))


def test_a_string_that_is_no_docstring_counts():
    assert d.syntax("x = 'a'") != d.syntax("x = 'b'")
    assert d.syntax("def f():\n    return None") != d.syntax("def f():\n    return 0")


def test_digest_is_canonical_and_refuses_the_rest():
    assert d.digest({"a": 1, "b": [2.5, None]}) == d.digest({"b": (2.5, None), "a": 1})
    assert d.digest({"a": 1}) != d.digest({"a": 2}) and d.digest(1) != d.digest("1")
    with pytest.raises(TypeError):
        d.digest({"a": {1, 2}})


def test_modules_of_all_ways_to_import():
    code = ("import numpy\nfrom lib import train, plots\nfrom lib.models.glow import ConditionalGlow\n"
            "import lib.models.flow as f\ndef g():\n    from lib.digest import digest\n")
    assert d.modules_of(code) == {"lib.train", "lib.plots", "lib.models.glow", "lib.models.flow", "lib.digest"}
    assert d.modules_of("from .flow import x\nfrom . import glow", package="lib.models") >= {
        "lib.models.flow", "lib.models.glow"}


@pytest.fixture
def copy_of_lib(tmp_path, monkeypatch):
    root = tmp_path / "lib"
    shutil.copytree(d.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(d, "ROOT", root)
    return root


def test_imports_are_followed_and_exempt_ones_are_not(copy_of_lib):
    (copy_of_lib / "top.py").write_text("from lib import plots\nfrom lib.models import glow\nimport lib.claims\n")
    before = d.module_digests(["lib.top"])
    assert {"lib.top", "lib.models", "lib.models.glow", "lib.models.flow", "lib.models.protocol"} <= set(before)
    assert not {"lib.plots", "lib.claims", "lib.run"} & set(before)

    flow = copy_of_lib / "models" / "flow.py"
    text = flow.read_text()
    flow.write_text("# a comment\n" + text)
    assert d.module_digests(["lib.top"]) == before
    flow.write_text(text.replace("logsigmoid(h + 2)", "logsigmoid(h + 3)"))
    after = d.module_digests(["lib.top"])
    assert {m for m in before if before[m] != after[m]} == {"lib.models.flow"}


def test_unknown_module_is_named():
    with pytest.raises(ValueError, match="lib.nothing"):
        d.module_digests(["lib.nothing"])


def test_light_import():
    code = "import sys, lib.digest; assert not {'torch', 'papermill', 'dask', 'distributed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

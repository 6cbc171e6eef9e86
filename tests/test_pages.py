"""The generated parts of the book, on made-up rows: nothing is lost, counted twice, or left dangling."""
import csv
import io
import json
import re
from pathlib import Path

import pytest
import yaml

from lib import claims, pages, records

ROOT = claims.project_root()


def made_up(i, row):
    """A row with one of the seven verdicts; only claims with a rule can be decided."""
    has_rule = "rule" in claims.claim(row["paper"], row["id"])
    verdict = claims.VERDICTS[i % 7 if has_rule else 5 + i % 2]
    decided = verdict not in ("cited", "not-run")
    row = row | {"verdict": verdict, "reason": "the | reason <b>" if verdict in ("fails", "undecided") else ""}
    found = {"evidence": "theorem", "notebook": "fetaya2020/annulus", "n": 7, "interval": [0.0, 1.5]}
    return row | {key: value if decided else None for key, value in found.items()}


@pytest.fixture(scope="module")
def rows():
    """The ledger's rows with made-up verdicts, each of the seven among them."""
    rows = [made_up(i, row) for i, row in enumerate(claims.scoreboard({}))]
    assert {row["verdict"] for row in rows} == set(claims.VERDICTS)
    return rows


@pytest.fixture
def generated(rows, tmp_path, monkeypatch):
    """What `generate` writes, in a project without executed notebooks."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "claims").symlink_to(ROOT / "book" / "claims")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(claims, "project_root", lambda: tmp_path)
    pages.generate(rows)
    return tmp_path / "_build" / "generated"


def test_every_included_file_is_generated(generated):
    wanted = {name for page in (ROOT / "book").glob("*.md")
              for name in re.findall(r"_build/generated/([\w.]+)", page.read_text())}
    assert wanted == {file.name for file in generated.iterdir()}
    assert all(file.stat().st_size < 2_000_000 for file in generated.iterdir())


def test_json_and_csv_carry_all_rows(generated, rows):
    document = json.loads((generated / "scoreboard.json").read_text())
    assert document["claims"] == json.loads(json.dumps(rows))
    assert document["counts"] == claims.counts(rows)
    lines = list(csv.DictReader(io.StringIO((generated / "scoreboard.csv").read_text())))
    for name in ("paper", "id", "verdict"):
        assert [r[name] for r in lines] == [r[name] for r in rows]
    assert [r["high"] for r in lines] == ["1.5" if r["interval"] else "" for r in rows]


def test_counts_add_up(rows):
    text = pages.verdict_table(claims.counts(rows)["papers"])
    body = [[int(x.strip().replace("·", "0")) for x in line.split("|")[2:-1]] for line in text.splitlines()
            if line.startswith(("| <span", "| all"))]
    assert len(body) == len(claims.VERDICTS) + 1
    assert [sum(column) for column in zip(*body[:-1])] == body[-1]
    assert sum(body[-1]) == len(rows)


def test_scoreboard_has_a_row_for_each_claim_and_a_choice_for_each_value(rows):
    text = pages.scoreboard_html(rows, {})
    names = ("paper", "kind", "verdict", "evidence")
    data = re.findall("<tr " + " ".join(f'data-{name}="(.*?)"' for name in names) + ">", text)
    assert data == [tuple(r[name] or "" for name in names) for r in rows]
    assert {value for line in data for value in line} <= {"", *re.findall(r"<option>(.*?)</option>", text)}
    assert "the | reason &lt;b&gt;" in text


def test_every_erratum_appears_once_with_its_own_anchor(rows):
    text = pages.errata_page(rows, {})
    ids = re.findall(r"^\((erratum-[^)]*)\)=$", text, re.M)
    there = [(p, e["id"], k) for p in pages.papers() for e in claims.ledger(p)["claims"]
             for k in range(1, len(e.get("erratum", [])) + 1)]
    assert ids == [pages.anchor("erratum", *where) for where in there]
    assert len(set(ids)) == len(ids) > 0
    for paper in pages.papers():
        for entry in claims.ledger(paper)["claims"]:
            assert all(pages.md(x["printed"]) in text and pages.md(x["corrected"]) in text
                       for x in entry.get("erratum", []))


def test_anchors_do_not_move_when_errata_are_added():
    assert pages.anchor("erratum", "pope2020", "thm3.1.optimal_l2_attack", 2) \
        == "erratum-pope2020-thm3-1-optimal-l2-attack-2"


def test_a_measured_erratum_shows_both_forms(rows):
    atom = {"q": "a", "says": "a is small", "by": "exact", "n": 3, "low": 0.25, "high": 0.5, "estimate": 0.3,
            "allowed": [0.0, 1.0], "outcome": "holds", "erratum": 1}
    printed = atom | {"says": "as printed: b_1 is small", "low": 2.0, "high": 3.0, "outcome": "fails",
                      "erratum": 2}
    source = {"notebook": "fetaya2020/annulus", "headings": {"A section"},
              "result": {"section": "A section", "when": [], "atoms": [atom], "printed": [printed]}}
    row = next(r for r in rows if r["notebook"])
    text = pages.measured_erratum(row, source, 2)
    assert "b\\_1 is small: 2 … 3, allowed 0 … 1, **fails**" in text and "1 of 1 tests hold" in text
    assert 'href="../notebooks/fetaya2020/annulus.html#a-section"' in text
    assert pages.measured_erratum(row, source, 1) == "" == pages.measured_erratum(row, None, 1)


def test_a_yes_or_no_test_is_told_in_words():
    told = [pages.reading(low, high, [1.0, 1.0]) for low, high in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0))]
    assert told == ["true", "not always true", "not true"]
    assert pages.reading(0.0, 1.0, [0.0, 2.0]) == "0 … 1, allowed 0 … 2"


def test_failures_are_told_with_their_reason(rows):
    text = pages.failed_page(rows, {})
    for slug in ("fails", "undecided"):
        assert text.count(f'class="verdict {slug}"') == sum(r["verdict"] == slug for r in rows)
    assert "the \\| reason \\<b\\>" in text
    assert "Claims that fail (0)" in pages.failed_page(claims.scoreboard({}), {})


def test_summary_tells_the_age_of_the_oldest_run(rows):
    runs = {(name, "executed"): {"date": f"2026-0{month}-01T00:00:00+00:00"}
            for name, month in (("b", 2), ("c", 1))}
    assert 'datetime="2026-01-01T00:00:00+00:00"' in pages.summary(claims.counts(rows), runs)
    assert "0 have a verdict" in pages.summary(claims.counts(claims.scoreboard({})), {})


def test_parameter_tables_show_what_is_enforced():
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]},
            "source": ["x: int | None = None  # how many; in [1, inf)\n"]}
    text = pages.parameter_tables({"a/b": {"cells": [cell]}})
    line = next(li for li in text.splitlines() if "`x`" in li)
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert cells == ["`x`", "`int \\| None`", "`None`", "how many", "in \\[1, inf\\)"]


@pytest.mark.parametrize("text", ["a_b *c* [d](e) $x$ `q` <b> | ~ ^", "# not a heading", "p(x|y) <= {cite}`x`"])
def test_plain_text_survives_markdown(text):
    from markdown_it import MarkdownIt
    inline = MarkdownIt("commonmark").parse(pages.md(text))[1]
    assert [child.type for child in inline.children] == ["text"] and inline.children[0].content == text


def test_toc_names_files_that_exist_and_all_chapters():
    files = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
    assert all(any((ROOT / f"{name}{suffix}").exists() for suffix in (".md", ".ipynb")) for name in files)
    assert {f"notebooks/{name}" for name in records.notebooks()} <= set(files)
    assert {f"book/{page.stem}" for page in (ROOT / "book").glob("*.md")} <= set(files)


def test_the_book_loads_nothing_from_a_network():
    ours = [*(ROOT / "book" / "_static").iterdir(), *(ROOT / "book" / "_ext").glob("*.py")]
    assert not [file for file in ours if re.search(r"https?://|@import|url\(", file.read_text())]
    assert "sphinx-mathjax-offline" in (ROOT / "_config.yml").read_text()


def test_the_build_is_strict():
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["sphinx"]["config"]["nb_execution_raise_on_error"] is True
    assert config["only_build_toc_files"] and {".*", "_build"} <= set(config["exclude_patterns"])
    assert config["repository"]["url"] == "" or config["repository"]["url"].startswith("https://")


def test_every_citation_is_in_the_bibliography():
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "book" / "references.bib").read_text(), re.M))
    texts = [page.read_text() for page in (ROOT / "book").glob("*.md")]
    texts += [Path(records.path("source", name)).read_text() for name in records.notebooks()]
    cited = {key for text in texts for group in re.findall(r"\{cite:\w+\}`([\w,]+)`", text)
             for key in group.split(",")}
    assert cited <= keys and set(claims.papers()) <= keys


def test_the_examples_of_how_to_extend_work():
    text = (ROOT / "book" / "extend.md").read_text()
    entry, = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    claims.check_rule(entry)
    names = {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "class" in code), names)
    torch = names["torch"]
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-8, 8, 161)] * 2, indexing="ij"), -1).reshape(-1, 2)
    scores = names["TwoGaussians"](torch.tensor([[0., 0.], [1., 1.]]))(grid)
    assert scores.shape == (len(grid), 2)
    # p(x, y) integrates to 1 over the plane and both classes; a cell of the grid has area 0.1^2
    assert scores.exp().sum().item() * 0.01 == pytest.approx(1, abs=1e-4)

"""Parameters, execution, sweeps and the command line, on tiny notebooks in a throw-away project."""
import json
import shutil
import subprocess
import sys

import nbformat as nbf
import pytest

from lib import claims, records, run
from lib.parameters import ParameterError, check, parameters

RULE = {"tier": "fast", "by": "seeds", "n": 5, "data": ["digits"], "atoms": [{"q": "gain", "in": [0, 10]}]}
EXACT = {"tier": "fast", "by": "exact", "atoms": [{"q": "radius", "in": [0, 10]}]}
PARAMETERS = """\
epsilon: float = 0.1  # radius; in (0, inf)
dimension: "int | None" = None  # dimension; in [1, inf)
lam: float = 0.5  # mixing weight; in [0, 1]
device: str = "cpu"  # where; one of cpu | cuda | cuda:N
names: list = ["a"]  # things; one of a | b | folder:PATH
seed: int = 0  # random seed; in [0, inf)
label: str = "x"  # any text
"""


def notebook(*sources, seed="s"):
    cells = [nbf.v4.new_markdown_cell("# A page", id="title"), nbf.v4.new_code_cell(PARAMETERS, id="parameters")]
    cells[1].metadata["tags"] = ["parameters"]
    cells += [nbf.v4.new_code_cell(s, id=f"cell-{i}") for i, s in enumerate(sources)]
    return json.loads(nbf.writes(nbf.v4.new_notebook(cells=cells)))


SETTLES = 'from lib.claims import settle\nsettle({"gain": {"gain": 1.0 + seed}, "exact": {"radius": epsilon}}, section="s")'


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one paper of two claims and one notebook; REPRO variables and the working folder are its own."""
    (tmp_path / "book" / "claims").mkdir(parents=True)
    entries = [{"id": i, "kind": "trend", "where": "here", "says": "made up", "rule": r} for i, r in (("gain", RULE), ("exact", EXACT))]
    (tmp_path / "book" / "claims" / "paper.yaml").write_text(json.dumps({"key": "paper", "claims": entries}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(records.Path(claims.__file__).parent.parent))
    put(tmp_path, SETTLES)
    return tmp_path


def put(root, *sources):
    records.write(root / "notebooks" / "paper" / "page.ipynb", notebook(*sources))


# ---------------------------------------------------------------- parameters

def test_parameters_are_read_from_the_cell():
    found = parameters(notebook())
    assert list(found) == ["epsilon", "dimension", "lam", "device", "names", "seed", "label"]
    assert (found["epsilon"].meaning, found["epsilon"].allowed) == ("radius", "in (0, inf)")
    assert found["label"].allowed == "" and found["label"].meaning == "any text"


def test_values_are_parsed_by_type():
    given = {"epsilon": "1e-3", "dimension": "22", "device": "cuda:1", "names": "[a, 'folder:/x']", "seed": "3", "label": "5"}
    assert check(notebook(), given) == {"epsilon": 1e-3, "dimension": 22, "device": "cuda:1", "names": ["a", "folder:/x"],
                                        "seed": 3, "label": "5"}
    assert check(notebook(), {"dimension": "None", "epsilon": "2"}) == {"dimension": None, "epsilon": 2.0}


@pytest.mark.parametrize("name, value, allowed", [
    ("epsilon", "-0.1", "in (0, inf)"), ("epsilon", "0", "in (0, inf)"), ("epsilon", "nan", "in (0, inf)"),
    ("dimension", "0", "in [1, inf)"), ("lam", "1.5", "in [0, 1]"), ("lam", "-0.5", "in [0, 1]"), ("seed", "-1", "in [0, inf)"),
    ("device", "gpu", "one of cpu"), ("device", "cuda:x", "one of cpu"), ("names", "[a, c]", "one of a"),
    ("dimension", "2.5", "int | None"), ("seed", "many", "int"), ("names", "a", "list")])
def test_a_bad_value_gets_one_line_with_name_value_and_allowed(name, value, allowed):
    with pytest.raises(ParameterError) as error:
        check(notebook(), {name: value})
    text = str(error.value)
    assert name in text and allowed in text and value.strip("[]").split(", ")[-1] in text and "\n" not in text


def test_a_mistyped_name_is_refused():
    with pytest.raises(ParameterError, match="parameter must be one of epsilon, .*, got 'epsilonn'"):
        check(notebook(), {"epsilonn": "1"})


# ---------------------------------------------------------------- one run

def test_run_writes_notebook_and_manifest_and_judges(project, capsys):
    run.run_notebook("paper/page", {})
    assert records.current("paper/page")
    record = records.read(records.path("executed", "paper/page", ".json"))
    assert {"commit", "parameters", "seconds", "machine", "versions", "parts", "date"} <= set(record)
    out = capsys.readouterr().out
    assert "paper/exact: holds" in out and "paper/gain: undecided (one seed)" in out and "not timed yet" in out
    run.run_notebook("paper/page", {})
    assert "last took" in capsys.readouterr().out


def test_other_parameters_leave_the_page_alone(project):
    run.run_notebook("paper/page", {})
    before = records.path("executed", "paper/page").read_text()
    run.run_notebook("paper/page", {"epsilon": "0.5"})
    assert records.path("executed", "paper/page").read_text() == before
    other, = (project / "_build" / "runs" / "paper").glob("*.ipynb")
    assert claims.read_settled(other)["paper/exact"]["atoms"][0]["estimate"] == 0.5


def test_a_failing_notebook_fails_every_time(project):
    put(project, "1 / 0")
    for _ in range(2):
        with pytest.raises(run.RunError, match="ZeroDivisionError"):
            run.execute_all()
    assert not records.path("executed", "paper/page").exists()


def test_a_comment_keeps_a_run_current_and_an_edit_does_not(project):
    run.run_notebook("paper/page", {})
    put(project, "# a remark\n" + SETTLES)
    assert records.current("paper/page")
    put(project, SETTLES + "\nx = 1")
    assert not records.current("paper/page")
    assert records.changed(records.read(records.path("executed", "paper/page", ".json")), "paper/page") == "code cells"


# ---------------------------------------------------------------- sweeps and records

def test_sweep_skips_finished_points_and_its_record_decides(project, monkeypatch):
    run.sweep("paper/page", {}, {"seed": ["0", "1", "2", "3", "4"]})
    points = sorted((project / "_build" / "sweeps" / "paper" / "page").glob("*.ipynb"))
    times = [p.stat().st_mtime_ns for p in points]
    assert len(points) == 5
    points[0].unlink()
    run.sweep("paper/page", {}, {"seed": ["0", "1", "2", "3", "4"]})
    assert [p.stat().st_mtime_ns for p in points][1:] == times[1:] and points[0].exists()
    run.run_notebook("paper/page", {})
    with pytest.raises(run.RunError, match="took the new sweeps of paper/page"):     # the page does not show it yet
        run.accept()
    run.run_notebook("paper/page", {})
    run.accept()
    rows = {r["id"]: r for r in claims.scoreboard(records.sources())}
    assert rows["gain"]["verdict"] == "holds" and rows["gain"]["n"] == 5
    assert rows["gain"]["record"] == "book/records/seeds/paper/page.csv"
    assert records.flips(list(rows.values())) == []
    edited = records.read(records.path("source", "paper/page"))
    edited["cells"][-1]["source"] += "\nx = 1"     # an edit that matters: the record no longer counts, and says why
    records.write(records.path("source", "paper/page"), edited)
    rows = {r["id"]: r for r in claims.scoreboard(records.sources())}
    assert rows["gain"]["verdict"] == "not-run" and "code cells" in rows["gain"]["reason"]
    # a rule that needs what was not recorded: the page says so, and runs
    ledger = json.loads((project / "book/claims/paper.yaml").read_text())
    ledger["claims"][0]["rule"]["atoms"].append({"q": "loss", "in": [0, 1]})
    (project / "book/claims/paper.yaml").write_text(json.dumps(ledger))
    monkeypatch.setenv("REPRO_NOTEBOOK", "paper/page")
    records.show_record()
    assert "code cells, rules" in records.behind("paper/page")[0]


def summary(project, axes, seeds, **changes):
    """A sweep's table and manifest as if it had run."""
    folder = project / "_build" / "sweeps" / "paper" / "page"
    rows = [f"{s},paper/gain,gain,{s}" for s in seeds]
    records.write(folder / f"{'-'.join(axes)}.csv", "seed,claim,name,value\n" + "\n".join(rows) + "\n")
    sweep = {"seed": seeds, **{a: ["none"] for a in axes if a != "seed"}}
    records.write(folder / f"{'-'.join(axes)}.json", {"sweep": sweep, "parameters": {}, "points": len(seeds), "seconds": 1.0,
                                                          "machine": "here", "date": "2026-01-01", "commit": "", "deviations": [],
                                                          "parts": records.parts("paper/page", {})} | changes)


@pytest.mark.parametrize("axes, seeds, changes, taken", [
    (["seed"], [0, 1, 2, 3, 4], {}, True), (["seed"], [7], {}, False), (["seed"], [11, 12, 13, 14, 15], {}, False),
    (["control", "seed"], [0, 1, 2, 3, 4], {}, True), (["epsilon", "seed"], [0, 1, 2, 3, 4], {}, False),
    (["seed"], [0, 1, 2, 3, 4], {"parameters": {"epsilon": 2}}, False), (["seed"], [0, 1, 2, 3, 4], {"parts": {}}, False)])
def test_only_the_whole_sweep_of_the_unchanged_page_becomes_a_record(project, axes, seeds, changes, taken):
    summary(project, axes, seeds, **changes)
    assert run._accept_sweep("paper/page") == taken == records.path("seeds", "paper/page", ".csv").exists()


def test_a_record_runs_at_the_length_that_its_seeds_file_says(project):
    extra = project / "notebooks" / "paper" / "page.seeds.yaml"
    extra.write_text("epsilon: 0.5")
    run.sweep("paper/page", {}, {"seed": ["0", "1", "2", "3", "4"]})
    assert run._accept_sweep("paper/page")
    point, *_ = (project / "_build" / "sweeps" / "paper" / "page").glob("[0-9a-f]*.ipynb")
    assert claims.read_settled(point)["paper/exact"]["atoms"][0]["estimate"] == 0.5     # the page itself says 0.1
    assert records.seeds_table("paper/page")[1] == ""
    extra.write_text("epsilon: 0.6")
    assert records.seeds_table("paper/page")[1] == "parameters of the recorded sweep"
    assert not run._accept_sweep("paper/page")


def test_a_record_with_a_control_is_not_replaced_by_one_without(project):
    summary(project, ["control", "seed"], [0, 1, 2, 3, 4])
    assert run._accept_sweep("paper/page")
    summary(project, ["seed"], [0, 1, 2, 3, 4, 5])
    (project / "_build" / "sweeps" / "paper" / "page" / "control-seed.json").unlink()
    assert not run._accept_sweep("paper/page")


def test_outputs_of_an_edited_notebook_are_no_evidence(project):
    run.run_notebook("paper/page", {})
    run.accept()
    shutil.rmtree(project / "_build")
    assert next(r for r in claims.scoreboard(records.sources()) if r["id"] == "exact")["verdict"] == "holds"
    edited = records.read(records.path("source", "paper/page"))
    edited["cells"][-1]["source"] += "\nx = 1"
    records.write(records.path("source", "paper/page"), edited)
    row = next(r for r in claims.scoreboard(records.sources()) if r["id"] == "exact")
    assert (row["verdict"], row["reason"]) == ("not-run", "stale: code cells")


def test_a_run_with_other_parameters_is_not_judged_by_the_record(project, capsys):
    summary(project, ["seed"], [0, 1, 2, 3, 4])
    assert run._accept_sweep("paper/page")
    run.run_notebook("paper/page", {"epsilon": "0.5"})
    assert "paper/gain: undecided (one seed)" in capsys.readouterr().out


def test_a_failing_point_is_told_and_the_others_are_kept(project):
    put(project, "assert seed != 1", SETTLES)
    with pytest.raises(run.RunError, match="1 of 3 points failed"):
        run.sweep("paper/page", {}, {"seed": ["0", "1", "2"]})
    assert len(list((project / "_build" / "sweeps" / "paper" / "page").glob("*.ipynb"))) == 2


def test_accept_refuses_what_has_not_run(project):
    with pytest.raises(run.RunError, match="not executed"):
        run.accept()


def test_committed_notebook_carries_outputs_and_no_papermill(project):
    run.run_notebook("paper/page", {})
    run.accept()
    text = records.path("source", "paper/page").read_text()
    assert "papermill" not in text and claims.MIME in text


# ---------------------------------------------------------------- the command

@pytest.mark.parametrize("words, told", [
    (["run", "nosuch"], "notebook must be one of paper/page, got 'nosuch'"),
    (["run", "paper/page", "-p", "epsilonn", "1"], "got 'epsilonn'"),
    (["run", "paper/page", "-p", "epsilon", "-1"], "epsilon must be in (0, inf), got -1"),
    (["run", "paper/page", "-p", "device", "tpu"], "device must be one of cpu | cuda | cuda:N, got 'tpu'"),
    (["run", "paper/page", "--sweep", "lam", "0.5", "2"], "lam must be in [0, 1], got 2"),
    (["run", "paper/page", "--sweep", "lam"], "--sweep lam needs at least one value"),
    (["run", "paper/page", "--sweep", "seed", "0", "0", "1"], "--sweep has the value seed 0 twice"),
    (["run", "paper/page", "-p", "seed", "1", "--sweep", "seed", "0", "1"], "parameter seed is given twice"),
    (["run", "paper/page", "-p", "names", "[a"], "names must be list, got '[a'"),
    (["run", "paper/page", "-p", "names", "[]"], "names must hold at least one value"),
    (["run", "/elsewhere/notebooks/paper/page.ipynb"], "notebook must be one of paper/page"),
    (["run", "paper/page", "--full"], "page.full.yaml, which does not exist")])
def test_mistakes_end_in_one_line(project, capsys, words, told):
    assert run.main(words) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_scoreboard_json_has_every_claim_of_the_ledger():
    done = subprocess.run([sys.executable, "-m", "lib.run", "scoreboard", "--json"], capture_output=True, text=True,
                          cwd=records.Path(claims.__file__).parent.parent)
    board = json.loads(done.stdout)
    every = sum(len(claims.ledger(paper)["claims"]) for paper in claims.papers())
    assert set(board) == {"claims", "counts"} and len(board["claims"]) == sum(board["counts"]["all"].values()) == every


def test_smoke_is_never_evidence(project, monkeypatch):
    monkeypatch.setenv("REPRO_TIER", "smoke")
    run.execute("paper/page", {}, project / "smoke.ipynb", tier="smoke")
    assert claims.read_settled(project / "smoke.ipynb", tier="fast") == {}


def test_interrupt_is_told_in_one_line(project, monkeypatch, capsys):
    monkeypatch.setattr(run, "book", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run.main(["book"]) == 130
    assert "kept" in capsys.readouterr().err
    shutil.rmtree(project / "_build", ignore_errors=True)


def test_shares_stand_beside_percentages_in_one_unit(project, monkeypatch):
    summary(project, ["seed"], [0, 1, 2, 3, 4])
    assert run._accept_sweep("paper/page")
    monkeypatch.setenv("REPRO_NOTEBOOK", "paper/page")
    row = records.compare({"gain": 0.5}, {"gain": None}, scale=100).data.iloc[0]
    # the recorded gains are 0 to 4: mean 2, half a 95 % t-interval 2.776 * 1.5811 / sqrt(5)
    assert row["record"] == "200.00 ± 196.32 (n = 5)" and row["here"] == "50.00" and row["paper"] == ""

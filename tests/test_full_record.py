"""A full-size record from its run to the chapter: paper, record and live run side by side, its cost, what is stale."""
import json
from pathlib import Path

import nbformat as nbf
import pytest

from lib import claims, cost, pages, records, run
from lib.parameters import check

RULE = {"tier": "full", "data": ["mnist"], "by": "seeds", "n": 1, "atoms": [{"q": "gain", "like": "value", "tol": {"abs": 1}}]}
SETTLES = '''from lib.claims import settle
settle({"gain": {"gain": 3.25 + seed}}, section="s")'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one page with a full size of its own."""
    entry = {"id": "gain", "kind": "number", "where": "Table 1", "says": "made up", "value": 4, "rule": RULE}
    (tmp_path / "book" / "claims").mkdir(parents=True)
    (tmp_path / "book" / "claims" / "paper.yaml").write_text(json.dumps({"key": "paper", "claims": [entry]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(records.Path(claims.__file__).parent.parent))
    put(tmp_path, SETTLES)
    (tmp_path / "notebooks/paper/page.full.yaml").write_text("parameters: {seed: 1}\ndeviations: [half of the images]")
    return tmp_path


def put(root, source, declared="seed: int = 0  # seed; in [0, inf)"):
    cells = [nbf.v4.new_code_cell(declared, id="p", metadata={"tags": ["parameters"]}),
             nbf.v4.new_code_cell(source, id="all")]
    records.write(root / "notebooks" / "paper" / "page.ipynb", nbf.writes(nbf.v4.new_notebook(cells=cells)))


def shown(monkeypatch):
    """(the row, the caption) of the chapter's table."""
    monkeypatch.setenv("REPRO_NOTEBOOK", "paper/page")
    style = records.compare({"gain": 2.0}, {"gain": "gain"})
    return style.data.iloc[0].to_dict(), style.caption


def drawn(monkeypatch, cell):
    """The outputs that a page takes over from a cell of its recorded run."""
    found = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: found.append(data))
    records.show_recorded("paper/page", cell)
    return found


def test_a_full_size_run_stands_beside_paper_and_live_run(project, monkeypatch):
    assert shown(monkeypatch) == ({"": "gain", "paper": "4", "record": "none yet", "here": "2.00"}, "")
    assert records.on_papers_data("paper/page") == {} and drawn(monkeypatch, "all") == []
    assert run.main(["run", "paper/page"]) == 0 and records.current("paper/page")
    assert run.main(["run", "paper/page", "--full"]) == 0
    assert run.main(["accept"]) == 1                              # the page does not show its new record yet
    assert run.main(["run", "paper/page"]) == 0
    assert run.main(["accept"]) == 0
    row, caption = shown(monkeypatch)
    assert records.on_papers_data("paper/page") == {"gain": 4.25}
    assert [list(data) for data in drawn(monkeypatch, "all")] == [[claims.MIME, "text/html", "text/plain"]] and drawn(monkeypatch, "p") == []
    assert row == {"": "gain", "paper": "4", "record": "none yet", "paper's data, reduced": "4.25", "here": "2.00"}
    assert "run on the paper's data, reduced: " in caption and "CPU seconds" in caption and "MiB on" in caption
    assert "Deviations from the paper's settings: half of the images." in caption and "Stale" not in caption
    entry, = claims.scoreboard(records.sources())
    assert (entry["verdict"], entry["evidence"]) == ("undecided", "reduced")      # a reduced run settles no number
    assert "4.25" in entry["reason"] and json.loads((project / "book/verdicts.json").read_text())["paper"]["gain"][1] == "reduced"
    assert caption in pages.records_table()


def test_a_stale_record_says_what_changed(project, monkeypatch):
    assert run.main(["run", "paper/page", "--full"]) == 0
    put(project, SETTLES + "\nx = 1")
    row, caption = shown(monkeypatch)
    assert row["paper's data, reduced, stale"] == "4.25"
    assert "<strong>Stale, changed since: code cells.</strong>" in caption
    entry, = claims.scoreboard(records.sources())
    assert (entry["verdict"], entry["reason"]) == ("not-run", "stale: code cells")


def test_a_reduced_run_is_a_record_and_never_overwrites_one_of_full_size(project, capsys):
    put(project, SETTLES, "seed: int = 0  # seed; in [0, inf)\nsmall: bool = False  # for two cores")
    (project / "notebooks/paper/page.reduced.yaml").write_text("parameters: {small: true}\ndeviations: [two steps]")
    record = records.path("full", "paper/page", ".json")
    for _ in range(2):
        assert run.main(["run", "paper/page", "--reduced"]) == 0
        assert records.read(record)["deviations"] == ["two steps"]
    assert run.main(["run", "paper/page", "--full"]) == 0
    assert run.main(["run", "paper/page", "--reduced"]) == 1
    assert "full/paper/page.ipynb is a record of full size; move it away" in capsys.readouterr().err
    assert records.read(record)["deviations"] == ["half of the images"]
    with pytest.raises(SystemExit):
        run.main(["run", "paper/page", "--reduced", "--full"])


@pytest.mark.parametrize("file", sorted(Path("notebooks").rglob("*.reduced.yaml")) + sorted(Path("notebooks").rglob("*.full.yaml")), ids=str)
def test_settings_on_the_papers_data_are_parameters_of_their_page(file):
    """A reduced run is small, and is what `repro run --reduced` takes for one that may be overwritten."""
    name, _, size = str(file.relative_to("notebooks"))[:-5].rpartition(".")
    given, deviations = records.parameters_of(name, size)
    assert check(records.read(records.path("source", name)), given) and deviations
    assert given.get("small", False) == (size == "reduced")


def test_other_parameters_make_no_record(project):
    assert run.main(["run", "paper/page", "--full", "-p", "seed", "2"]) == 0
    assert not records.path("full", "paper/page", ".json").exists()
    record, = (project / "_build" / "runs" / "paper").glob("*.json")
    assert records.read(record)["deviations"] == ["half of the images", "seed = 2 (command line)"]


def test_cost_is_told_in_words():
    cpu = {"seconds": 20.4, "cpu_seconds": 1999.6, "peak_memory_mib": 2048, "machine": "EPYC, 2 cores"}
    assert cost.told(cpu) == "2,000 CPU seconds, 2,048 MiB on EPYC, 2 cores"
    gpu = cpu | {"gpu": "NVIDIA H200", "gpu_memory_mib": 3000}
    assert cost.told(gpu) == "20 GPU seconds on NVIDIA H200, 3,000 MiB of it (EPYC, 2 cores)"
    assert cost.told({"seconds": 20.4, "peak_memory_mib": None, "machine": "m"}) == "20 s on m"      # an old manifest
    assert records.costs([cpu, gpu | {"cpu_seconds": .4}]) == {"cpu_seconds": 2000., "peak_memory_mib": 2048,
                                                               "gpu_memory_mib": 3000, "gpu": "NVIDIA H200"}
    assert records.costs([{"seconds": 1}]) == {}


def test_a_gpu_tells_its_name_and_its_largest_memory(monkeypatch):
    import torch
    assert "gpu" not in cost.used() and cost.used()["cpu_seconds"] > 0
    for name, value in {"is_initialized": True, "get_device_name": "NVIDIA H200", "max_memory_allocated": 5 * 2**20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert cost.used()["gpu"] == "NVIDIA H200" and cost.used()["gpu_memory_mib"] == 5


def test_a_record_shows_what_was_found_since(project):
    assert run.main(["run", "paper/page", "--full"]) == 0
    (project / "notebooks/paper/page.full.yaml").write_text("parameters: {seed: 1}\ndeviations: [half of the images, one more]")
    assert records.full_record("paper/page")[1]["deviations"] == ["half of the images", "one more"]
    (project / "notebooks/paper/page.full.yaml").write_text("parameters: {seed: 1}\ndeviations: []")      # no list makes a run truer
    assert records.full_record("paper/page")[1]["evidence"] == "reduced"
    (project / "notebooks/paper/page.full.yaml").write_text("parameters: {seed: 2}\ndeviations: [those of another run]")
    assert records.full_record("paper/page")[1]["deviations"] == ["half of the images"]
    file = records.path("full", "paper/page", ".json")
    records.write(file, records.read(file) | {"parts": records.read(file)["parts"] | {"measuring": "in another way"}})
    assert records.full_record("paper/page")[2] == "measuring"      # what a record has judged was measured when it ran

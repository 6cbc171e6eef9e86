"""Sweeps: a scheduler and workers that are already there, a worker lost in the middle, GPUs given out, one table."""
import json
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import nbformat as nbf
import pandas as pd
import pytest
import torch

from lib import claims, records, run
from lib import sweep as sweeps

RULES = {"gain": {"tier": "fast", "by": "seeds", "n": 5, "data": ["digits"], "atoms": [{"q": "gain", "in": [0, 10]}]},
         "exact": {"tier": "fast", "by": "exact", "atoms": [{"q": "2 * radius", "in": [0, 10]}]}}
# each start of a point leaves a mark that names its worker, the parent of the kernel
SLOW = '''import os, time
from lib.claims import settle
open(f"started-{seed}-{os.getppid()}", "w").close()
time.sleep(.7)
settle({"gain": {"gain": 1.0 + seed}}, section="s")'''
BOTH = '''from lib.claims import settle
settle({"gain": {"gain": 1.0 + seed}, "exact": {"radius": epsilon}}, section="s")'''
KEEPS = BOTH + '''
from lib.records import keep, recorded
print("of the record", recorded("paper/page"))
keep({"beyond.all": 10 * seed, "gone": float("nan")})'''
GPU = '''import os
from lib.claims import settle
settle({"gain": {"gain": float(os.environ["CUDA_VISIBLE_DEVICES"])}}, section="s")'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one page, which is also the working folder of all that is started."""
    entries = [{"id": i, "kind": "trend", "where": "here", "says": "made up", "rule": r} for i, r in RULES.items()]
    (tmp_path / "book" / "claims").mkdir(parents=True)
    (tmp_path / "book" / "claims" / "paper.yaml").write_text(json.dumps({"key": "paper", "claims": entries}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(claims.__file__).parent.parent))
    return tmp_path


def put(project, source):
    declared = ('seed: int = 0  # seed; in [0, inf)\nepsilon: float = .1  # radius; in (0, inf)\n'
                'device: str = "cpu"  # where; one of cpu | cuda')
    cells = [nbf.v4.new_code_cell(declared, id="parameters", metadata={"tags": ["parameters"]}),
             nbf.v4.new_code_cell(source, id="all")]
    records.write(project / "notebooks" / "paper" / "page.ipynb", nbf.writes(nbf.v4.new_notebook(cells=cells)))


@pytest.fixture
def cluster(project):
    """(address, workers): a scheduler and two workers, processes of their own as on a cluster; no nanny revives them."""
    def begin(tool, *words):
        return subprocess.Popen([sys.executable, "-m", f"distributed.cli.dask_{tool}", "--scheduler-file", "address.json",
                                 "--no-dashboard", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    started = [begin("scheduler", "--host", "127.0.0.1", "--port", "0")]
    started += [begin("worker", "--nthreads", "1", "--no-nanny") for _ in range(2)]
    try:
        give_up = time.monotonic() + 60
        while not (project / "address.json").exists():
            assert time.monotonic() < give_up and started[0].poll() is None
            time.sleep(.05)
        yield json.loads((project / "address.json").read_text())["address"], started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_points_of_a_lost_worker_are_run_by_another(project, cluster, monkeypatch):
    put(project, SLOW)
    address, workers = cluster
    folder, killed = project / "notebooks" / "paper", []

    def kill():
        while not killed:
            for worker in workers:
                if list(folder.glob(f"started-*-{worker.pid}")):
                    worker.send_signal(signal.SIGKILL)
                    killed.append(worker.pid)
                    return
            time.sleep(.02)

    threading.Thread(target=kill, daemon=True).start()
    axes = {"seed": ["0", "1", "2", "3"]}
    sweeps.sweep("paper/page", {}, axes, scheduler=address)
    marks = [tuple(map(int, mark.name.split("-")[1:])) for mark in folder.glob("started-*")]
    lost = {seed for seed, worker in marks if worker in killed}
    assert len(lost) == 1 and lost <= {seed for seed, worker in marks if worker not in killed}
    table = pd.read_csv(project / "_build" / "sweeps" / "paper" / "page" / "seed.csv")
    assert table.values.tolist() == [[seed, "paper/gain", "gain", 1. + seed] for seed in range(4)]
    assert (project / "_build" / "sweeps" / "paper" / "page" / "seed.png").stat().st_size > 1000
    # finished points are skipped, even without a worker to ask
    for worker in workers:
        worker.kill()
    sweeps.sweep("paper/page", {}, axes, scheduler=address)
    assert len(list(folder.glob("started-*"))) == len(marks)


@dataclass(eq=False)
class Returned:
    """A future that is done."""
    texts: dict

    def result(self):
        return self.texts

    def exception(self):
        return None


class Elsewhere:
    """A client whose workers have another disk: what they write is gone here, what they return is kept."""

    def submit(self, point, name, parameters, gpus, pure):
        target = sweeps._target(name, parameters)
        run.execute(name, parameters, target, progress=False)
        texts = {file: file.read_text() for file in (target, target.with_suffix(".json"))}
        target.unlink()
        return Returned(texts)


def test_results_of_a_worker_without_this_folder_are_brought_here(project, monkeypatch):
    put(project, BOTH)
    monkeypatch.setattr("distributed.as_completed", list)
    monkeypatch.setattr(sweeps, "_cluster", lambda *_: nullcontext(Elsewhere()))
    sweeps.sweep("paper/page", {}, {"epsilon": ["1", "2"]})
    table = pd.read_csv(project / "_build" / "sweeps" / "paper" / "page" / "epsilon.csv")
    # over another axis than seeds, what is settled without training runs stands in the table, too
    exact = table[table["claim"] == "paper/exact"]
    assert exact[["epsilon", "name", "value"]].values.tolist() == [[1., "2 * radius", 2.], [2., "2 * radius", 4.]]


def test_every_gpu_gets_its_worker(project, monkeypatch):
    put(project, GPU)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    sweeps.sweep("paper/page", {}, {"seed": ["0", "1"]}, gpus=2)
    table = pd.read_csv(project / "_build" / "sweeps" / "paper" / "page" / "seed.csv")
    assert set(table["value"]) <= {3., 5.} and len(table) == 2
    assert records.read(project / "_build" / "sweeps" / "paper" / "page" / "seed.json")["device"] == "cuda"


@pytest.mark.parametrize("words, told", [
    (["--gpus", "1"], "--sweep takes either --scheduler"), (["--scheduler", "tcp://a:1"], "--sweep takes either --scheduler"),
    (["--sweep", "seed", "0", "--gpus", "2", "--scheduler", "tcp://a:1"], "--sweep takes either --scheduler"),
    (["--sweep", "seed", "0", "--gpus", "-1"], "--gpus must be between 1 and 2, the GPUs seen here, got -1"),
    (["--sweep", "seed", "0", "--gpus", "9"], "--gpus must be between 1 and 2, the GPUs seen here, got 9"),
    (["--sweep", "seed", "0", "--scheduler", "nonsense"], "--scheduler must be the address of a running dask scheduler")])
def test_mistakes_end_in_one_line(project, capsys, monkeypatch, words, told):
    put(project, BOTH)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run.main(["run", "paper/page", *words]) == 1
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_what_a_page_keeps_is_recorded_beside_its_claims(project):
    put(project, KEEPS)
    assert run.main(["run", "paper/page", "--sweep", "seed", "0", "1", "2"]) == 0
    table = pd.read_csv(project / "_build" / "sweeps" / "paper" / "page" / "seed.csv")
    kept = table[table["claim"] == claims.KEPT]
    assert kept[kept["name"] == "beyond.all"].set_index("seed")["value"].to_dict() == {0: 0, 1: 10, 2: 20}
    assert kept[kept["name"] == "gone"]["value"].isna().all()
    assert records.recorded("paper/page") == {}
    for suffix in (".csv", ".json"):
        records.write(records.path("seeds", "paper/page", suffix),
                      (project / "_build" / "sweeps" / "paper" / "page" / f"seed{suffix}").read_text())
    mean, low, high, n = records.recorded("paper/page")["beyond.all"]
    assert (mean, n) == (10, 3) and low == pytest.approx(10 - 24.84, abs=.01) and high == pytest.approx(10 + 24.84, abs=.01)


def test_a_record_is_confirmed_only_if_every_digit_returns(project, capsys):
    put(project, KEEPS)
    assert run.main(["run", "paper/page", "--sweep", "seed", "0", "1", "2"]) == 0
    for suffix in (".csv", ".json"):
        records.write(records.path("seeds", "paper/page", suffix),
                      (project / "_build" / "sweeps" / "paper" / "page" / f"seed{suffix}").read_text())
    assert run.main(["confirm", "paper/page"]) == 1 and "nothing has changed since the recorded sweep" in capsys.readouterr().err
    put(project, KEEPS + "\nunused = 1")
    assert records.seeds_table("paper/page")[1] == "code cells"
    assert run.main(["confirm", "paper/page"]) == 0 and "6 numbers of 2 points as recorded" in capsys.readouterr().out
    assert records.seeds_table("paper/page")[1] == ""
    record = records.read(records.path("seeds", "paper/page", ".json"))
    assert [(c["changed"], c["points"]) for c in record["confirmed"]] == [("code cells", 2)] and record["points"] == 3
    put(project, KEEPS.replace("10 * seed", "11 * seed"))
    assert run.main(["confirm", "paper/page"]) == 1
    assert "1 of 6 numbers differ from the record, first (1, 'beyond', 'beyond.all')" in capsys.readouterr().err
    assert records.seeds_table("paper/page")[1] == "code cells"
    # a new parameter survives as any change does; a record at another length does not
    page = records.path("source", "paper/page")
    put(project, KEEPS)
    records.write(page, page.read_text().replace('"epsilon:', '"small: bool = False  # new\\n", "epsilon:'))
    assert records.seeds_table("paper/page")[1] == "code cells, parameters"
    assert run.main(["confirm", "paper/page"]) == 0 and records.seeds_table("paper/page")[1] == ""
    # seconds are asked only to be numbers, and only those that a claim names
    put(project, KEEPS.replace("1.0 + seed", "2.0 + seed"))
    assert run.main(["confirm", "paper/page"]) == 1 and "2 of 6 numbers differ" in capsys.readouterr().err
    ledger = project / "book" / "claims" / "paper.yaml"
    ledger.write_text(ledger.read_text().replace('"id": "gain"', '"id": "gain", "wall_clock": ["gain"]'))
    assert run.main(["confirm", "paper/page"]) == 0 and "(2 of them seconds, which are not compared)" in capsys.readouterr().out
    assert records.read(records.path("seeds", "paper/page", ".json"))["confirmed"][-1]["timed"] == 2
    page.with_suffix(".seeds.yaml").write_text("epsilon: 0.2")
    put(project, KEEPS + "\nunused = 2")
    assert run.main(["confirm", "paper/page"]) == 1 and "its .seeds.yaml has changed" in capsys.readouterr().err

"""A training notebook stopped at any moment goes on from its checkpoint when it is run again, to the same weights."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat as nbf
import pytest
from safetensors import safe_open

from lib import claims, records, run
from lib.execute import execute, stoppable

LIB = str(Path(claims.__file__).parent.parent)

STEPS = 500
TRAINS = f'''
import hashlib
import torch
from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.train import trained

def loss(model, x, y):
    with open("steps.log", "a") as log:
        log.write("x")
    return losses.reweight(model, x, y)

images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
model = trained(lambda: ConditionalGlow((1, 4, 4), 4, levels=2, depth=2, width=8), loss, (images, torch.arange(64) % 4),
                steps={STEPS}, batch=16, save_seconds=0.2, seed=seed)
print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
'''


@pytest.fixture
def project(tmp_path):
    """A project of one page that trains."""
    (tmp_path / "book" / "claims").mkdir(parents=True)
    (tmp_path / "book" / "claims" / "paper.yaml").write_text(json.dumps({"key": "paper", "claims": []}))
    cells = [nbf.v4.new_code_cell("seed: int = 0", id="parameters", metadata={"tags": ["parameters"]}),
             nbf.v4.new_code_cell(TRAINS, id="train")]
    page = tmp_path / "notebooks" / "paper" / "page.ipynb"
    records.write(page, nbf.writes(nbf.v4.new_notebook(cells=cells)))
    page.with_suffix(".full.yaml").write_text("parameters: {seed: 1}\ndeviations: [tiny]")
    return tmp_path


def start(project, cache):
    environment = os.environ | {"PYTHONPATH": LIB, "REPRO_CACHE": str(project / cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "lib.run", "run", "paper/page", "--full"], cwd=project, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def step_in(cache):
    """The step of the checkpoint; 0 while there is none, or while safetensors' two looks at the file fall apart."""
    try:
        with safe_open(next(cache.glob("*.safetensors")), "pt") as checkpoint:
            return int(checkpoint.metadata()["step"])
    except (StopIteration, RuntimeError, OSError):
        return 0


def writer(project):
    """The process that holds the right to write the page."""
    return next((int(file.read_text() or 0) for file in (project / "_build" / "running").glob("*.pid")), None)


def weights(project):
    outputs = json.loads((project / "book/records/full/paper/page.ipynb").read_text())["cells"][-1]["outputs"]
    return next("".join(o["text"]) for o in outputs if o.get("name") == "stdout")


@pytest.fixture
def whole(project):
    """What the page prints when nothing stops it: its cell run as a plain script."""
    environment = os.environ | {"PYTHONPATH": LIB, "REPRO_CACHE": str(project / "whole"), "OMP_NUM_THREADS": "1"}
    (project / "train.py").write_text(f"seed = 1\n{TRAINS}")
    done = subprocess.run([sys.executable, "train.py"], cwd=project, env=environment, check=True,
                          stdout=subprocess.PIPE, text=True)
    (project / "steps.log").unlink()
    return done.stdout


def test_a_page_killed_at_random_moments_resumes_to_the_same_weights(project, whole, monkeypatch, capsys):
    """kill -9, then SIGTERM, each some random time after the first new checkpoint; then the same command once more."""
    cache, log = project / "killed", project / "notebooks" / "paper" / "steps.log"
    monkeypatch.chdir(project)
    # Python ends by SIGINT itself, a shell's 130, where the interrupt fell into an `exec` of some import
    for number, ends in ((signal.SIGKILL, {-signal.SIGKILL, 0}), (signal.SIGTERM, {130, -signal.SIGINT, 0})):
        process, give_up, before = start(project, "killed"), time.monotonic() + 120, step_in(cache)
        # the kernel of a killed run may go on for a second: wait for a checkpoint of this one
        while (step_in(cache) <= before or writer(project) != process.pid) and process.poll() is None:
            before = before if writer(project) == process.pid else step_in(cache)
            assert time.monotonic() < give_up
            time.sleep(.02)
        if number == signal.SIGTERM and process.poll() is None:      # a second run of the page keeps away from the first
            status_of_second, told = run.main(["run", "paper/page", "--full"]), capsys.readouterr().err
            assert status_of_second == 1 and f"is being written by process {process.pid};" in told or process.wait(60) == 0
        time.sleep(random.uniform(0, .3))
        process.send_signal(number)
        assert process.wait(timeout=60) in ends, process.stdout.read()
        assert process.returncode == 0 or not records.path("full", "paper/page", ".json").exists()
    again = start(project, "killed")
    assert again.wait(timeout=120) == 0, again.stdout.read()
    assert weights(project) == whole
    # every step once, and again only what lay behind a checkpoint: far from three trainings
    assert STEPS <= len(log.read_text()) < 2 * STEPS
    record = records.read(records.path("full", "paper/page", ".json"))
    assert record["cpu_seconds"] > 0 and record["peak_memory_mib"] > 50 and record["deviations"] == ["tiny"]
    assert list((project / "_build" / "running").glob("*.ipynb")) == []


SAVES = '''
import sys
from pathlib import Path
import torch
from lib import checkpoint
model = torch.nn.Linear(700, 700, bias=False).requires_grad_(False)
for step in range(1, 100_000):
    model.weight.fill_(step)
    checkpoint.save(Path(sys.argv[1]), {"steps": 100_000}, step, model)
'''


@pytest.mark.parametrize("attempt", range(2))
def test_a_process_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path, attempt):
    """It does nothing but write, two megabytes at a time, so that kill -9 at a random moment falls into a save."""
    path, environment = tmp_path / "m.safetensors", os.environ | {"PYTHONPATH": LIB, "OMP_NUM_THREADS": "1"}
    process, give_up = subprocess.Popen([sys.executable, "-c", SAVES, path], env=environment), time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(.01)
    time.sleep(random.uniform(0, .3))
    process.kill()
    process.wait()
    with safe_open(path, "pt") as file:
        assert (file.get_tensor("model.weight") == int(file.metadata()["step"])).all()


def test_sigterm_and_the_end_of_the_time_are_interrupts():
    before = signal.getsignal(signal.SIGTERM)
    for minutes, kill in ((None, True), (.001, False)):
        with pytest.raises(KeyboardInterrupt), stoppable(minutes):
            if kill:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
    with stoppable(60):
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_no_manifest_stands_beside_another_run_s_notebook(project, monkeypatch):
    """A power cut between the two files of a record leaves a notebook without a manifest, which does not count."""
    monkeypatch.chdir(project)
    target = records.path("executed", "paper/page")
    for file in (target, target.with_suffix(".json")):
        records.write(file, "old")
    whole_write = records.write

    def cut(file, content):
        if file.suffix == ".json":
            raise OSError("power cut")
        whole_write(file, content)

    monkeypatch.setattr(records, "write", cut)
    monkeypatch.setattr("papermill.execute_notebook", lambda source, output, **_: Path(output).write_text("new"))
    with pytest.raises(OSError, match="power cut"):
        execute("paper/page", {}, target)
    assert target.read_text() == "new" and not target.with_suffix(".json").exists()
    assert not records.current("paper/page")


def test_a_kernel_that_dies_is_told_in_one_line(project, monkeypatch, capsys):
    page = json.loads((project / "notebooks/paper/page.ipynb").read_text())
    page["cells"][-1]["source"] = "import os\nos.kill(os.getpid(), 9)"
    records.write(project / "notebooks/paper/page.ipynb", page)
    monkeypatch.chdir(project)
    assert run.main(["run", "paper/page"]) == 1
    assert "repro: paper/page: its kernel died" in capsys.readouterr().err

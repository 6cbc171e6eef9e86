"""A training notebook killed half-way goes on from its checkpoint when it is run again, to the same weights."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat as nbf
import pytest
from safetensors import safe_open

from lib import claims, records

STEPS = 800
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
                steps={STEPS}, batch=16, save_seconds=0.2)
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
    return tmp_path


def start(project, cache):
    environment = os.environ | {"PYTHONPATH": str(Path(claims.__file__).parent.parent), "REPRO_CACHE": str(project / cache),
                                "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "lib.run", "run", "paper/page"], cwd=project, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def step_in(cache):
    """The step of the checkpoint; 0 while there is none, or while safetensors' two looks at the file fall apart."""
    try:
        with safe_open(next(cache.glob("*.safetensors")), "pt") as checkpoint:
            return int(checkpoint.metadata()["step"])
    except (StopIteration, RuntimeError, OSError):
        return 0


def weights(project):
    outputs = json.loads((project / "_build/executed/paper/page.ipynb").read_text())["cells"][-1]["outputs"]
    return next("".join(o["text"]) for o in outputs if o.get("name") == "stdout")


def test_a_killed_page_resumes_to_the_same_weights(project):
    log = project / "notebooks" / "paper" / "steps.log"
    assert start(project, "whole").wait(timeout=120) == 0
    whole = weights(project)
    (project / "_build/executed/paper/page.ipynb").unlink()
    log.unlink()

    process, give_up = start(project, "killed"), time.monotonic() + 120
    while not 0 < step_in(project / "killed"):
        assert process.poll() is None and time.monotonic() < give_up, process.stdout.read()
        time.sleep(.02)
    process.send_signal(signal.SIGKILL)      # its kernel notices that it is alone and ends within a second or two
    process.wait()
    assert not (project / "_build/executed/paper/page.ipynb").exists()
    before = step_in(project / "killed")
    again = start(project, "killed")
    assert again.wait(timeout=120) == 0, again.stdout.read()
    assert 0 < before and weights(project) == whole
    # far fewer steps than two trainings: what lay behind the last checkpoint was not done again
    assert STEPS <= len(log.read_text()) < 2 * STEPS - before / 2

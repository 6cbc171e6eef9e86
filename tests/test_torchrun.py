"""One training by two processes under torchrun (gloo): the result of one process, resumed to the bit."""
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib import train as training
from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.pretrain import MODELS, main
from lib.train import train

SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    from test_torchrun import FLOW, RUN, build, cross_entropy, data, flow
    from lib.models import losses
    from lib.train import Interrupted, train
    torch.set_num_threads(1)
    folder = Path({folder!r})
    train(build(), cross_entropy, data(), checkpoint=folder / "plain.safetensors", **RUN)
    train(flow(), losses.reweight, data(), checkpoint=folder / "whole.safetensors", **FLOW)
    for turn in range(3):
        try:
            train(flow(), losses.reweight, data(), checkpoint=folder / "parts.safetensors", max_minutes=0, **FLOW)
        except Interrupted:
            pass
    (folder / "unfinished.safetensors").write_bytes((folder / "parts.safetensors").read_bytes())
    train(flow(), losses.reweight, data(), checkpoint=folder / "parts.safetensors", **FLOW)
    try:
        train(build(), cross_entropy, data(), **dict(RUN, batch=9))
    except ValueError as error:
        (folder / "refused").write_text(str(error))
""")
RUN = dict(steps=60, batch=8, lr=3e-2, seed=3)
FLOW = dict(RUN, steps=12, ema=0.9, clip=10.0, lr=1e-2)


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(17, (40, 1, 4, 4), generator=generator) / 16, torch.randint(3, (40,), generator=generator)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def flow():
    torch.manual_seed(0)
    return ConditionalGlow((1, 4, 4), 3, grey_levels=17, levels=2, depth=1, width=4)


def cross_entropy(model, x, y):
    return F.cross_entropy(model(x), y)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes have trained."""
    folder = tmp_path_factory.mktemp("torchrun")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=os.path.dirname(__file__), folder=str(folder)))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def weights(path):
    from safetensors.torch import load_file
    return {k: v for k, v in load_file(path).items() if k.startswith("model.")}


def test_two_processes_train_what_one_does(folder):
    """The loss has no noise and averages over images, so only the order of sums differs."""
    alone = train(build(), cross_entropy, data(), **RUN)
    x, y = data()
    start, end = cross_entropy(build(), x, y), cross_entropy(alone, x, y)
    assert end < 0.9 * start
    together = build()
    together.load_state_dict({k[len("model."):]: v for k, v in weights(folder / "plain.safetensors").items()})
    torch.testing.assert_close(cross_entropy(together, x, y), end, rtol=1e-4, atol=0)
    # negative control: another seed, that is another order of the images, is not within that tolerance
    other = train(build(), cross_entropy, data(), **{**RUN, "seed": 4})
    assert abs(cross_entropy(other, x, y) - end) > 1e-3 * end


def test_two_processes_resume_to_the_bit(folder):
    whole, parts = weights(folder / "whole.safetensors"), weights(folder / "parts.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_finished_model_serves_any_number_an_unfinished_one_its_own(folder):
    found = train(flow(), losses.reweight, data(), checkpoint=folder / "whole.safetensors", **FLOW)
    assert all(torch.equal(v, weights(folder / "whole.safetensors")[f"model.{k}"]) for k, v in found.state_dict().items())
    with pytest.raises(ValueError, match="processes is 2 there and None here"):
        train(flow(), losses.reweight, data(), checkpoint=folder / "unfinished.safetensors", **FLOW)


def test_a_batch_must_be_shared_evenly(folder):
    assert (folder / "refused").read_text() == "batch must be a multiple of the number of processes (2), got 9"


def test_pretrain_puts_a_model_where_notebooks_find_it(tmp_path, monkeypatch):
    from lib import zoo_sdim
    from lib.data import load
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    assert main(["zoo_sdim.twin", "data=digits", "size=0.01"]) == 0
    trained = [p for p in tmp_path.iterdir() if p.suffix == ".safetensors"]
    before = trained[0].stat().st_mtime_ns
    monkeypatch.setattr(training, "_update", None)      # nothing is trained a second time
    zoo_sdim.twin(load("digits"), size=0.01)
    assert len(trained) == 1 and trained[0].stat().st_mtime_ns == before


@pytest.mark.parametrize("argv, line", [
    ([], "model must be one of zoo.conditional_flow, "),
    (["zoo.fit"], "model must be one of "),
    (["zoo_sdim.sdim", "data=digits", "sise=1"], "argument must be one of data, variant, "),
    (["zoo_sdim.sdim", "size=1"], "data must be given, as data=VALUE"),
    (["zoo_sdim.sdim", "data=digits", "size=-1"], "size must be > 0, got -1"),
])
def test_pretrain_tells_mistakes_in_one_line(argv, line, capsys):
    assert main(argv) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"pretrain: {line}") and told.count("\n") == 1


def test_every_zoo_can_be_pretrained():
    assert {*MODELS} == {"zoo.conditional_flow", "zoo_density.density", "zoo_pixelcnn.conditional_pixelcnn", "zoo_sdim.sdim", "zoo_sdim.twin"}

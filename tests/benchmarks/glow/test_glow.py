"""Speed and memory of the conditional Glow beside normflows and beside its own convolutions.

``make benchmarks`` runs it, ``make test`` does not; it wants the machine for itself.
Every number is the median of ROUNDS fresh processes, the contestants taking turns; memory is the peak above
the imported libraries. Where the cores fall well short of two, something else ran and spoiled the numbers.
It asserts that both compute the same density and all classes at once are those one by one, never a time.
"""
import json
import os
import subprocess
import sys

import glow_worker as worker
import pandas as pd
import pytest
import torch

from lib.models.priors import LOG_2PI

ROUNDS = 7
# glibc keeps freed memory, for all but normflows as it comes; our own process sets itself up (lib.train)
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
TASKS = {"train": "training step (forward, backward, Adam)", "log_prob": "log p(x|y), one class",
         "classes": "log p(x|y), all ten classes", "pgd": "PGD step on p(y|x), parameters frozen"}
TARGETS = {"train": 1.25, "log_prob": 1.25, "classes": 10, "pgd": 9}      # "tuned" over "ours"


def measured(who, task):
    """Milliseconds and MiB of one fresh process."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "OMP_", "MKL_"))}
    environment = plain if who in ("ours", "split", "default") else plain | TUNED
    done = subprocess.run([sys.executable, worker.__file__, who, task], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("task", TASKS)
def test_glow_beside_normflows(task, capsys):
    contestants = ["ours", "split", "default", "tuned", "convolutions"]
    contestants += ["once"] if task in ("classes", "pgd") else []
    runs = {who: [] for who in contestants}
    for _ in range(ROUNDS):
        for who in contestants:
            runs[who].append(measured(who, task))
    table = pd.concat({who: pd.DataFrame(run) for who, run in runs.items()}).groupby(level=0, sort=False)
    found = table.median().assign(least=table["ms"].min(), most=table["ms"].max())
    found["over ours"] = found["ms"] / found.loc["ours", "ms"]
    found["images/s"] = 1000 * worker.BATCH / found["ms"]
    with capsys.disabled():     # "convolutions" over ours is their share of our time
        print(f"\n{TASKS[task]}; tuned over ours should reach {TARGETS[task]}\n{found.round(2).to_string()}")


def copied(model, other):
    """Give normflows' fresh Glow our rotations and, drawn at random, our class priors."""
    with torch.no_grad():
        model.prior.mean.normal_()
        model.prior.log_scale.normal_(0, 0.1)
        for level, flows in zip(model.flow.levels, reversed(other.flows)):
            blocks = [flow for flow in flows if hasattr(flow, "flows")]
            for mixing, block in zip(level.mixing.weight, reversed(blocks)):
                p, lower, upper = torch.linalg.lu(mixing)
                conv = block.flows[1]
                conv.P.copy_(p), conv.L.copy_(lower), conv.U.copy_(upper.triu(1))
                conv.sign_S.copy_(upper.diag().sign()), conv.log_S.copy_(upper.diag().abs().log())
        sizes = [q.loc[..., 0].numel() for q in other.q0]
        for name, ours in (("loc", model.prior.mean), ("log_scale", model.prior.log_scale)):
            for q, part in zip(other.q0, ours.split(sizes, 1)):
                getattr(q, name).copy_(part.T.reshape(q.loc.shape))


@torch.no_grad()
def test_both_compute_the_same_density():
    """Same rotations, means and data: normflows' log-likelihoods are ours, level by level in the same order.

    The couplings have their starting values, a constant scale; parameters in number agree to a hundredth.
    """
    torch.manual_seed(0)
    model = worker.ours()
    other = worker.peer(model.flow.shapes)
    count = [sum(p.numel() for p in net.parameters()) for net in (model, other)]
    assert abs(count[1] / count[0] - 1) < 0.01, count
    copied(model, other)
    x, noise = torch.rand(worker.BATCH, *worker.SHAPE), torch.rand(worker.BATCH, 2, *worker.SHAPE)
    model.flow.initialise(model._padded(x, noise))
    padded = model._padded(x, noise)
    other.log_prob(padded, torch.zeros(len(x), dtype=torch.long))
    z, log_det = model.flow(padded)
    found = model.prior.log_prob(z) + log_det[:, None]
    for k in range(worker.CLASSES):
        wanted = other.log_prob(padded, torch.full((len(x),), k))
        torch.testing.assert_close(found[:, k], wanted, rtol=1e-3, atol=0.1)
    torch.testing.assert_close(worker.once(other, padded), found, rtol=1e-3, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("prior", ["gaussian", "split"])
def test_all_classes_at_once_are_the_classes_one_by_one(prior):
    torch.manual_seed(0)
    model = worker.ours(prior)
    for parameter in model.prior.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    x, noise = torch.rand(worker.BATCH, *worker.SHAPE), torch.rand(worker.BATCH, 2, *worker.SHAPE)
    together = model.log_likelihoods(x, noise)
    z, log_det = model.encode(x, noise)
    for k in range(worker.CLASSES):
        if prior == "split":
            alone = model.prior.log_prob(z, torch.full((len(x),), k))
        else:       # the formula itself, not the matrix products
            scaled = (z - model.prior.mean[k]) / model.prior.log_scale[k].exp()
            alone = -(0.5 * scaled.square() + model.prior.log_scale[k] + 0.5 * LOG_2PI).sum(1)
        torch.testing.assert_close(together[:, k], alone + log_det, rtol=1e-5, atol=0.05)

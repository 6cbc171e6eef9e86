"""Speed and reach of the minimum-norm and fixed-ball attacks beside Foolbox, on a small CNN, in one run.

``make benchmarks`` runs it, ``make test`` does not. It prints ratios and asserts no time; that ours find images no
further away it does assert. A gradient call is one image through one backward pass, counted by a hook on the model.
"""
import math
from time import perf_counter

import pytest
import torch
from foolbox import PyTorchModel
from foolbox import attacks as fb
from torch import nn
from torch.nn import functional as F

from lib.attacks.attack import attack, length
from lib.attacks.cw import cw
from lib.attacks.ddn import ddn
from lib.attacks.deepfool import deepfool
from lib.attacks.goals import escape
from lib.attacks.pgd import pgd
from lib.data import load

N, ROUNDS = 300, 2      # each climb ends at its own nearby boundary: only medians of many images agree


class Counted(nn.Module):
    """A model that counts the images its gradients were taken for."""

    def __init__(self, model):
        super().__init__()
        self.model, self.gradients = model, 0

    def forward(self, x):
        z = self.model(x)
        if z.requires_grad:
            z.register_hook(self.count)
        return z

    def count(self, gradient):
        self.gradients += len(gradient)


@pytest.fixture(scope="module")
def problem():
    data = load("digits")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, padding=1), nn.ReLU(),
                              nn.Flatten(), nn.Linear(1024, 10))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(200):
            chosen = torch.randint(len(data.train.images), (128,))
            loss = F.cross_entropy(model(data.train.images[chosen]), data.train.labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model = Counted(model).eval().requires_grad_(False)
    right = (model(data.test.images).argmax(1) == data.test.labels).nonzero()[:N, 0]
    return model, data.test.images[right], data.test.labels[right]


# name: our method and settings, Foolbox's attack, radius of the ball
PAIRS = {
    "PGD": (pgd, dict(steps=40, step=0.1), fb.L2PGD(rel_stepsize=0.1, steps=40, random_start=False), 0.4),
    "DDN": (ddn, dict(steps=100), fb.DDNAttack(steps=100), math.inf),
    "CW": (cw, dict(binary_steps=6, steps=100), fb.L2CarliniWagnerAttack(6, 100, 0.05, 0, 0.1, False), math.inf),
    "DeepFool": (deepfool, dict(steps=50), fb.L2DeepFoolAttack(steps=50), math.inf),
}


@pytest.mark.parametrize("name", PAIRS)
def test_attack_beside_foolbox(name, problem, benchmark, capsys):
    model, x, y = problem
    method, settings, rival, eps = PAIRS[name]
    goal, wrapped = escape(model, y), PyTorchModel(model, bounds=(0, 1), device="cpu")
    ball = {} if math.isinf(eps) else dict(epsilon=eps)

    def ours():
        return attack(method, goal, x, eps=eps, batch=N, **settings).x

    def theirs():
        with torch.random.fork_rng():
            return rival.run(wrapped, x, y, **ball)

    def measured(run):
        """(images, seconds per gradient call, gradient calls per image)."""
        model.gradients, start = 0, perf_counter()
        found = run()
        return found, (perf_counter() - start) / model.gradients, model.gradients / N

    benchmark.pedantic(ours, rounds=1)
    turns = [(measured(ours), measured(theirs)) for _ in range(ROUNDS if name == "CW" else 5 * ROUNDS)]
    (found, _, calls), (other, _, other_calls) = turns[0]
    second, other_second = (min(turn[i][1] for turn in turns) for i in range(2))
    reached = [model(images).argmax(1) != y for images in (found, other)]
    median, other_median = (float(torch.where(hit, length(images - x, 2), torch.inf).median())
                            for hit, images in zip(reached, (found, other)))
    with capsys.disabled():
        print(f"\n{name}: {N} images; ours, Foolbox, ratio"
              f"\n  microseconds per gradient call  {1e6 * second:8.1f} {1e6 * other_second:8.1f} {second / other_second:7.3f}"
              f"\n  gradient calls per image        {calls:8.1f} {other_calls:8.1f} {calls / other_calls:7.3f}"
              f"\n  fooled                          {reached[0].sum():8d} {reached[1].sum():8d}")
        if math.isinf(eps):
            print(f"  median L2                       {median:8.4f} {other_median:8.4f} {median / other_median:7.3f}")
    if math.isinf(eps):
        assert median < 1.02 * other_median
    else:
        assert reached[0].sum() >= reached[1].sum() - 2

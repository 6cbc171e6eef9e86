"""Attacks beside independent libraries, and beside brute force on three pixels where no library has the attack.

The models are a small CNN on scikit-learn's digits and a generative one, whose scores lie a hundred nats apart.
"""
import importlib
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lib.attacks.attack import Draws, attack, length
from lib.attacks.cw import cw
from lib.attacks.ddn import ddn
from lib.attacks.deepfool import deepfool
from lib.attacks.goals import become, energy, escape, likely, settled, unlikely
from lib.attacks.jsma import jsma
from lib.attacks.libraries import autoattack, boundary
from lib.attacks.localsearch import localsearch
from lib.attacks.noise import noise
from lib.attacks.pgd import fgsm, pgd
from lib.attacks.score_only import score_only
from lib.data import load

N, AGREES = 30, 0.02


class Densities(nn.Module):
    """log p(x|y) up to a constant: a Gaussian of width 0.1 around each of 40 training images a class."""

    def __init__(self, images, labels):
        super().__init__()
        self.centres = torch.stack([images[labels == k][:40].flatten(1) for k in range(10)])

    def forward(self, x):
        squares = (x.flatten(1)[:, None, None] - self.centres).square().sum(-1)
        return torch.logsumexp(-squares / (2 * 0.1**2), 2)


class Compressed(nn.Module):
    """-log1p(max z - z): the same argmax, and a cross-entropy that does not saturate, for a library's sake."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        z = self.model(x)
        return -torch.log1p(z.amax(1, keepdim=True) - z)


class Centred(Compressed):
    """Scores with mean zero over the classes, so that those of the others fall exactly as the target's rises."""

    def forward(self, x):
        z = self.model(x)
        return z - z.mean(1, keepdim=True)


def train(images, labels):
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(512, 10))
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(200):
        chosen = torch.randint(len(images), (128,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


@pytest.fixture(scope="module")
def models():
    """{name: model}; the CNN is trained in three seconds."""
    train_set = load("digits").train
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = {"cnn": train(train_set.images, train_set.labels),
                 "densities": Densities(train_set.images, train_set.labels)}
    return {name: model.eval().requires_grad_(False) for name, model in built.items()}


def examples(model, binary=False):
    """The first N test images that the model classifies rightly, and their labels."""
    test = load("digits").test
    images = (test.images > 0.5).float() if binary else test.images
    right = (model(images).argmax(1) == test.labels).nonzero()[:N, 0]
    assert len(right) == N
    return images[right], test.labels[right]


def median(goal, clean, images, kappa=0.0):
    """Median L2 distance, where an image that misses the goal is infinitely far."""
    assert images.min() >= 0 and images.max() <= 1
    reached = goal.value(images) > kappa - 1e-4
    return float(torch.where(reached, length(images - clean, 2), torch.inf).median())


def assert_agrees(ours, theirs):
    assert math.isfinite(theirs) and abs(ours / theirs - 1) < AGREES, (ours, theirs)


def goal_for(model, labels, targeted):
    return become(model, (labels + 1) % 10) if targeted else escape(model, labels)


# --- libraries ----------------------------------------------------------------------------------------

def adv_lib():
    """adv-lib without visdom, whose source no longer builds and which only draws its progress."""
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))
    return pytest.importorskip("adv_lib.attacks", reason="pip install --no-deps adv-lib", exc_type=ImportError)


def foolbox(model):
    import foolbox
    return foolbox, foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")


def criterion(fb, goal):
    return (fb.criteria.TargetedMisclassification if goal.targeted else fb.criteria.Misclassification)(goal.labels)


def library_ddn(library, model, goal, x):
    with torch.random.fork_rng():
        torch.manual_seed(0)    # both kick an image at random where its gradient vanishes
        if library == "adv-lib":
            return adv_lib().ddn(model, x, goal.labels, targeted=goal.targeted, levels=None)
        fb, wrapped = foolbox(model)
        return fb.attacks.DDNAttack().run(wrapped, x, criterion(fb, goal))


def library_cw(library, model, goal, x, kappa, steps):
    if library == "adv-lib":
        return adv_lib().carlini_wagner_l2(
            model, x, goal.labels, targeted=goal.targeted, confidence=kappa, learning_rate=0.05, initial_const=0.1,
            binary_search_steps=6, max_iterations=steps, abort_early=False)
    fb, wrapped = foolbox(model)
    return fb.attacks.L2CarliniWagnerAttack(6, steps, 0.05, kappa, 0.1, False).run(
        wrapped, x, criterion(fb, goal))


# adv-lib does without the parts that pages use; foolbox is there in any case
LIBRARIES = ["adv-lib", "foolbox"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name, targeted, binary", [("cnn", False, False), ("cnn", True, False), ("cnn", False, True),
                                                    ("densities", False, False), ("densities", True, True)])
def test_ddn_agrees(models, library, name, targeted, binary):
    """Image by image where both climb cross-entropy, and our own climb ends no further away.

    Rounding may decide whether a step on the boundary counts, so one image in ten may differ.
    """
    model = Compressed(models[name]).eval() if name == "densities" else models[name]
    x, y = examples(model, binary)
    goal = goal_for(model, y, targeted)
    theirs = library_ddn(library, model, goal, x)
    sign = -1 if targeted else 1
    same = replace(goal, climb=lambda z, y: sign * F.cross_entropy(z, y, reduction="none"))
    found = attack(ddn, same, x)
    assert_agrees(median(goal, x, found.x), median(goal, x, theirs))
    assert found.distance.isclose(length(theirs - x, 2), rtol=0.005, atol=0).float().mean() >= 0.9
    own = goal_for(models[name], y, targeted)
    assert median(own, x, attack(ddn, own, x).x) < (1 + AGREES) * median(own, x, theirs)


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_librarys_cross_entropy_saturates_on_densities(models, library):
    """The reason for compressing above; without it no agreement: theirs are further."""
    model = models["densities"]
    x, y = examples(model)
    goal, clean = escape(model, y), x.clone().requires_grad_()
    slope, = torch.autograd.grad(F.cross_entropy(model(clean), y, reduction="sum"), clean)
    assert (length(slope, 2) == 0).float().mean() > 0.5
    theirs = median(goal, x, library_ddn(library, model, goal, x))
    assert theirs > (1 + AGREES) * median(goal, x, attack(ddn, goal, x).x)


@pytest.mark.parametrize("library, name, targeted, binary, kappa", [
    ("adv-lib", "cnn", False, False, 0.0), ("adv-lib", "cnn", False, False, 5.0), ("foolbox", "cnn", True, False, 5.0),
    ("adv-lib", "densities", False, True, 0.0), ("foolbox", "densities", False, False, 5.0)])
def test_cw_agrees(models, library, name, targeted, binary, kappa):
    model, (x, y), steps = models[name], examples(models[name], binary), 100
    if name == "densities":     # after 100 steps the libraries are 2 % further, with a constant a hundred nats off
        x, y, steps = x[:15], y[:15], 200
    goal = goal_for(model, y, targeted)
    ours = attack(cw, goal, x, kappa=kappa, binary_steps=6, steps=steps).x
    theirs = library_cw(library, model, goal, x, kappa, steps)
    assert_agrees(median(goal, x, ours, kappa), median(goal, x, theirs, kappa))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name, binary", [("cnn", False), ("cnn", True), ("densities", False)])
def test_deepfool_agrees(models, library, name, binary):
    model = models[name]
    x, y = examples(model, binary)
    if library == "adv-lib":
        theirs = adv_lib().df(model, x, y, steps=50)
    else:
        fb, wrapped = foolbox(model)
        theirs = fb.attacks.L2DeepFoolAttack(steps=50).run(wrapped, x, y)
    goal = escape(model, y)
    assert_agrees(median(goal, x, attack(deepfool, goal, x).x), median(goal, x, theirs))


@pytest.mark.parametrize("norm, eps", [(2, 0.4), (math.inf, 0.05)])
def test_pgd_follows_foolbox(models, norm, eps):
    """Given cross-entropy to climb it walks the same path, and keeps the best of it; its own climb does no worse."""
    model = models["cnn"]
    x, y = examples(model)
    fb, wrapped = foolbox(model)
    goal = escape(model, y)
    same = replace(goal, climb=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    theirs = {2: fb.attacks.L2PGD, math.inf: fb.attacks.LinfPGD}[norm](
        rel_stepsize=0.1, steps=20, random_start=False).run(wrapped, x, y, epsilon=eps)
    one = {2: fb.attacks.L2FastGradientAttack, math.inf: fb.attacks.LinfFastGradientAttack}[norm]().run(
        wrapped, x, y, epsilon=eps)
    ours = attack(pgd, same, x, eps=eps, norm=norm, steps=20, step=0.1)
    assert (ours.value >= goal.value(theirs) - 1e-3).all()
    torch.testing.assert_close(attack(fgsm, same, x, eps=eps, norm=norm).x, one, rtol=0, atol=1e-5)
    share = float((goal.value(theirs) > 0).float().mean())
    assert 0.1 < share < 0.9 and float(ours.success.float().mean()) >= share
    assert float(attack(pgd, goal, x, eps=eps, norm=norm, steps=20, step=0.1).success.float().mean()) >= share - AGREES


def test_jsma_agrees_with_art(models):
    """ART takes the two values of largest dz_t/dx; on centred scores that is what the saliency map asks for."""
    pytest.importorskip("art", reason="pip install adversarial-robustness-toolbox")
    from art.attacks.evasion import SaliencyMapMethod
    from art.estimators.classification import PyTorchClassifier
    model = Centred(models["cnn"]).eval()
    x, y = examples(model)
    goal = become(model, (y + 1) % 10)
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 8, 8), 10, clip_values=(0, 1), device_type="cpu")
    theirs = SaliencyMapMethod(classifier, theta=1.0, gamma=0.3, batch_size=N, verbose=False).generate(
        x.numpy(), F.one_hot(goal.labels, 10).numpy())
    ours = attack(jsma, goal, x, theta=1.0, gamma=0.3)
    assert_agrees(median(goal, x, ours.x), median(goal, x, torch.from_numpy(theirs)))


def test_noise_agrees_with_foolbox(models):
    model = models["cnn"]
    x, y = examples(model)
    fb, wrapped = foolbox(model)
    goal, levels = escape(model, y), 40
    radii = torch.arange(1, levels + 1) * 0.15
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, _, hits = fb.attacks.L2ClippingAwareRepeatedAdditiveGaussianNoiseAttack(repeats=30)(
            wrapped, x, y, epsilons=radii.tolist())
    theirs = torch.where(hits, radii[:, None], torch.inf).amin(0)
    # the same lengths: one level each, for every image
    ours = torch.stack([attack(noise, goal, x, eps=float(r), levels=1, tries=30).success for r in radii])
    ours = torch.where(ours, radii[:, None], torch.inf).amin(0)
    assert ours.isfinite().float().mean() > 0.5
    # the lengths are 0.15 apart and the draws differ: means of log length, of those that both reach
    both = ours.isfinite() & theirs.isfinite()
    assert abs((ours[both].log() - theirs[both].log()).mean()) < 0.1


# --- brute force on three pixels ----------------------------------------------------------------------

class ThreePixels(nn.Module):
    """log p(x, y) of four classes, each a mixture of Gaussians, over images of 1x1x3 pixels."""

    def __init__(self, modes=2, width=0.15):
        super().__init__()
        self.centres = torch.rand(4, modes, 3, generator=torch.Generator().manual_seed(3))
        self.width, self.modes = width, modes

    def forward(self, x):
        squares = (x.flatten(1)[:, None, None] - self.centres).square().sum(-1)
        log_normaliser = 1.5 * math.log(2 * math.pi * self.width**2)
        return torch.logsumexp(-squares / (2 * self.width**2), 2) - log_normaliser - math.log(4 * self.modes)


@pytest.fixture(scope="module")
def grid():
    axis = torch.linspace(0, 1, 81)
    return torch.cartesian_prod(axis, axis, axis).view(-1, 1, 1, 3)


def three_pixels(n=12, modes=2, classes=4):
    """The model and n random images that it puts into the first of its classes."""
    model = ThreePixels(modes)
    x = torch.rand(8 * n, 1, 1, 3, generator=torch.Generator().manual_seed(1))
    x = x[model(x).argmax(1) < classes][:n]
    assert len(x) == n
    return model, x, model(x).argmax(1)


def nearest_on_grid(goal, x, grid):
    """(n,) distance of the nearest grid point that reaches the goal; the optimum is at most half a cell nearer."""
    scores, nearest = goal.scores(grid), []
    for i in range(len(x)):
        reached = goal.terms(scores, goal.labels[i].expand(len(grid))).amin(1) > 0
        nearest.append(length(grid[reached] - x[i], 2).amin() if reached.any() else torch.tensor(torch.inf))
    return torch.stack(nearest)


GOALS = {
    "escape": lambda m, y: escape(m, y),
    "escape undetected": lambda m, y: escape(m, y, floor=0.5),
    "escape, no rejection": lambda m, y: escape(m, y, reject=(2, 3)),
    # ten times as sharp, the same regions: where two classes tie, a soft margin of few nats misses by up to log 2
    "become": lambda m, y: become(lambda x: 10 * m(x), (y + 1) % 4),
    "become undetected": lambda m, y: become(m, (y + 1) % 4, floor=0.5),
    "unlikely": lambda m, y: unlikely(lambda x: m(x).logsumexp(1), -8.0, len(y)),
    "likely": lambda m, y: likely(lambda x: m(x).logsumexp(1), 0.0, len(y)),
    "energy": lambda m, y: energy(m, 0, -0.5, len(y)),
}


# the radius of the sphere changes by the share gamma, which bounds how near the end is to the boundary
MINIMAL = [(ddn, dict(steps=400, radius=0.3, gamma=0.01)), (cw, dict(binary_steps=8, steps=100))]


@pytest.mark.parametrize("name", [name for name in GOALS if name not in ("escape", "escape undetected")])
@pytest.mark.parametrize("method, settings", MINIMAL)
def test_minimal_attacks_find_the_nearest_point(grid, name, method, settings):
    """One region to reach, for both are local: among several they take that of the best score, not the nearest."""
    model, x, y = three_pixels(modes=1, classes=2)
    goal = GOALS[name](model, y)
    optimum = nearest_on_grid(goal, x, grid)
    found = attack(method, goal, x, **settings)
    assert found.success.all() and (goal.value(found.x) > 0).all()
    assert_agrees(float(found.distance.median()), float(optimum.median()))


@pytest.mark.parametrize("floor", [None, 0.5])
@pytest.mark.parametrize("method, settings", MINIMAL)
def test_the_best_of_all_targets_is_the_nearest_point(grid, floor, method, settings):
    model, x, y = three_pixels(modes=1)
    goal = escape(model, y, floor=floor)
    every = [attack(method, become(model, torch.full_like(y, t), floor=floor), x, **settings).x for t in range(4)]
    distance = torch.stack([torch.where(goal.value(images) > 0, length(images - x, 2), torch.inf) for images in every])
    assert_agrees(float(distance.amin(0).median()), float(nearest_on_grid(goal, x, grid).median()))


@pytest.mark.parametrize("name", ["unlikely", "likely", "energy", "escape"])
@pytest.mark.parametrize("norm, eps", [(2, 0.12), (math.inf, 0.08)])
def test_pgd_finds_the_best_point_of_the_ball(grid, name, norm, eps):
    model, x, y = three_pixels()
    goal = GOALS[name](model, y)
    scores = goal.scores(grid)
    best = torch.stack([goal.terms(scores, goal.labels[i].expand(len(grid)))[length(grid - x[i], norm) <= eps].amax()
                        for i in range(len(x))])
    found = attack(pgd, goal, x, eps=eps, norm=norm, steps=60, starts=5)
    if name == "escape":        # climbs another quantity than its value: only whether it succeeds is comparable
        assert found.success[best > 0].all() and 0 < (best > 0).sum() < len(x)
    else:
        assert (found.value >= best - 0.02 * best.abs().clamp(min=1)).all()


def test_jsma_changes_the_pair_that_the_saliency_map_names():
    """Algorithm 3, every pair tried in turn, on scores that are not centred."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).requires_grad_(False)
        model[1].weight.mul_(5)
        x = 0.8 * torch.rand(20, 1, 2, 3)
    target = (model(x).argmax(1) + 1) % 4
    found = jsma(become(model, target), x, eps=math.inf, norm=2, draw=Draws(0, list(range(20))), theta=0.1, gamma=0.34)
    seen = set()
    for i in range(len(x)):
        slopes = torch.autograd.functional.jacobian(model, x[i:i + 1])[0].flatten(1)
        alpha, beta = slopes[target[i]], slopes.sum(0) - slopes[target[i]]
        pairs = {(p, q): float(-(alpha[p] + alpha[q]) * (beta[p] + beta[q])) for p in range(6) for q in range(p)
                 if alpha[p] + alpha[q] > 0 > beta[p] + beta[q]}
        expected, chosen = x[i].flatten().clone(), list(max(pairs, key=pairs.get)) if pairs else []
        expected[chosen] += 0.1
        torch.testing.assert_close(found[i].flatten(), expected)
        seen.add(tuple(chosen))
    assert len(seen) > 3


def test_localsearch_moves_the_pixel_whose_probe_tells_most():
    """One round of one pixel, with every pixel probed, by enumeration."""
    model, x, y = three_pixels(20)
    x = x.view(-1, 1, 3, 1)    # three pixels below each other, no channels
    goal = escape(model, y)
    moved = localsearch(goal, x, eps=math.inf, norm=2, draw=Draws(0, list(range(20))), rounds=2, pixels=1, reach=3,
                        candidates=3)
    # the first round probes one pixel at random; the second, its neighbours, here all three
    first = localsearch(goal, x, eps=math.inf, norm=2, draw=Draws(0, list(range(20))), rounds=1, pixels=1, reach=3,
                        candidates=3)
    open_ = goal.value(first) <= 0
    assert open_.sum() >= 5
    for i in open_.nonzero()[:, 0]:
        probes = first[i].repeat(3, 1, 1, 1)
        for p in range(3):
            probes[p, 0, p, 0] = float(probes[p, 0, p, 0] >= 0.5)
        p = int(goal.rows(i.repeat(3)).value(probes).argmin())
        expected, v = first[i].clone(), 1.5 * (first[i, 0, p, 0] - 0.5)
        expected[0, p, 0] = v + 0.5 - float(v > 0.5) + float(v < -0.5)
        torch.testing.assert_close(moved[i], expected)


# --- boundary and AutoAttack, which are the library's -------------------------------------------------

def starts(goal, x, grid):
    """For each image the grid point that exceeds the goal by most."""
    scores = goal.scores(grid)
    return torch.stack([grid[goal.terms(scores, goal.labels[i].expand(len(grid))).amin(1).argmax()]
                        for i in range(len(x))])


@pytest.mark.parametrize("name", ["become", "become undetected"])
def test_boundary_finds_the_nearest_point(grid, name):
    """One Gaussian a class, so that the goal is one convex region: the walk is local."""
    model, x, y = three_pixels(modes=1)
    goal = GOALS[name](model, y)
    optimum = nearest_on_grid(goal, x, grid)
    curve = []
    found = attack(boundary, goal, x, start=starts(goal, x, grid), queries=2500, curve=curve)
    assert found.success.all()
    assert_agrees(float(found.distance.median()), float(optimum.median()))
    # every query is counted, and the curve falls to what is returned
    curve = torch.stack(curve)
    assert 2498 <= len(curve) <= 2500 and (found.calls == len(curve)).all()
    assert (curve.diff(dim=0) <= 0).all() and curve[0].median() > 1.5 * curve[-1].median()
    torch.testing.assert_close(curve[-1], found.distance)


def test_boundary_sees_decisions_only(grid):
    model, x, y = three_pixels()
    start = starts(escape(model, y), x, grid)
    plain = attack(boundary, escape(model, y), x, start=start, queries=300)
    blind = replace(escape(model, y), terms=lambda z, y: escape(model, y).terms(z, y).sign(),
                    climb=lambda z, y: z[:, 0] * torch.nan)
    before = torch.get_rng_state()
    found = attack(boundary, blind, x, start=start, queries=300)
    assert found.x.equal(plain.x) and torch.get_rng_state().equal(before)


def test_boundary_refuses_what_it_cannot_do(grid):
    model, x, y = three_pixels()
    goal = escape(model, y)
    start = starts(goal, x, grid)
    start[:3] = x[:3]
    with pytest.raises(ValueError, match="start must reach the goal, but 3 of 12 images do not"):
        attack(boundary, goal, x, start=start, queries=100)
    with pytest.raises(ValueError, match="one start for each image of one batch"):
        attack(boundary, goal, x, start=start, queries=100, batch=5)
    with pytest.raises(ValueError, match="norm=inf"):
        attack(boundary, goal, x, start=start, queries=100, norm=math.inf)


class Noisy(nn.Module):
    """A random model: scores of the image plus a little noise."""

    random = True

    def __init__(self, model, scale=0.05):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.model(x + self.scale * torch.randn_like(x))


def test_settled_is_the_log_mean_exp_of_fixed_draws():
    model, x, y = three_pixels()
    noisy = Noisy(model)
    goal = settled(escape(noisy, y), draws=5, seed=7)
    before = torch.get_rng_state()
    z = goal.scores(x)
    assert torch.get_rng_state().equal(before) and not goal.random and goal.passes == 5
    assert goal.scores(x).equal(z) and not noisy(x).equal(noisy(x))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        draws = noisy(x.repeat(5, 1, 1, 1)).view(5, len(x), 4)
    torch.testing.assert_close(z, draws.exp().mean(0).log())
    assert not settled(escape(noisy, y), draws=5, seed=8).scores(x).equal(z)
    plain = escape(model, y)
    assert settled(plain) is plain


def test_boundary_on_a_random_model_is_judged_on_fresh_draws(grid):
    model, x, y = three_pixels()
    noisy = Noisy(model, 0.02)
    start = starts(escape(model, y), x, grid)
    found = attack(boundary, escape(noisy, y), x, start=start, queries=600)
    exact = attack(boundary, escape(model, y), x, start=start, queries=600)
    assert (found.calls == 10 * exact.calls).all() and found.success.float().mean() >= 0.9
    assert 0.9 < float(found.distance.median() / exact.distance.median()) < 1.5


def test_autoattack_is_no_weaker_than_one_run_of_gradients(models):
    for name, eps in (("cnn", 0.8), ("densities", 1.2)):
        x, y = (part[:4] for part in examples(models[name]))
        goal = escape(models[name], y)
        found = attack(autoattack, goal, x, eps=eps)
        assert 0 < found.success.float().mean() and (found.distance <= eps + 1e-5).all()
        assert found.success[attack(pgd, goal, x, eps=eps).success].all()


def test_autoattack_refuses_other_goals_and_flat_models(models):
    model, x, y = three_pixels()
    for name in set(GOALS) - {"escape"}:
        with pytest.raises(ValueError, match="autoattack needs a goal `escape`"):
            attack(autoattack, GOALS[name](model, y), x, eps=0.1)
    with pytest.raises(ValueError, match="on at least 4 classes, got 3 classes"):
        attack(autoattack, escape(lambda x: model(x)[:, :3], y.clamp(max=2)), x, eps=0.1)
    with pytest.raises(ValueError, match="finite eps"):
        attack(autoattack, escape(model, y), x)
    cnn = models["cnn"]
    digits, labels = (part[:3] for part in examples(cnn))
    with pytest.raises(RuntimeError, match="zero gradient"):
        attack(autoattack, escape(lambda x: cnn(x).detach() + 0 * x.sum(), labels), digits, eps=0.1)


# --- gradients from scores ----------------------------------------------------------------------------

@pytest.mark.parametrize("rule", ["nes", "spsa"])
def test_estimated_gradient_approaches_the_true_one(rule):
    model, x, y = three_pixels()
    x = 0.2 + 0.6 * x       # away from the box's edges
    seen = {}

    def look_once(goal, x, **settings):
        x = x.clone().requires_grad_()
        seen["gradient"], = torch.autograd.grad(goal.climb(goal.scores(x), goal.labels).sum(), x)
        return x.detach()

    goal = escape(model, y)
    attack(look_once, goal, x)
    true = seen["gradient"].flatten(1)
    found = attack(score_only(look_once, samples=800, sigma=0.001, rule=rule), goal, x)
    assert (F.cosine_similarity(seen["gradient"].flatten(1), true) > 0.99).all()
    torch.testing.assert_close(seen["gradient"].flatten(1).norm(dim=1), true.norm(dim=1), rtol=0.15, atol=0)
    assert (found.calls == 1 + 2 * 800).all()


def test_score_only_attack_does_not_depend_on_the_batch(models):
    """Foolbox multiplies the batch's summed loss by each image's noise: success falls from 30 % to 5 % in a batch of 100."""
    model = models["cnn"]
    x, y = (part[:8] for part in examples(model))
    run = score_only(pgd, samples=15)
    together, alone = (attack(run, escape(model, y), x, eps=0.8, steps=6, batch=batch) for batch in (8, 1))
    torch.testing.assert_close(together.x, alone.x, rtol=0, atol=1e-3)
    white = attack(pgd, escape(model, y), x, eps=0.8, steps=6)
    assert 0.5 * white.success.float().sum() <= together.success.float().sum() and together.success.any()


def test_score_only_differences_share_a_random_models_noise():
    """With fresh noise on each side the difference would be noise alone, 0.05/0.001 times the step."""
    model, x, y = three_pixels()
    goal = energy(Noisy(model, 0.02), 0, 10.0, len(x))
    plain = attack(score_only(pgd, samples=30, sigma=0.001), energy(model, 0, 10.0, len(x)), x, eps=0.2, steps=8)
    found = attack(score_only(pgd, samples=30, sigma=0.001), goal, x, eps=0.2, steps=8)
    before = energy(model, 0, 10.0, len(x)).value(x)
    gain, noisy_gain = plain.value - before, energy(model, 0, 10.0, len(x)).value(found.x) - before
    assert (noisy_gain >= 0.8 * gain - 0.3).all()


@pytest.mark.parametrize("settings", [dict(samples=0), dict(sigma=0.0), dict(rule="es")])
def test_score_only_refuses(settings):
    with pytest.raises(ValueError, match="score_only needs"):
        score_only(pgd, **settings)


@pytest.mark.parametrize("library", ["foolbox", "pyautoattack"])
def test_libraries_are_imported_where_used(library):
    assert library not in vars(importlib.import_module("lib.attacks.libraries"))

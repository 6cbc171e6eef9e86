"""The attacks: what every one must keep to, on models where the best attack is known in closed form or by search."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.attacks.attack import Found, Nearest, attack, best, into_ball, length, look
from lib.attacks.cw import cw
from lib.attacks.ddn import ddn
from lib.attacks.deepfool import deepfool
from lib.attacks.goals import become, energy, escape, expected, likely, unlikely
from lib.attacks.jsma import _pair, jsma
from lib.attacks.localsearch import localsearch
from lib.attacks.noise import _clipped, noise
from lib.attacks.pgd import fgsm, pgd

SHAPE, CLASSES = (1, 5, 5), 4
# small settings with which each method still does its work on the models below
QUICK = {pgd: dict(steps=20), fgsm: {}, ddn: dict(steps=60), cw: dict(binary_steps=3, steps=30, lr=0.1), deepfool: {},
         jsma: dict(gamma=1.0), localsearch: dict(rounds=20), noise: dict(levels=12, tries=3)}
BALL, MINIMAL = [pgd, fgsm], [ddn, cw, deepfool]
names = {"ids": lambda value: getattr(value, "__name__", None) or ("fgsm" if value is fgsm else None)}


class Linear:
    """z = W (x - 1/2) in float64, gaps near ten nats."""

    random = False

    def __init__(self, classes=CLASSES, shape=SHAPE, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.w = 10 * torch.randn(classes, math.prod(shape), generator=g, dtype=torch.float64)

    def __call__(self, x):
        return (x.flatten(1) - 0.5) @ self.w.T

    def optimum(self, x):
        """The L2 distance of the nearest other class, (n,)."""
        z = self(x)
        y = z.argmax(1)
        away = (z.amax(1, keepdim=True) - z) / torch.cdist(self.w, self.w)[y]
        return away.scatter(1, y[:, None], torch.inf).amin(1)


class Kernels:
    """log p(x|y) + log p(y) of a kernel density estimate around samples of each class: gaps near a hundred nats."""

    random = False

    def __init__(self, classes=CLASSES, shape=SHAPE, width=0.12, dtype=torch.float64, seed=0):
        g = torch.Generator().manual_seed(seed)
        middle = torch.rand(classes, 1, math.prod(shape), generator=g, dtype=torch.float64)
        spread = 0.1 * torch.randn(classes, 20, math.prod(shape), generator=g, dtype=torch.float64)
        self.centres, self.width, self.shape = (middle + spread).clamp(0, 1).to(dtype), width, shape

    def images(self, n=8):
        """n draws near centres of every class in turn, and their classes."""
        y = torch.arange(n) % len(self.centres)
        x = self.centres[y, torch.arange(n) // len(self.centres)].view(n, *self.shape)
        moved = self.width * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        return (x + moved.to(x)).clamp(0, 1), y

    def __call__(self, x):
        squares = (x.flatten(1)[:, None, None] - self.centres).square().sum(-1)
        d, n = self.centres.shape[2], self.centres.shape[1]
        constant = -d / 2 * math.log(2 * math.pi * self.width ** 2) - math.log(n * len(self.centres))
        return (-squares / (2 * self.width ** 2)).logsumexp(2) + constant


class Noisy:
    """A model whose scores carry fresh noise in every pass."""

    random = True

    def __init__(self, model, scale):
        self.model, self.scale = model, scale

    def __call__(self, x):
        z = self.model(x)
        return z + self.scale * torch.randn_like(z)


def linear_case(n=8):
    model = Linear()
    around = 0.05 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # mid-grey and a bit of a class's own pattern
    x = 0.5 + 0.004 * model.w[torch.arange(n) % CLASSES].view(n, *SHAPE) + around
    return model, x, model(x).argmax(1)


def kernel_case(n=8):
    model = Kernels()
    return model, *model.images(n)


CASES = {"linear": linear_case, "kernels": kernel_case}


def radius(method, case):
    """A finite ball for the methods that need one: about what it takes to succeed on most images."""
    return {} if method not in BALL else {"eps": 1.0 if case == "kernels" else 0.25}


def accepted(model, x, share):
    """The log-density that a share of images x exceeds, in nats."""
    return float(model(x).logsumexp(1).quantile(1 - share))


def test_the_gaps_are_near_a_hundred_nats():
    model, x, y = kernel_case(40)
    two = model(x).topk(2).values
    assert (model(x).argmax(1) == y).all() and 60 < (two[:, 0] - two[:, 1]).median() < 200


# --- what every attack keeps to -----------------------------------------------------------------------

@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", QUICK, **names)
def test_ball_box_value_and_success(method, case, norm):
    if norm == math.inf and method in MINIMAL:
        pytest.skip("measures L2 only")
    model, x, y = CASES[case]()
    goal, before = escape(model, y), x.clone()
    for eps in (0.05, 0.5):
        found = attack(method, goal, x, eps=eps, norm=norm, batch=3, **QUICK[method])
        assert torch.equal(x, before)
        assert found.x.shape == x.shape and found.x.amin() >= 0 and found.x.amax() <= 1
        assert (length(found.x - x, norm) <= eps * (1 + 1e-6)).all()
        assert (found.value >= goal.value(x)).all()
        again = torch.cat([goal.rows(slice(i, i + 1)).value(found.x[i:i + 1]) for i in range(len(x))])
        assert torch.equal(found.success, again > 0)
        torch.testing.assert_close(found.value, again)
        torch.testing.assert_close(found.distance, length(found.x - x, norm))
        assert (found.calls > 0).all() and not found.frozen.any()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", QUICK, **names)
def test_every_attack_succeeds_somewhere(method, case):
    model, x, y = CASES[case]()
    found = attack(method, escape(model, y), x, **radius(method, case), **QUICK[method])
    # on kernels a single step and few pixels do not get far
    assert found.success.double().mean() >= (0.25 if method in (fgsm, jsma) else 0.75)


@pytest.mark.parametrize("method", QUICK, **names)
def test_same_seed_same_bits_and_the_callers_randomness_untouched(method):
    model, x, y = kernel_case()
    torch.manual_seed(5)
    state, goal, extra = torch.get_rng_state(), escape(Noisy(model, 1.0), y), radius(method, "kernels")
    first = attack(method, goal, x, seed=3, **extra, **QUICK[method])
    torch.rand(7)
    second = attack(method, goal, x, seed=3, **extra, **QUICK[method])
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    other = attack(method, goal, x, seed=4, **extra, **QUICK[method])
    assert not torch.equal(first.value, other.value)
    torch.manual_seed(5)
    torch.rand(7)
    expected_state = torch.get_rng_state()
    torch.set_rng_state(state)
    attack(method, goal, x, seed=3, **extra, **QUICK[method])
    torch.rand(7)
    assert torch.equal(torch.get_rng_state(), expected_state)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", QUICK, **names)
def test_an_image_does_not_depend_on_its_batch(method, case):
    model, x, y = CASES[case](6)
    extra = {**radius(method, case), **QUICK[method]} | ({"starts": 3} if method is pgd else {})
    whole, parts = (attack(method, escape(model, y), x, batch=batch, seed=2, **extra) for batch in (6, 4))
    torch.testing.assert_close(whole.x, parts.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", QUICK, **names)
def test_no_room_no_change(method):
    model, x, y = kernel_case()
    found = attack(method, escape(model, y), x, eps=0, **QUICK[method])
    assert torch.equal(found.x, x) and not found.success.any() and not found.distance.any()


@pytest.mark.parametrize("method", QUICK, **names)
def test_a_constant_added_to_all_scores_changes_nothing(method):
    model, x, y = kernel_case()
    extra = {**radius(method, "kernels"), **QUICK[method]}
    plain = attack(method, escape(model, y), x, **extra)
    moved = attack(method, escape(lambda x: model(x) - 1000, y), x, **extra)
    torch.testing.assert_close(plain.x, moved.x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", QUICK, **names)
def test_scores_a_hundred_times_as_large_do_not_save_the_model(method, case):
    model, x, y = CASES[case]()
    extra = {**radius(method, case), **QUICK[method]}
    plain = attack(method, escape(model, y), x, **extra)
    loud = attack(method, escape(lambda x: 100 * model(x), y), x, **extra)
    assert loud.success.sum() >= plain.success.sum()
    if method in MINIMAL:
        assert loud.distance.median() <= 1.05 * plain.distance.median()


@pytest.mark.parametrize("method", [pgd, ddn, cw, deepfool], **names)
def test_a_gradient_that_is_not_finite_is_frozen_and_counted(method):
    linear, x, y = linear_case()

    def model(x):
        # the derivative of the root at 0 is infinite, times 0 it is not a number
        first = x.flatten(1)[:, :1]
        broken = (first * (first > 0.5)).sqrt() * 0
        return linear(x) + broken
    found = attack(method, escape(model, y), x, **radius(method, "linear"), **QUICK[method])
    dark = x.flatten(1)[:, 0] <= 0.5
    assert 0 < dark.sum() < len(x)
    assert found.frozen[dark].all() and not found.success[dark].any()
    assert found.x.isfinite().all() and found.success[~dark & ~found.frozen].all()
    assert (~dark & ~found.frozen).any()


# --- the methods for themselves -----------------------------------------------------------------------

@pytest.mark.parametrize("method, slack", [(ddn, 1.25), (cw, 1.25), (deepfool, 1.03)], **names)
def test_the_nearest_boundary_of_a_linear_model(method, slack):
    model, x, y = linear_case(20)
    found = attack(method, escape(model, y), x, **{ddn: dict(radius=0.3), cw: dict(steps=100)}.get(method, {}))
    assert found.success.all()
    assert (found.distance >= model.optimum(x)).all()
    assert (found.distance <= slack * model.optimum(x)).all()


def test_pgd_finds_the_boundary_exactly_where_it_lies_in_the_ball():
    model, x, y = linear_case(40)
    eps, optimum = float(model.optimum(x).median()), model.optimum(x)
    found = attack(pgd, escape(model, y), x, eps=eps)
    assert found.success[optimum < 0.97 * eps].all() and not found.success[optimum > eps].any()


@pytest.mark.parametrize("method", [ddn, cw], **names)
def test_pixels_at_the_edge_of_the_box_move(method):
    model = Kernels()
    x, y = model.images(20)
    x = (x >= 0.5).double()
    reference = attack(ddn, escape(model, y), x).distance.median()
    found = attack(method, escape(model, y), x, **({"steps": 100, "binary_steps": 4} if method is cw else {}))
    assert found.success.all() and found.distance.median() <= 1.1 * reference


def test_kappa_is_met():
    model, x, y = kernel_case()
    plain, sure = (attack(cw, escape(model, y), x, kappa=kappa, **QUICK[cw]) for kappa in (0.0, 5.0))
    assert sure.success.all() and (sure.value > 5).all() and (plain.value < 5).all()


def test_more_steps_and_more_starts_never_lower_success():
    model, x, y = kernel_case(12)
    goal = escape(model, y)
    few, more = (attack(pgd, goal, x, eps=0.8, steps=steps, step=0.1) for steps in (3, 12))
    assert (more.value >= few.value).all() and more.success.sum() > few.success.sum()
    one, five = (attack(pgd, goal, x, eps=0.8, steps=4, starts=starts) for starts in (1, 5))
    assert (five.value >= one.value).all()
    for method, setting, numbers in ((ddn, "steps", (5, 20, 80)), (cw, "steps", (5, 20, 60)),
                                     (cw, "binary_steps", (1, 3, 6)), (deepfool, "steps", (1, 5, 20))):
        found = [attack(method, goal, x, **{**QUICK[method], setting: number}) for number in numbers]
        shares = [int(f.success.sum()) for f in found]
        assert shares == sorted(shares) and shares[-1] == len(x)


@pytest.mark.parametrize("method", [pgd, ddn, cw], **names)
def test_a_detector_is_evaded_or_the_attack_does_not_count(method):
    model, x, y = kernel_case(16)
    floor, extra = accepted(model, x, 0.8), {pgd: dict(eps=2.5), ddn: {}, cw: dict(steps=150)}[method]
    blind = attack(method, escape(model, y), x, **extra)
    aware = attack(method, escape(model, y, floor), x, **extra)
    fooled = model(aware.x).argmax(1) != y
    passed = model(aware.x).logsumexp(1) > floor
    assert torch.equal(aware.success, fooled & passed)
    assert (model(blind.x).logsumexp(1) > floor).double().mean() < 0.2 and blind.success.all()
    assert aware.success.double().mean() > 0.7


def test_an_answer_that_means_no_image_never_counts():
    linear, x, y = linear_case(20)

    def model(x):
        # the last class leads as soon as the others come close
        z = linear(x)
        return torch.cat([z, z.topk(2).values.mean(1, keepdim=True) + 0.5], 1)
    careless, careful = (attack(ddn, escape(model, y, reject=reject), x) for reject in ((), (CLASSES,)))
    assert (model(careless.x).argmax(1) == CLASSES).any()
    answers = model(careful.x).argmax(1)
    assert careful.success.all() and (answers != CLASSES).all() and (answers != y).all()


@pytest.mark.parametrize("method", [ddn, cw, deepfool], **names)
def test_every_class_can_be_reached(method):
    model, x, y = kernel_case(12)
    for shift in range(1, CLASSES):
        target = (y + shift) % CLASSES
        found = attack(method, become(model, target), x, **QUICK[method])
        assert found.success.double().mean() >= 0.9
        assert (model(found.x).argmax(1) == target)[found.success].all()


def test_densities_go_up_and_down():
    model, x, y = kernel_case()
    grey = torch.full_like(x, 0.5)
    score = lambda x: model(x).logsumexp(1)    # noqa: E731
    typical = accepted(model, x, 0.5)
    up = attack(pgd, likely(score, typical, len(x)), grey, eps=3.0, starts=3)
    down = attack(pgd, unlikely(score, typical - 50, len(x)), x, eps=1.0)
    assert up.success.all() and (score(up.x) > typical).all()
    assert down.success.all() and (score(down.x) < typical - 50).all()
    level = float(model(grey)[:, 1].median()) + 20
    raised = attack(ddn, energy(model, 1, level, len(x)), grey)
    assert raised.success.all() and (model(raised.x)[:, 1] > level).all()


def test_cross_entropy_fails_without_a_word_where_the_margin_does_not():
    model = Kernels(dtype=torch.float32, width=0.09)
    x, y = model.images(40)
    goal = escape(model, y)
    blind = replace(goal, climb=lambda z, y: torch.nn.functional.cross_entropy(z, y, reduction="none"))
    ours, theirs = (attack(pgd, g, x, eps=1.0) for g in (goal, blind))
    assert ours.success.float().mean() > 0.8 and theirs.success.float().mean() < 0.4


def test_detector_aware_attacks_against_a_search_of_all_images():
    model = Kernels(classes=3, shape=(1, 1, 3), width=0.08, seed=4)
    x, y = model.images(6)
    goal = escape(model, y, accepted(model, x, 0.9))
    ticks = torch.linspace(0, 1, 31, dtype=torch.float64)
    grain = math.sqrt(3) / 30    # an image may lie a cell's diagonal off the grid
    every = torch.cartesian_prod(ticks, ticks, ticks).view(-1, 1, 1, 3)
    for method, extra in ((ddn, dict(radius=0.1)), (cw, {})):
        found = attack(method, goal, x, **extra)
        for i in range(len(x)):
            reached = every[goal.rows(torch.full((len(every),), i)).value(every) > 0]
            nearest = length(reached - x[i], 2).min()
            assert found.success[i] and found.distance[i] >= nearest - grain
            assert found.distance[i] <= 1.05 * nearest + grain, (method, i)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), d=st.integers(2, 7))
def test_jsma_takes_the_best_pair(seed, d):
    alpha, beta = torch.randn(2, d, generator=torch.Generator().manual_seed(seed))
    pairs = {(p, q): float(-(alpha[p] + alpha[q]) * (beta[p] + beta[q])) for p in range(d) for q in range(p)
             if alpha[p] + alpha[q] > 0 and beta[p] + beta[q] < 0}
    expected_pair = set(max(pairs, key=pairs.get)) if pairs else set()
    assert set(_pair(alpha, beta).nonzero()[:, 0].tolist()) == expected_pair


@pytest.mark.parametrize("theta", [1.0, -0.4])
def test_jsma_changes_few_pixels_one_way(theta):
    model, x, y = linear_case()
    target = (y + 1) % CLASSES
    found = attack(jsma, become(model, target), x, theta=theta, gamma=0.5)
    change = (found.x - x).flatten(1)
    assert found.success.any() and (change * theta >= 0).all()
    assert ((change != 0).sum(1) <= 0.5 * change.shape[1]).all()
    assert (attack(jsma, become(model, target), x, theta=theta, gamma=0.08).x != x).flatten(1).sum(1).max() == 2


def test_local_search_moves_pixels_around_the_box():
    model, x, y = kernel_case()
    found = attack(localsearch, escape(model, y), x, rounds=1, pixels=2, candidates=25)
    # one round moves two pixels: v <- 1.5 v, minus 1 (plus 1) where it leaves the box
    v = 1.5 * (x - 0.5)
    moved = torch.where(v.abs() > 0.5, v - v.sign(), v) + 0.5
    changed = found.x != x
    torch.testing.assert_close(found.x[changed], moved[changed])
    assert changed.any() and changed.flatten(1).sum(1).max() == 2


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 0.6), norm=st.sampled_from([2, math.inf]))
def test_noise_has_the_wanted_length_after_clipping(seed, share, norm):
    g = torch.Generator().manual_seed(seed)
    x, direction = torch.rand(3, *SHAPE, generator=g), torch.randn(3, *SHAPE, generator=g)
    wanted = share * torch.full((3,), 0.5 if norm == math.inf else 1.0)
    image = _clipped(x, direction, wanted, norm)
    torch.testing.assert_close(length(image - x, norm), wanted, rtol=1e-3, atol=1e-5)
    assert image.amin() >= 0 and image.amax() <= 1


# --- random models ------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [pgd, ddn, cw, deepfool], **names)
def test_on_a_random_model_success_is_most_of_the_draws(method):
    linear, x, y = linear_case(30)
    model = Noisy(linear, 6.0)
    found = attack(method, escape(model, y), x, **radius(method, "linear"), **QUICK[method])
    assert found.success.double().mean() > 0.8
    torch.manual_seed(11)
    share = torch.stack([model(found.x).argmax(1) != y for _ in range(200)]).double().mean(0)
    assert (share[found.success] > 0.5).double().mean() > 0.9
    assert found.distance[found.success].median() < 2.5 * model.model.optimum(x).median() + 0.1


def test_expected_passes_are_counted_and_calm_the_noise():
    linear, x, y = linear_case(30)
    goal = escape(Noisy(linear, 30.0), y)
    one, many = (attack(pgd, g, x, eps=0.25, steps=10) for g in (goal, expected(goal, 10)))
    assert (many.calls == 10 * one.calls).all()
    calm = escape(linear, y)
    assert calm.value(many.x).mean() > calm.value(one.x).mean()


# --- parts --------------------------------------------------------------------------------------------

@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 3), norm=st.sampled_from([2, math.inf]))
def test_into_ball_stays_in_ball_and_box_and_moves_nothing_inside(seed, eps, norm):
    g = torch.Generator().manual_seed(seed)
    clean, x = torch.rand(4, *SHAPE, generator=g), 3 * torch.randn(4, *SHAPE, generator=g)
    inside = into_ball(x, clean, eps, norm)
    assert inside.amin() >= 0 and inside.amax() <= 1
    assert (length(inside - clean, norm) <= eps * (1 + 1e-5) + 1e-7).all()
    torch.testing.assert_close(into_ball(inside, clean, eps, norm), inside)


outcomes = st.lists(st.tuples(st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0, math.nan]), st.floats(0, 3)),
                    min_size=1, max_size=6)


@given(outcomes)
def test_best_and_nearest_take_the_nearest_success_or_else_the_largest_value(tried):
    clean = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    pictures = [torch.full_like(clean, distance) for _, distance in tried]
    sane = [pair for pair in tried if not math.isnan(pair[0])]
    reached = [pair for pair in sane if pair[0] > 0]
    value, distance = min(reached, key=lambda pair: pair[1]) if reached else max(sane, default=(-math.inf, 0),
                                                                                key=lambda pair: pair[0])
    goal = escape(Linear(), torch.zeros(1, dtype=torch.long))
    held = Nearest(goal, clean)
    for picture, (v, _) in zip(pictures, tried):
        held.offer(picture, torch.tensor([v], dtype=torch.float64))
    assert float(held.value) == value
    if reached:
        assert float(held.distance) == distance == float(held.x)
    one = torch.ones(1)
    found = [Found(p, torch.tensor([v > 0]), torch.tensor([v]), torch.tensor([d]), one, one > 1, one > 1)
             for p, (v, d) in zip(pictures, tried) if not math.isnan(v)]
    if found:
        merged = best(*found)
        assert float(merged.value) == value and bool(merged.success) == bool(reached)
        assert float(merged.calls) == len(found)
        assert not reached or float(merged.distance) == pytest.approx(distance)


def test_the_best_of_all_targets_is_no_further_than_any():
    model, x, y = kernel_case(12)
    found = [attack(ddn, become(model, (y + shift) % CLASSES), x) for shift in range(1, CLASSES)]
    merged = best(*found)
    assert (merged.distance <= torch.stack([f.distance for f in found]).amin(0) + 1e-12).all()
    assert (model(merged.x).argmax(1) != y).all()


def test_look_returns_the_gradient_of_the_climb():
    model, x, y = linear_case()
    terms, gradient = look(become(model, y), x)
    step = torch.zeros_like(x)
    step[:, 0, 2, 2] = 1e-6
    goal = become(model, y)
    climb = lambda x: goal.climb(goal.scores(x), y)    # noqa: E731
    slope = (climb(x + step) - climb(x - step)) / 2e-6
    torch.testing.assert_close(gradient[:, 0, 2, 2], slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(terms.amin(1), goal.value(x))


@pytest.mark.parametrize("method, wrong, message", [
    (pgd, dict(eps=-1), "eps must be >= 0"), (pgd, dict(eps=math.nan), "eps must be >= 0"),
    (pgd, dict(eps=1, norm=1), "norm must be 2 or inf, got 1"), (pgd, dict(eps=1, batch=0), "batch must be >= 1"),
    (pgd, dict(eps=1, draws=0), "draws must be >= 1"), (pgd, dict(eps=1, grey_levels=1), "grey_levels must be >= 2"),
    (pgd, {}, "pgd needs a finite eps"), (pgd, dict(eps=1, starts=0), "starts=0"), (pgd, dict(eps=1, rule="x"), "'x'"),
    (ddn, dict(norm=math.inf), "ddn needs norm 2"), (ddn, dict(gamma=1), "gamma=1"), (ddn, dict(steps=0), "steps=0"),
    (ddn, dict(radius=0), "radius=0"),
    (cw, dict(norm=math.inf), "cw needs norm 2"), (cw, dict(kappa=-1), "kappa=-1"), (cw, dict(weight=0), "weight=0"),
    (cw, dict(lr=0), "lr=0"), (cw, dict(binary_steps=0), "binary_steps=0"), (cw, dict(steps=0), "steps=0"),
    (deepfool, dict(norm=math.inf), "deepfool needs norm 2"), (deepfool, dict(overshoot=-1), "overshoot=-1"),
    (jsma, dict(theta=0), "theta=0"), (jsma, dict(gamma=2), "gamma=2"),
    (localsearch, dict(r=3), "r=3"), (localsearch, dict(pixels=0), "pixels=0"), (noise, dict(tries=0), "tries=0"),
])
def test_bad_arguments_give_one_clear_line(method, wrong, message):
    model, x, y = linear_case(2)
    with pytest.raises(ValueError) as error:
        attack(method, escape(model, y), x, **wrong)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_images_and_goals_give_one_clear_line():
    model, x, y = linear_case(2)
    for images, goal, message in ((x + 1, escape(model, y), "pixels in"), (x * math.nan, escape(model, y), "pixels in"),
                                  (x[:1], escape(model, y), "one image for each"),
                                  (x[:0], escape(model, y[:0]), "at least")):
        with pytest.raises(ValueError, match=message):
            attack(ddn, goal, images)
    single = likely(lambda x: x.flatten(1).sum(1), 3.0, 2)
    for method in (deepfool, jsma):
        with pytest.raises(ValueError, match="at least 2 classes, got 1"):
            attack(method, single, x)
    with pytest.raises(ValueError, match="draws must be >= 1"):
        expected(single, 0)

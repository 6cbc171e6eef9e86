"""Flows without classes: exact bijections, densities that integrate to one, and clear refusals."""

import math

import pytest
import torch
from test_models import assert_bijection, perturbed

from lib import zoo_density
from lib.attacks.in_training import raise_nll
from lib.data import load
from lib.models import density
from lib.models.density import FlowDensity, cost_by_part, nll
from lib.models.protocol import bits_per_dim
from lib.models.realnvp import MaskedCoupling, RealNVPFlow

SMALL = dict(shape=(1, 4, 4), grey_levels=17, levels=2, depth=2, width=6)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("mask", ["checkerboard", "channels"])
@pytest.mark.parametrize("swapped", [False, True])
def test_masked_coupling_is_an_exact_bijection(mask, swapped):
    assert_bijection(perturbed(MaskedCoupling(4, 6, 1, mask, swapped)), (4, 2, 2))


@pytest.mark.parametrize("mask", ["checkerboard", "channels"])
def test_two_swapped_couplings_show_every_value_once(mask):
    x = torch.zeros(1, 4, 2, 2)
    shown = [MaskedCoupling(4, 6, 1, mask, swapped)._shown(x).expand(4, 2, 2) for swapped in (False, True)]
    assert torch.equal(shown[0] + shown[1], torch.ones(4, 2, 2)) and shown[0].sum() == 8


def test_what_the_mask_shows_is_only_normalised():
    coupling = perturbed(MaskedCoupling(4, 6, 1, "channels", False))
    x = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    z, _ = coupling(x)
    torch.testing.assert_close(z[:, :2], (coupling.log_scale.exp() * x + coupling.shift)[:, :2])


@pytest.mark.parametrize("shape, levels", [((1, 4, 4), 2), ((3, 4, 2), 2), ((2, 2, 2), 1)])
def test_realnvp_is_an_exact_bijection(shape, levels):
    assert_bijection(perturbed(RealNVPFlow(shape, levels, 2, 6)), shape)


def test_initialise_normalises_the_input_of_every_coupling():
    flow = perturbed(RealNVPFlow((1, 4, 4), 2, 2, 6))
    x, seen = 5 + 3 * torch.randn(256, 1, 4, 4, dtype=torch.float64), []
    flow.initialise(x)
    couplings = [coupling for level in (*flow.spatial, *flow.channel) for coupling in level]
    for coupling in couplings:
        coupling.register_forward_pre_hook(lambda c, given: seen.append(c.log_scale.exp() * given[0] + c.shift))
    flow(x)
    assert len(seen) == len(couplings) == 7
    for out in seen:
        std, mean = torch.std_mean(out, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-9, rtol=0)
        torch.testing.assert_close(std, torch.ones_like(std))


@pytest.mark.parametrize("settings", [dict(), dict(lu=True), dict(scale="tanh"), dict(family="realnvp")])
def test_log_prob_is_the_change_of_variables_from_the_image(settings):
    """log p(v) = log p(z) + log|det dz/dv| with the whole Jacobian by autograd, squeeze and logit included."""
    model = perturbed(FlowDensity(**SMALL, **settings))
    x, noise = torch.rand(2, 1, 4, 4, dtype=torch.float64), torch.rand(2, 1, 4, 4, dtype=torch.float64)
    v = (16 * x + noise) / 17

    def latents(v):        # noise = L v - (L-1) x gives back v
        return model.encode(x[:1], 17 * v[None] - 16 * x[:1])[0][0]

    jacobian = torch.autograd.functional.jacobian(latents, v[0]).reshape(16, 16)
    z = latents(v[0])
    wanted = model.prior.log_prob(z[None])[0, 0] + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(model.log_prob(x[:1], noise[:1])[0], wanted)


@pytest.mark.parametrize("family", density.FAMILIES)
def test_density_integrates_to_one(family):
    """On 1x2x2 images, by importance sampling: all of space for Glow, for RealNVP all that its logit reaches."""
    model = perturbed(FlowDensity((1, 2, 2), grey_levels=2, family=family, levels=1, depth=1, width=4), 0.1)
    u = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**16, dtype=torch.float64).view(-1, 1, 2, 2)
    if family == "glow":
        v = 0.5 + 3 * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))
        log_q = torch.distributions.Normal(0.5, 3.0).log_prob(v).flatten(1).sum(1)
    else:
        v, log_q = (u - density.MARGIN / 2) / (1 - density.MARGIN), 4 * math.log(1 - density.MARGIN)
    with torch.no_grad():       # x = 0 and noise = 2 v puts v anywhere
        mass = (model.log_prob(torch.zeros_like(v), 2 * v) - log_q).exp().mean()
    assert abs(mass - 1) < 0.02


@pytest.mark.parametrize("family", density.FAMILIES)
def test_decode_undoes_encode(family):
    model = perturbed(FlowDensity(**SMALL, family=family), 0.1)
    x = torch.randint(17, (5, 1, 4, 4)).double() / 16
    z, _ = model.encode(x, torch.full_like(x, 0.5))
    torch.testing.assert_close(model.decode(z), x)


def test_scores_are_one_class_and_bits_are_of_pixels():
    model = FlowDensity(**SMALL)
    x, noise = torch.rand(3, 1, 4, 4), torch.rand(3, 1, 4, 4)
    scores = model(x, noise)
    assert scores.shape == (3, 1) and model.log_prior == 0
    assert torch.equal(scores[:, 0], model.log_prob(x, noise))
    expected = -scores[:, 0] / (16 * math.log(2)) + math.log2(17)
    torch.testing.assert_close(bits_per_dim(scores[:, 0], model), expected)
    torch.manual_seed(1)
    one = nll(model, x, torch.zeros(3))
    torch.manual_seed(1)
    torch.testing.assert_close(one, -model.log_prob(x).mean() / 16)


def test_samples_lie_on_the_grid_and_temperature_zero_is_one_image():
    model = FlowDensity(**SMALL)
    images = model.sample(4)
    assert images.shape == (4, 1, 4, 4) and torch.equal(images, (images * 16).round() / 16)
    still = model.sample(3, temperature=0)
    assert torch.equal(still[0], still[1]) and torch.equal(still[0], still[2])


def test_other_rotations_change_nothing_else():
    models = []
    for rotations in (None, 1, 1, 2):
        torch.manual_seed(0)
        models.append(dict(FlowDensity(**SMALL, rotations=rotations).state_dict()))
    plain, one, same, two = models
    for name, value in plain.items():
        assert torch.equal(one[name], same[name])
        assert torch.equal(value, one[name]) != name.endswith("mixing.weight"), name
        assert torch.equal(one[name], two[name]) != name.endswith("mixing.weight"), name


@pytest.mark.parametrize("levels", [1, 2])
def test_the_parts_of_a_cost_add_up_to_it(levels):
    model = perturbed(FlowDensity((1, 4, 4), grey_levels=17, levels=levels, depth=2, width=6))
    x, noise = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64)
    parts = cost_by_part(model, x, noise)
    assert len(parts) == 2 * levels and not model.flow.levels[0]._forward_hooks
    torch.testing.assert_close(sum(parts.values()), -model.log_prob(x, noise))


def test_parts_name_the_level_that_pays():
    """Latents of the lowest level moved away from their mean make that level's latents dearer, nothing else."""
    model = perturbed(FlowDensity((1, 4, 4), grey_levels=17, levels=2, depth=2, width=6))
    x, noise = torch.rand(2, 3, 1, 4, 4, dtype=torch.float64)
    before = cost_by_part(model, x, noise)
    with torch.no_grad():
        model.prior.mean[:, 8:] += 100      # the top level's 8 coordinates come first
    after = cost_by_part(model, x, noise)
    moved = {name for name in before if not torch.allclose(before[name], after[name])}
    assert moved == {"latents, level 1"}


class Bowl(torch.nn.Module):
    """log p(x) = -|x - 1/2|^2: known best pushes; a gradient that is no number where `broken`."""

    def __init__(self, broken=False):
        super().__init__()
        self.broken = broken

    def score(self, x):
        value = -(x - 0.5).square().flatten(1).sum(1)
        return value * (x.sum((1, 2, 3)) * 0).sqrt() if self.broken else value


def test_the_attack_of_training_goes_to_the_corner_of_the_ball():
    x = 0.5 + 0.1 * torch.rand(4, 1, 2, 2)
    found = raise_nll(Bowl(), x, torch.zeros(4), eps=0.1, steps=10)
    torch.testing.assert_close(found, x + 0.1, rtol=0, atol=1e-5)
    edge = raise_nll(Bowl(), torch.full((1, 1, 2, 2), 0.97), torch.zeros(1), eps=0.1, steps=3)
    assert torch.equal(edge, torch.ones_like(edge))


def test_the_attack_of_training_leaves_an_image_without_a_gradient_alone():
    x = torch.rand(2, 1, 2, 2)
    assert torch.equal(raise_nll(Bowl(broken=True), x, torch.zeros(2), eps=0.1, steps=3), x)
    with pytest.raises(ValueError, match="eps > 0 .* and steps >= 1, got eps=0, steps=3"):
        raise_nll(Bowl(), x, torch.zeros(2), eps=0, steps=3)


def test_adversarial_training_lowers_the_cost_of_attacked_images(tmp_path, monkeypatch):
    """After forty steps on digits, what was trained on pushed images pays less for them than what was not."""
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    monkeypatch.setitem(zoo_density.RECIPES, "digits", zoo_density.SMALL | dict(steps=40, depth=2, width=8))
    data, paid = load("digits"), {}
    x = data.test.images[:64]
    for training in zoo_density.TRAININGS:
        model = zoo_density.density(training, data)
        pushed = raise_nll(model, x, None, eps=2 / 16, steps=10)
        torch.manual_seed(0)
        paid[training] = nll(model, pushed, None).item(), nll(model, x, None).item()
    assert paid["adversarial"][0] < paid["clean"][0] and paid["hybrid"][0] < paid["clean"][0]
    assert paid["clean"][1] < paid["adversarial"][1]
    for changes, message in [(dict(training="robust"), "training must be one of clean, adversarial, hybrid"),
                             (dict(training="clean", control="shuffled"), "control must be one of none, untrained")]:
        with pytest.raises(ValueError, match=message):
            zoo_density.density(data=data, **changes)


@pytest.mark.parametrize("change, message", [
    (dict(family="vae"), "family must be one of glow, realnvp, got 'vae'"),
    (dict(scale="exp"), "scale must be one of sigmoid, tanh, got 'exp'"),
    (dict(shape=(1, 5, 4)), "shape must have even height and width, got 5x4"),
    (dict(levels=3, shape=(1, 4, 4)), "levels must leave whole pixels"),
    (dict(family="realnvp", lu=True), "lu, scale and rotations are Glow's and must be left alone for realnvp"),
    (dict(depth=0), "depth must be >= 1, got 0"),
])
def test_bad_arguments_get_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message):
        FlowDensity(**{**SMALL, **change})
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        FlowDensity(**SMALL).sample(1, temperature=-1)

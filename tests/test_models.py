"""The flow, its priors and the protocol: exact in float64 against autograd, quadrature, formulas."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal

from lib.models import losses
from lib.models.flow import Coupling, Mixing, MultiScaleFlow, Steps
from lib.models.glow import PADDING_SCALE, ConditionalGlow
from lib.models.priors import ClassGaussian, SplitGaussian
from lib.models.protocol import GenerativeClassifier, bits_per_dim, log_mean_exp

GREY = dict(shape=(1, 8, 8), classes=10, grey_levels=17, levels=3, depth=2, width=8)
COLOUR = dict(shape=(3, 4, 4), classes=4, grey_levels=256, levels=2, depth=2, width=8)
PRIORS = ["gaussian", "split"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def perturbed(module, scale=0.2, seed=0):
    """The module in float64 with noise on every parameter, so that no zero initialisation hides a term."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def glow(prior="gaussian", **changes):
    return perturbed(ConditionalGlow(**{**GREY, **changes}, prior=prior))


def images(model, n=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randint(model.grey_levels, (n, *model.shape), generator=generator)
    return grid.double() / (model.grey_levels - 1)


def assert_bijection(module, shape):
    """log_det equals autograd's slogdet of the full Jacobian, and inverse(forward(x)) = x."""
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    z, log_det = module(x)
    size = math.prod(shape)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v[None])[0].flatten(), x[i])
        expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
        torch.testing.assert_close(log_det[i], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(module.inverse(z), x, rtol=1e-9, atol=1e-9)


# --- the bijection --------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [2, 3, 6])
def test_coupling_is_an_exact_bijection(channels):
    assert_bijection(perturbed(Coupling(channels, 8)), (channels, 3, 2))


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_are_an_exact_bijection(depth):
    assert_bijection(perturbed(Steps(4, depth, 8)), (4, 2, 3))


@pytest.mark.parametrize("shape, levels", [((2, 1, 2), 1), ((2, 4, 8), 3), ((6, 4, 4), 2)])
def test_multi_scale_flow_is_an_exact_bijection(shape, levels):
    assert_bijection(perturbed(MultiScaleFlow(shape, levels, 2, 8)), shape)


@pytest.mark.parametrize("settings_", [dict(lu=True), dict(scale="tanh"), dict(lu=True, scale="tanh")])
def test_variants_of_the_flow_are_exact_bijections(settings_):
    assert_bijection(perturbed(MultiScaleFlow((2, 4, 4), 2, 2, 8, **settings_)), (2, 4, 4))


def test_lu_starts_as_the_rotations_it_was_given_and_keeps_its_determinant():
    """Both forms start from the same draw; W of the LU form has the determinant that it claims."""
    torch.manual_seed(0)
    plain = Mixing(6, 3, lu=False).double()
    torch.manual_seed(0)
    lu = Mixing(6, 3, lu=True).double()
    torch.testing.assert_close(lu()[0], plain()[0], rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in lu.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    weight, log_det = lu()
    torch.testing.assert_close(log_det, torch.linalg.slogdet(weight).logabsdet.sum())
    assert set(dict(lu.named_buffers())) == {"permutation", "sign"}     # fixed, not trained


def test_bounded_scales_stay_within_a_factor_e():
    coupling = perturbed(Coupling(4, 8, "tanh"), 5.0)
    log_s, _ = coupling._log_scale_and_shift(10 * torch.randn(64, 2, 4, 4, dtype=torch.float64))
    assert 0.9 < log_s.abs().max() <= 1


def test_one_kept_channel_goes_through_the_same_network():
    """The gathered neighbours are the convolution itself."""
    coupling = perturbed(Coupling(2, 8), 0.5)
    x = torch.randn(3, 1, 5, 4, dtype=torch.float64)
    log_s, shift = coupling._log_scale_and_shift(x)
    h, wanted = coupling.net(x).chunk(2, dim=1)
    torch.testing.assert_close(shift, wanted)
    torch.testing.assert_close(log_s, torch.nn.functional.logsigmoid(h + 2))


def test_first_level_is_unsqueezed_and_split_halves_channels():
    flow = MultiScaleFlow((2, 32, 32), 4, 1, 8)  # the paper's MNIST: four levels on 32x32
    assert flow.shapes == [(2, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]
    assert flow.levels[0].mixing.weight.shape == (1, 2, 2)


def test_latents_are_ordered_top_level_first():
    """With every level the identity, the top latent is the first channel, the rest leaves level by level."""
    flow = MultiScaleFlow((2, 2, 2), 2, 1, 4)
    with torch.no_grad():
        for level in flow.levels:
            level.mixing.weight.copy_(torch.eye(level.mixing.weight.shape[-1]))
            level.couplings[0].net[-1].bias.zero_()
            level.couplings[0].net[-1].bias[:level.mixing.weight.shape[-1] // 2] = 40  # scale sigmoid(42) = 1
    x = torch.arange(8.0).reshape(1, 2, 2, 2)
    z, log_det = flow(x)
    assert torch.equal(z, torch.arange(8.0)[None]) and log_det.abs().max() < 1e-6


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_round_trip_of_any_weights(seed):
    flow = perturbed(MultiScaleFlow((2, 4, 4), 2, 2, 4), 0.3, seed)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(flow.inverse(flow(x)[0]), x, rtol=1e-6, atol=1e-6)


# --- priors ---------------------------------------------------------------------------------------

def test_class_gaussian_matches_the_direct_form():
    prior = perturbed(ClassGaussian(5, 12), 1.0)
    z = torch.randn(7, 12, dtype=torch.float64)
    direct = Normal(prior.mean, prior.log_scale.exp()).log_prob(z[:, None]).sum(-1)
    torch.testing.assert_close(prior.log_prob(z), direct, rtol=1e-12, atol=1e-12)


def test_class_gaussian_matches_the_direct_form_in_float32():
    prior = ClassGaussian(10, 3072)
    with torch.no_grad():
        prior.mean.normal_(generator=torch.Generator().manual_seed(0))
        prior.log_scale.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    z = 3 * torch.randn(8, 3072, generator=torch.Generator().manual_seed(2))
    exact = copy.deepcopy(prior).double().log_prob(z.double())
    assert (prior.log_prob(z) - exact).abs().max() < 2e-6 * exact.abs().max()


def test_split_gaussian_matches_the_direct_form_one_class_at_a_time():
    prior = perturbed(SplitGaussian(3, 8, 4), 0.5)
    z = torch.randn(6, 8, dtype=torch.float64)
    z_s, z_n = z[:, :3], z[:, 3:]
    every = prior.log_prob(z)
    for y in range(3):
        e_y = torch.eye(3, dtype=torch.float64)[y]
        mean, log_scale = prior.to_rest(torch.relu(prior.from_latent(z_s) + prior.from_label[y])).chunk(2, -1)
        direct = (Normal(e_y, (prior.log_variance / 2).exp()).log_prob(z_s).sum(-1)
                  + Normal(mean, log_scale.exp()).log_prob(z_n).sum(-1))
        torch.testing.assert_close(every[:, y], direct, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(prior.log_prob(z, torch.full((6,), y)), direct, rtol=1e-12, atol=1e-12)


def test_label_logits_are_the_posterior_given_z_s():
    prior = perturbed(SplitGaussian(4, 9, 4), 0.5)
    z = torch.randn(6, 9, dtype=torch.float64)
    log_s = Normal(torch.eye(4), (prior.log_variance / 2).exp()).log_prob(z[:, None, :4]).sum(-1)
    torch.testing.assert_close(prior.label_logits(z).softmax(1), log_s.softmax(1), rtol=1e-10, atol=1e-12)


def quadrature(log_density, half_width, points):
    """Integral of exp(log_density) over the square [-h, h]^2 by the midpoint rule."""
    step = 2 * half_width / points
    axis = -half_width + step * (torch.arange(points, dtype=torch.float64) + 0.5)
    grid = torch.cartesian_prod(axis, axis)
    return log_density(grid).exp().sum(0) * step**2


def test_split_density_integrates_to_one():
    """Two classes leave z_s two coordinates; z_n, one coordinate, is integrated in the outer loop."""
    prior = perturbed(SplitGaussian(2, 3, 4), 0.4)
    axis = torch.linspace(-10, 10, 81, dtype=torch.float64)

    def slice_at(z_n):
        return quadrature(lambda z: prior.log_prob(torch.cat([z, z_n.expand(len(z), 1)], 1)), 8, 80)

    total = torch.stack([slice_at(z_n) for z_n in axis]).sum(0) * (axis[1] - axis[0])
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), rtol=1e-4, atol=0)


def test_prior_samples_have_the_density_s_moments():
    torch.manual_seed(3)
    prior = perturbed(ClassGaussian(2, 3), 0.5)
    z = prior.sample(torch.ones(20_000, dtype=torch.long))
    torch.testing.assert_close(z.mean(0), prior.mean[1].detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(z.std(0), prior.log_scale[1].exp().detach(), atol=0, rtol=0.05)
    assert torch.equal(prior.sample(torch.tensor([0, 1]), temperature=0), prior.mean.detach())


def test_split_samples_have_the_density_s_entropy():
    """E[-log p(z|y)] of samples equals the Gaussian entropies averaged over z_s."""
    torch.manual_seed(3)
    prior = perturbed(SplitGaussian(2, 5, 4), 0.5)
    y = torch.ones(20_000, dtype=torch.long)
    with torch.no_grad():
        z = prior.sample(y)
        _, log_scale = prior.rest(z[:, :2], prior.from_label[y])
        entropy = prior.log_variance + log_scale.sum(1).mean() + 2.5 * (1 + math.log(2 * math.pi))
        assert abs(-prior.log_prob(z, y).mean() - entropy) < 0.05


# --- the density of images ------------------------------------------------------------------------

def test_density_of_a_one_pixel_image_integrates_to_one():
    """One pixel and its padding: p(v, u') integrates to one, so the padding's sign is right."""
    model = glow(shape=(1, 1, 1), classes=2, levels=1, grey_levels=4)

    def log_density(w):
        noise = torch.stack([4 * (w[:, 0] + 0.5), w[:, 1] / PADDING_SCALE], 1)[:, :, None, None, None]
        image = torch.zeros(len(w), 1, 1, 1, dtype=torch.float64)  # at x = 0 the dequantised pixel is v = u/4
        return model.log_likelihoods(image, noise).detach()

    # in the units of w = (v - 1/2, c u') the integral over v and u' gains 1/c
    total = quadrature(log_density, 10, 300) / PADDING_SCALE
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64), rtol=1e-3, atol=0)


def test_density_of_two_dimensions_integrates_to_one():
    flow, prior = perturbed(MultiScaleFlow((2, 1, 1), 1, 2, 8), 0.3), perturbed(ClassGaussian(3, 2), 0.3)

    def log_density(x):
        z, log_det = flow(x[:, :, None, None])
        return (prior.log_prob(z) + log_det[:, None]).detach()

    total = quadrature(log_density, 16, 300)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prior", PRIORS)
def test_log_density_is_the_change_of_variables(prior):
    """log p(x|y) - log p(z|y) equals autograd's log|det dz/d(v, u')| of the whole model, padding included."""
    model = glow(prior, shape=(1, 2, 4), classes=2, levels=2)
    x = images(model, 1)
    noise = model.draw_noise(x, torch.Generator().manual_seed(0))

    def latent(v_and_u):
        v, u = v_and_u
        return model.encode(x, torch.stack([v * 17 - 16 * x, u[None]], 1))[0].flatten()

    v = (16 * x + noise[:, 0]) / 17
    jacobian = torch.autograd.functional.jacobian(latent, torch.cat([v, noise[:, 1]]))
    expected = torch.linalg.slogdet(jacobian.reshape(16, 16)).logabsdet
    z, log_det = model.encode(x, noise)
    torch.testing.assert_close(log_det[0], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.log_likelihoods(x, noise), model.prior.log_prob(z) + expected)


def test_padding_is_worth_seven_bits_a_dimension():
    """Without the correction every padded dimension adds log2(256/2) = 7 bits (fetaya2020, Appendix A.3)."""
    model = glow(**COLOUR)
    x = images(model)
    noise = model.draw_noise(x)
    z, raw = model.flow(model._padded(x, noise))
    raw = raw[:, None] + model.prior.log_prob(z)
    bits = (raw - model.log_likelihoods(x, noise)) / math.log(2) / model.dimension
    torch.testing.assert_close(bits, torch.full_like(bits, 7.0), rtol=0, atol=1e-9)


def test_dequantised_image_lies_in_its_bin():
    model = glow()
    x = images(model, 50)
    v = model._padded(x, None)[:, :1] + 0.5
    assert torch.equal((v * 17).floor(), (x * 16).round())
    noise = model._padded(x, None)[:, 1:]
    assert 0 <= noise.min() and noise.max() < PADDING_SCALE and noise.max() > 0.99 * PADDING_SCALE


def test_decode_inverts_encode_to_the_grid():
    for prior in PRIORS:
        model = glow(prior)
        x = images(model)
        assert torch.equal(model.decode(model.encode(x)[0]), x)


@pytest.mark.parametrize("prior", PRIORS)
def test_samples_are_images(prior):
    model = ConditionalGlow(**GREY, prior=prior)
    x = model.sample(torch.arange(10))
    assert x.shape == (10, 1, 8, 8) and torch.equal((x * 16).round() / 16, x)
    assert 0 <= x.min() and x.max() <= 1
    assert model.sample(4, temperature=0.7).shape == (4, 1, 8, 8)
    with pytest.raises(ValueError, match="temperature must be >= 0, got -1"):
        model.sample(4, temperature=-1)


# --- the protocol ---------------------------------------------------------------------------------

@pytest.mark.parametrize("prior", PRIORS)
def test_scores_are_joint_and_score_is_the_evidence(prior):
    model = glow(prior)
    x = images(model)
    noise = model.draw_noise(x)
    scores = model(x, noise)
    assert scores.shape == (5, 10)
    torch.testing.assert_close(scores, model.log_likelihoods(x, noise) - math.log(10))
    torch.manual_seed(5)
    score = model.score(x)
    torch.manual_seed(5)
    torch.testing.assert_close(score, model.log_prob(x))
    # Eq. 4: -log p(x, y) = -log p(x) - log p(y|x)
    torch.testing.assert_close(scores, model.log_prob(x, noise)[:, None] + scores.log_softmax(1))


def test_bits_per_dim_of_the_uniform_density_is_log2_levels():
    model = glow()
    assert bits_per_dim(torch.zeros(()), model) == pytest.approx(math.log2(17))
    # one nat less in total costs 1/(D ln 2) bits
    assert bits_per_dim(torch.tensor(-1.0), model) == pytest.approx(math.log2(17) + 1 / (64 * math.log(2)))


class Features(GenerativeClassifier):
    space, normalised, random, classes, shape, grey_levels = "features", True, False, 3, (1, 2, 2), 256

    def forward(self, x):
        return x.flatten(1)[:, :3].log_softmax(1)


class Energies(Features):
    space, normalised = "energy", False


def test_undefined_quantities_raise():
    with pytest.raises(ValueError, match="a density of pixels, got Features: normalised scores of features"):
        bits_per_dim(torch.zeros(2), Features())
    with pytest.raises(ValueError, match="Energies"):
        Energies().score(torch.zeros(2, 1, 2, 2))
    assert Features().score(torch.zeros(2, 1, 2, 2)).abs().max() < 1e-6
    with pytest.raises(ValueError, match="space must be one of pixels.*got 'pixel'"):
        type("Mistyped", (GenerativeClassifier,), {"space": "pixel"})


def test_log_mean_exp_of_draws():
    model, x = glow(), images(glow(), 3)
    torch.manual_seed(7)
    averaged = log_mean_exp(model, x, 4)
    torch.manual_seed(7)
    draws = torch.stack([model(x) for _ in range(4)])
    torch.testing.assert_close(averaged, draws.exp().mean(0).log())
    with pytest.raises(ValueError, match="draws must be >= 1, got 0"):
        log_mean_exp(model, x, 0)


# --- losses ---------------------------------------------------------------------------------------

def test_losses_are_the_printed_formulas():
    model, x, y = glow("split"), images(glow()), torch.tensor([0, 3, 9, 1, 1])
    torch.manual_seed(1)
    scores = model(x)
    log_joint = scores[torch.arange(5), y]
    torch.manual_seed(1)
    torch.testing.assert_close(losses.base(model, x, y), -log_joint.mean() / 64)
    torch.manual_seed(1)
    expected = -(log_joint + math.log(10)).mean() / 64 - (log_joint - scores.logsumexp(1)).mean()
    torch.testing.assert_close(losses.reweight(model, x, y), expected)
    torch.manual_seed(1)
    z_s = model.encode(x)[0][:, :10]
    c = model.prior.log_variance.exp()
    log_s = torch.stack([-((z_s - e_y) ** 2).sum(1) / (2 * c) for e_y in torch.eye(10)], 1)
    expected = -(log_joint + math.log(10)).mean() / 64 - log_s.log_softmax(1)[torch.arange(5), y].mean()
    torch.manual_seed(1)
    torch.testing.assert_close(losses.split(model, x, y), expected)


# --- state ----------------------------------------------------------------------------------------

def test_only_initialise_initialises():
    model = ConditionalGlow(**GREY)
    x = images(model, 64).float()
    before = copy.deepcopy(model.state_dict())
    for mode in (True, False):
        model.train(mode)
        model(x), model.sample(2)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.initialise(x)
    assert model.initialised
    assert not torch.equal(before["flow.levels.0.log_scale"], model.flow.levels[0].log_scale)
    with pytest.raises(RuntimeError, match="this one is initialised"):
        model.initialise(x)


def test_initialise_normalises_every_actnorm():
    steps = perturbed(Steps(4, 3, 8))
    x = 5 + 3 * torch.randn(64, 4, 4, 4, dtype=torch.float64)
    steps.initialise(x)
    for k, coupling in enumerate(steps.couplings):
        out = steps.log_scale[k].exp()[:, None, None] * x + steps.shift[k][:, None, None]
        std, mean = torch.std_mean(out, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros(4, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(std, torch.ones(4, dtype=torch.float64))
        x, _ = coupling(torch.einsum("ij,bjhw->bihw", steps.mixing.weight[k], out))


@pytest.mark.parametrize("prior", PRIORS)
def test_state_survives_a_reload(prior, tmp_path):
    model = ConditionalGlow(**GREY, prior=prior)
    model.initialise(images(model, 64).float())
    torch.save(model.state_dict(), tmp_path / "m.pt")
    torch.manual_seed(1)
    fresh = ConditionalGlow(**GREY, prior=prior)
    fresh.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    x = images(model).float()
    noise = model.draw_noise(x)
    assert fresh.initialised and torch.equal(fresh(x, noise), model(x, noise))


@pytest.mark.parametrize("prior", PRIORS)
def test_input_is_not_mutated_and_gets_a_gradient(prior):
    model = glow(prior)
    x = images(model).requires_grad_()
    before = x.detach().clone()
    model(x)[:, 3].sum().backward()
    assert torch.equal(x, before) and x.grad.abs().min() > 0


def test_gradient_of_the_scores_is_right():
    model = glow(shape=(1, 2, 2), classes=2, levels=2)
    x, noise = images(model, 2).requires_grad_(), torch.rand(2, 2, 1, 2, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: model(v, noise), x)


def test_manual_seed_fixes_the_noise_and_only_it():
    model, x = glow(), images(glow())
    torch.manual_seed(3)
    first, second = model(x), model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first) and not torch.equal(first, second)
    noise = [model.draw_noise(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_result_does_not_depend_on_the_number_of_threads():
    model = perturbed(ConditionalGlow(**GREY), 0.05).float()
    x = images(model, 64).float()
    noise, threads = model.draw_noise(x), torch.get_num_threads()
    try:
        results = []
        for n in (1, 3):
            torch.set_num_threads(n)
            results.append(model(x, noise))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes, message", [
    (dict(levels=5), r"multiples of 2\*\*\(levels-1\) = 16, got levels=5 and 8x8"),
    (dict(levels=0), "levels must be >= 1, got 0"), (dict(classes=1), "classes must be >= 2, got 1"),
    (dict(grey_levels=1), "grey_levels must be >= 2, got 1"), (dict(depth=0), "depth must be >= 1, got 0"),
    (dict(width=0), "width must be >= 1, got 0"),
    (dict(prior="mixed"), "prior must be 'gaussian' or 'split', got 'mixed'"),
    (dict(shape=(1, 2, 2), levels=2, prior="split"), "at least `classes` = 10 coordinates .* which leaves 4"),
])
def test_bad_arguments_get_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message):
        ConditionalGlow(**{**GREY, **changes})


def test_wrong_image_shape_gets_one_clear_line():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        glow()(torch.zeros(2, 3, 8, 8, dtype=torch.float64))

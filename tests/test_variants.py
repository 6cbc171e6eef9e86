"""Appendix C of fetaya2020: heavy-tailed priors, label smoothing and the flow-GAN, exact in float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.models.priors import ClassGaussian
from lib.models.variants import (TAILS, FlowGAN, HeavyTailed, RobustGlow, SmoothedClusters, SmoothedGlow,
                                 flow_gan, smooth)
from lib.train import train

TINY = dict(shape=(1, 4, 4), classes=3, grey_levels=17, levels=2, depth=2, width=8)
MAKE = {**{tails: partial(RobustGlow, tails=tails) for tails in TAILS},
        "smoothed": partial(SmoothedGlow, smoothing=0.2), "flow-gan": partial(FlowGAN, critic_width=8)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def perturbed(module, scale=0.3):
    """The module in float64 with noise on every parameter, so that no zero hides a term."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def by_scipy(prior, tails, label, coordinate):
    """The density of one coordinate as scipy.stats has it."""
    mean, log_scale = (p[label, coordinate].item() for p in (prior.mean, prior.log_scale))
    families = stats.laplace, stats.cauchy, stats.norm
    laplace, cauchy, normal = (family(mean, math.exp(log_scale)).pdf for family in families)
    if tails == "mixture":
        share = 1 / (1 + math.exp(-prior.tail_logit[label, coordinate].item()))
        return lambda z: (1 - share) * normal(z) + share * cauchy(z)
    return {"laplace": laplace, "cauchy": cauchy}[tails]


# --- robust priors (C.1) ------------------------------------------------------------------------------

@pytest.mark.parametrize("tails", TAILS)
def test_heavy_tailed_prior_is_the_density_of_scipy(tails):
    prior = perturbed(HeavyTailed(3, 4, tails))
    z = 5 * torch.randn(20, 4, dtype=torch.float64)
    expected = [[sum(np.log(by_scipy(prior, tails, y, d)(row[d].item())) for d in range(4)) for y in range(3)]
                for row in z]
    np.testing.assert_allclose(prior.log_prob(z).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("tails", TAILS)
def test_heavy_tailed_prior_integrates_to_one(tails):
    prior = perturbed(HeavyTailed(2, 1, tails))
    for label in range(2):
        def density(v):
            with torch.no_grad():
                return prior.log_prob(torch.tensor([[v]], dtype=torch.float64))[0, label].exp().item()
        centre = prior.mean[label, 0].item()
        mass = sum(integrate.quad(density, *half, epsabs=1e-10, limit=200)[0]
                   for half in ((-math.inf, centre), (centre, math.inf)))
        assert mass == pytest.approx(1, abs=1e-8)


@pytest.mark.parametrize("tails", TAILS)
def test_samples_of_a_heavy_tailed_prior_follow_its_density(tails):
    prior = perturbed(HeavyTailed(2, 1, tails))
    z = prior.sample(torch.ones(4000, dtype=torch.int64)).detach().numpy()[:, 0]
    density = by_scipy(prior, tails, 1, 0)
    # an independent distribution function: the density integrated from its centre
    at = np.quantile(z, [0.02, 0.2, 0.4, 0.6, 0.8, 0.98])
    centre = prior.mean[1, 0].item()
    expected = [0.5 + integrate.quad(density, centre, edge)[0] for edge in at]
    np.testing.assert_allclose([(z <= edge).mean() for edge in at], expected, atol=0.025)


def test_temperature_scales_the_spread():
    prior = HeavyTailed(2, 3, "laplace")
    torch.manual_seed(1)
    wide = prior.sample(torch.tensor([0, 1]))
    torch.manual_seed(1)
    torch.testing.assert_close(prior.sample(torch.tensor([0, 1]), temperature=0.5), 0.5 * wide)


def test_a_tail_costs_less_than_the_normal_one():
    far = torch.full((1, 1), 30.0)
    costs = {tails: -HeavyTailed(1, 1, tails).log_prob(far).item() for tails in TAILS}
    assert costs["cauchy"] < costs["mixture"] < costs["laplace"] < -ClassGaussian(1, 1).log_prob(far).item()


# --- label smoothing (C.2) ----------------------------------------------------------------------------

def random_scores(seed, classes, spread, n=50):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(n, classes, dtype=torch.float64, generator=generator)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.01, 300), st.floats(0.001, 1))
def test_label_smoothing_keeps_its_bound(seed, classes, spread, part):
    smoothing = part * (1 - 1 / classes)
    log_p = random_scores(seed, classes, spread)
    smoothed, bound = smooth(log_p, smoothing), math.log(smoothing / (classes - 1))
    assert (smoothed - log_p.amax(1, keepdim=True) >= bound - 1e-9).all()
    assert (smoothed.log_softmax(1) >= bound - 1e-9).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.floats(0.01, 0.99))
def test_label_smoothing_is_the_sum_over_clusters(seed, classes, smoothing):
    p = random_scores(seed, classes, 2).exp()
    others = p.sum(1, keepdim=True) - p
    expected = (1 - smoothing) * p + smoothing / (classes - 1) * others
    torch.testing.assert_close(smooth(p.log(), smoothing).exp(), expected, rtol=1e-10, atol=0)
    # mixing over uniform labels gives back the mixture over clusters: log p(x) is untouched
    torch.testing.assert_close(expected.mean(1), p.mean(1))


def test_bound_is_attained_and_ends_at_one_minus_one_over_c():
    other = torch.tensor([[0.0, 1000.0, 0.0]], dtype=torch.float64)
    assert smooth(other, 0.1)[0, 0].item() - 1000 == pytest.approx(math.log(0.1 / 2), abs=1e-9)
    # beyond 1 - 1/3 the label's own cluster is the rarest, and the first inequality breaks
    assert smooth(other, 0.9)[0, 1].item() - 1000 < math.log(0.9 / 2) - 1


def test_smoothed_clusters_draw_the_label_with_its_probability():
    prior = SmoothedClusters(ClassGaussian(4, 1), 0.3)
    prior.clusters.mean.data = 100 * torch.arange(4.0)[:, None]
    drawn = (prior.sample(torch.full((4000,), 2)) / 100).round().long()[:, 0]
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.1, 0.7, 0.1]), atol=0.03, rtol=0)


@pytest.mark.parametrize("smoothing", [0, 1, -0.1, 1.5])
def test_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing must be in \(0, 1\), got"):
        smooth(torch.zeros(1, 3), smoothing)


# --- models -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MAKE)
def test_variants_differ_from_each_other_in_their_description(name):
    model = MAKE[name](**TINY)
    assert isinstance(model, ConditionalGlow) and model.config != ConditionalGlow(**TINY).config
    assert sum(MAKE[other](**TINY).config == model.config for other in MAKE) == 1


@pytest.mark.parametrize("name", MAKE)
def test_variants_score_and_sample_and_learn(name):
    images, labels = torch.randint(17, (64, 1, 4, 4)) / 16, torch.arange(64) % 3
    model = MAKE[name](**TINY)
    loss = partial(flow_gan, weight=0.01) if name == "flow-gan" else losses.reweight
    with torch.no_grad():
        model.initialise(images)
        before = losses.reweight(model, images, labels).item()
    train(model, loss, (images, labels), steps=20, batch=32, lr=3e-3, clip=5.0)
    with torch.no_grad():
        assert losses.reweight(model, images, labels).item() < before - 0.1
        assert model(images).shape == (64, 3) and model(images).isfinite().all()
    assert model.sample(labels[:6]).shape == (6, 1, 4, 4)


def test_flow_gan_starts_from_the_weights_of_its_flow():
    torch.manual_seed(3)
    plain = ConditionalGlow(**TINY).state_dict()
    torch.manual_seed(3)
    model = FlowGAN(**TINY).state_dict()
    assert all(torch.equal(model[name], tensor) for name, tensor in plain.items())


def test_each_player_of_the_flow_gan_feels_only_its_own_term():
    model = FlowGAN(**TINY, critic_width=8)
    x, y = torch.randint(17, (8, 1, 4, 4)) / 16, torch.arange(8) % 3

    def gradients(of, parameters):
        torch.manual_seed(5)
        return torch.autograd.grad(of(), parameters, allow_unused=True)

    def players():
        noise = model.draw_noise(x)
        real = (16 * x + noise[:, 0]) / 17
        false = (model.flow.inverse(model.prior.sample(y))[:, :1] + 0.5).clamp(0, 1)
        return real, false

    def of_critic():
        real, false = players()
        return (1 - model.critic(real, y)).relu().mean() + (1 + model.critic(false, y)).relu().mean()

    def of_flow():
        return -model.critic(players()[1], y).mean()

    def adversarial():
        return flow_gan(model.eval(), x, y, weight=1.0)

    critic = list(model.critic.parameters())
    flow = [*model.flow.parameters(), *model.prior.parameters()]
    model.eval()                            # spectral norms stand still, so that calls can be compared
    for got, wanted in zip(gradients(adversarial, critic), gradients(of_critic, critic)):
        torch.testing.assert_close(got, wanted)
    torch.manual_seed(5)
    players()                               # the likelihood term draws its noise after the players'
    likelihood = torch.autograd.grad(losses.reweight(model, x, y), flow, allow_unused=True)
    wanted = gradients(of_flow, flow)
    assert max(g.abs().max() for g in wanted if g is not None) > 1e-6
    for got, adversary, rest in zip(gradients(adversarial, flow), wanted, likelihood):
        expected = sum(g for g in (adversary, rest) if g is not None)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tails", ["", "student"])
def test_unknown_tails_are_refused(tails):
    with pytest.raises(ValueError, match="tails must be one of laplace, cauchy, mixture, got"):
        RobustGlow(**TINY, tails=tails)

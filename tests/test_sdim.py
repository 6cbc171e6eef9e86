"""lib.models.sdim: the density of features, the critic, the objective, the twin, and how they train."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F

from lib import train, zoo_sdim
from lib.data import load
from lib.models import sdim
from lib.models.protocol import bits_per_dim

SHAPE, FILTERS = (1, 8, 8), (2, 4, 4, 8)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = sdim.SDIM(SHAPE, 3, 17, filters=FILTERS, d=5, critic=6).double()
    with torch.no_grad():
        model.log_std.normal_(std=0.5)
    return model.eval()


def images(n=6, seed=1):
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def count(module):
    return sum(p.numel() for p in module.parameters())


# --- architecture ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, channels, twin, extra", [(1, 1, 1_228_394, 163_383), (3, 3, 4_366_250, 163_383)])
def test_the_papers_networks_have_the_ledgers_counts(n, channels, twin, extra):
    shape = channels, 32, 32
    assert count(sdim.Twin(shape, 10, n=n)) == twin
    assert count(sdim.SDIM(shape, 10, n=n)) == twin + extra


@pytest.mark.parametrize("n", [1, 3])
def test_the_encoder_has_8n_plus_2_layers(n):
    layers = [m for m in sdim.ResNet((3, 32, 32), 64, n).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
              and getattr(m, "kernel_size", (3, 3)) != (1, 1)]
    assert len(layers) == 8 * n + 2


@pytest.mark.parametrize("side, maps", [(32, [32, 16, 8, 4]), (28, [28, 14, 7, 4]), (16, [16, 8, 4, 4]), (8, [8, 4, 4, 4])])
def test_stages_halve_the_map_down_to_four_pixels(side, maps):
    encoder, x = sdim.ResNet((1, side, side), 5, filters=FILTERS), torch.rand(2, 1, side, side)
    assert [encoder.local_and_global(x, stage)[0].shape[-1] for stage in range(4)] == maps


def test_local_and_global_features_are_of_the_stage_asked_for(model):
    local, xhat = model.features(images())
    assert local.shape == (6, FILTERS[-1], 4, 4) and xhat.shape == (6, 5)
    authors = sdim.SDIM(SHAPE, 3, filters=FILTERS, d=5, critic=6, variant="authors")
    assert authors.features(images().float())[0].shape[1] == FILTERS[1]


# --- the density of features ----------------------------------------------------------------------------------------

def test_log_prob_is_the_sum_of_normal_log_densities(model):
    xhat = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mean, std = model.mean.detach().numpy(), model.log_std.detach().exp().numpy()
    wanted = stats.norm.logpdf(xhat.numpy()[:, None], mean, std).sum(2)
    assert np.abs(model.log_prob(xhat).detach().numpy() - wanted).max() < 1e-12


def test_scores_are_joint_and_their_space_is_features(model):
    x = images()
    assert torch.equal(model(x), model.log_prob(model.encoder(x)) - math.log(3))
    assert (model.space, model.normalised, model.random) == ("features", True, False)
    assert torch.equal(model.score(x), model(x).logsumexp(1))
    with pytest.raises(ValueError, match="bits_per_dim needs a density of pixels, got SDIM: normalised scores of features"):
        bits_per_dim(model(x), model)


def test_the_twin_has_logits_and_no_density():
    twin = sdim.Twin(SHAPE, 3, filters=FILTERS).eval()
    assert twin(images().float()).shape == (6, 3) and twin.space == "posterior"
    with pytest.raises(ValueError, match="score needs a normalised model"):
        twin.score(images().float())


# --- bounds and objective -------------------------------------------------------------------------------------------

def test_the_critic_reads_one_position_and_the_global_features(model):
    local, xhat = model.features(images())
    at = torch.cat([local[:, :, 1, 2], xhat], 1)[:, :, None, None]
    assert torch.allclose(model.critic(local, xhat)[:, 1 * 4 + 2], model.T(at).flatten(), atol=1e-12)


def test_bounds_of_a_critic_that_knows_nothing():
    zero, one = torch.zeros(5, 4), torch.ones(5, 4)
    assert sdim.jsd_bound(zero, zero).item() == pytest.approx(-2 * math.log(2))
    assert sdim.dv_bound(zero, zero).item() == pytest.approx(0)
    assert sdim.nwj_bound(one, one).item() == pytest.approx(0)


@given(st.floats(-0.7, 0.7), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_bounds_meet_the_information_of_correlated_gaussians_at_the_log_ratio(rho, seed):
    """T = log dJ/dM attains Donsker-Varadhan, T + 1 Eq. 2; and at any T the second is at most the first."""
    a, e, b = torch.randn(3, 100_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def log_ratio(x, z):
        return -0.5 * math.log(1 - rho**2) - (rho**2 * (x**2 + z**2) - 2 * rho * x * z) / (2 * (1 - rho**2))

    joint, product = log_ratio(a, rho * a + math.sqrt(1 - rho**2) * e), log_ratio(a, b)
    information = -0.5 * math.log(1 - rho**2)
    assert sdim.dv_bound(joint, product).item() == pytest.approx(information, abs=0.04)
    assert sdim.nwj_bound(joint + 1, product + 1).item() == pytest.approx(information, abs=0.04)
    assert sdim.nwj_bound(joint + a, product + a) <= sdim.dv_bound(joint + a, product + a) + 1e-12


def test_objective_is_the_sum_that_the_paper_prints(model):
    x, y, k = images(), torch.tensor([0, 1, 2, 0, 1, 2]), 10.0
    local, xhat = model.features(x)
    z = model.log_prob(xhat)
    mi = nll = margin = 0.0
    for n in range(6):
        m = n - 1                                    # the image that lends its local features
        positive, negative = model.critic(local[[n]], xhat[[n]]), model.critic(local[[m]], xhat[[n]])
        mi += (F.softplus(-positive) + F.softplus(negative)).mean() / 6
        nll -= z[n, y[n]] / 6
        margin += sum((z[n, c] + k - z[n, y[n]]).relu() ** 2 for c in range(3) if c != y[n]) / 6 / 2
    found = sdim.parts(model, x, y)
    for got, wanted in zip(found, (mi, nll, margin)):
        assert got.item() == pytest.approx(wanted.item(), rel=1e-10)
    assert sdim.sdim_loss(model, x, y, 2.0, 3.0, 4.0).item() == pytest.approx((2 * mi + 3 * nll + 4 * margin).item(), rel=1e-10)


def test_margin_is_zero_exactly_where_every_gap_is_large_enough():
    y = torch.tensor([0, 0])
    enough, short = torch.tensor([[10.0, 0.0, -5.0], [12.0, 2.0, 1.0]]), torch.tensor([[10.0, 0.0, -5.0], [9.0, 0.0, 0.0]])
    assert sdim.gaussian_parts(enough, y)[1] == 0
    assert sdim.gaussian_parts(short, y)[1] == pytest.approx(2 / 2 / 2)          # two gaps of one nat too few
    assert sdim.gaussian_parts(short * 3, y, margin=33.0)[1] > sdim.gaussian_parts(short * 3, y, margin=33.0, squared=False)[1]


def test_rescaling_the_features_lowers_the_loss_without_end(model):
    """Ledger eq7.loss_unbounded: s on features, means and deviations, 1/s on the critic's input, adds d log s."""
    x, y = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    before, s = sdim.parts(model, x, y), 2.0 ** -20
    with torch.no_grad():
        model.encoder.head[-1].weight *= s
        model.encoder.head[-1].bias *= s
        model.mean *= s
        model.log_std += math.log(s)
        model.T[0].weight[:, FILTERS[-1]:] /= s
    after = sdim.parts(model, x, y)
    assert after.mi.item() == pytest.approx(before.mi.item(), rel=1e-9)
    assert after.margin.item() == pytest.approx(before.margin.item(), rel=1e-9)
    assert (after.nll - before.nll).item() == pytest.approx(5 * math.log(s), rel=1e-9)


def test_the_authors_objective_divides_by_d_and_by_three():
    torch.manual_seed(0)
    model, x, y = sdim.SDIM(SHAPE, 3, filters=FILTERS, d=5, critic=6, variant="authors").eval(), images().float(), torch.arange(6) % 3
    local, xhat = model.features(x)
    z = model.log_prob(xhat) / 5
    own = z.gather(1, y[:, None])
    hinge = ((z + 5 - own).relu().sum(1) - 5) / 2          # the own class contributes the margin itself
    mi = F.softplus(-model.critic(local, xhat)).mean() + F.softplus(model.critic(local.roll(1, 0), xhat)).mean()
    assert sdim.sdim_loss(model, x, y).item() == pytest.approx(0.33 * (mi - own.mean() + hinge.mean()).item(), rel=1e-5)


@pytest.mark.parametrize("call, message", [
    (lambda: sdim.SDIM(SHAPE, 3, variant="mine"), "variant must be one of paper, authors, got 'mine'"),
    (lambda: sdim.SDIM(SHAPE, 3, d=0), "d must be >= 1, got 0"),
    (lambda: sdim.ResNet(SHAPE, 3, n=0), "n must be >= 1, got 0"),
    (lambda: sdim.ResNet((1, 3, 8), 3), r"shape must be at least 4 pixels high and wide, got \(1, 3, 8\)"),
    (lambda: sdim.parts(sdim.SDIM(SHAPE, 3, filters=FILTERS), torch.rand(1, *SHAPE), torch.zeros(1, dtype=torch.long)),
     "x must hold at least 2 images, for the negative pairs, got 1"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- training -------------------------------------------------------------------------------------------------------

def test_training_resumes_with_its_batch_statistics(tmp_path):
    data = load("digits").train
    pair = data.images[:200], data.labels[:200]

    def run(path, **settings):
        torch.manual_seed(3)
        model = sdim.SDIM(SHAPE, 10, 17, filters=FILTERS, d=4, critic=4)
        return train.train(model, sdim.sdim_loss, pair, steps=6, batch=20, checkpoint=path, **settings)

    whole = run(tmp_path / "whole.safetensors")
    with pytest.raises(train.Interrupted):
        run(tmp_path / "parts.safetensors", max_minutes=0)
    resumed = run(tmp_path / "parts.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))
    assert whole.encoder.stem[1].num_batches_tracked == 6


def test_a_short_training_separates_the_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    monkeypatch.setitem(zoo_sdim.RECIPES, "digits", zoo_sdim.RECIPES["digits"] | {"filters": (4, 8, 8, 16), "steps": 60})
    data = load("digits")
    for build in (zoo_sdim.sdim, zoo_sdim.twin):
        scores = build(data)(data.train.images)
        assert (scores.argmax(1) == data.train.labels).double().mean() > 0.8
    untrained = zoo_sdim.sdim(data, control="untrained")(data.train.images)
    assert (untrained.argmax(1) == data.train.labels).double().mean() < 0.4

"""PixelCNN++: probabilities that sum to one, causality to the last bit, one class as all, the protocol."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import zoo, zoo_pixelcnn
from lib.data import load
from lib.models.pixelcnn import MIN_LOG_SCALE, ConditionalPixelCNN, log_mass, weighted
from lib.models.protocol import bits_per_dim
from lib.train import trained

GREY = dict(shape=(1, 8, 8), classes=10, grey_levels=17, depth=2, width=8)
COLOUR = dict(shape=(3, 4, 4), classes=4, grey_levels=256, depth=2, width=6)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pixelcnn(scale=0.3, **settings):
    """A model in float64 with noise on every parameter, so that no small initialisation hides a term."""
    model = ConditionalPixelCNN(**settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def images(model, n=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(model.grey_levels, (n, *model.shape), generator=generator)
    return levels.double() / (model.grey_levels - 1)


def grid(levels):
    return torch.linspace(-1, 1, levels, dtype=torch.float64)


# --- one pixel ------------------------------------------------------------------------------------

@given(st.floats(-5, 5), st.floats(MIN_LOG_SCALE, 5), st.sampled_from([2, 3, 17, 256]))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_masses_of_all_levels_sum_to_one(mean, log_scale, levels):
    mean, log_scale = (torch.tensor(v, dtype=torch.float64) for v in (mean, log_scale))
    total = log_mass(grid(levels), mean, log_scale, levels).logsumexp(0)
    assert abs(total.item()) < 1e-12


def test_masses_are_those_of_the_logistic_s_bins():
    mean, scale, levels = 0.3, 0.2, 17
    edges = torch.cat([torch.tensor([-math.inf]), grid(levels)[:-1] + 1 / 16, torch.tensor([math.inf])])
    cdf = ((edges - mean) / scale).sigmoid()
    log_p = log_mass(grid(levels), torch.tensor(mean), torch.tensor(scale).log(), levels)
    torch.testing.assert_close(log_p.exp(), cdf.diff(), rtol=1e-6, atol=1e-9)


def test_mass_is_continuous_between_levels_and_its_gradient_right():
    mean, log_scale = torch.tensor(-0.8, dtype=torch.float64), torch.tensor(-1.5, dtype=torch.float64)
    at = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    log_p = log_mass(at, mean, log_scale, 5)
    assert log_p.diff().abs().max() < 1e-3
    inside = torch.tensor([-0.93, -0.6, -0.1, 0.2, 0.77, 0.99], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: log_mass(y, mean, log_scale, 5), inside)
    # a bin's width or more from either end it is the mass of the bin around y
    y = at[5_001:15_000]
    bins = [((y + s / 4 - mean) / log_scale.exp()).sigmoid() for s in (-1, 1)]
    torch.testing.assert_close(log_p[5_001:15_000].exp(), bins[1] - bins[0])


def test_mass_far_from_the_mean_is_finite_with_its_gradient():
    y = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    log_p = log_mass(y, torch.tensor(50.0), torch.tensor(MIN_LOG_SCALE), 256)
    log_p.sum().backward()
    assert log_p.isfinite().all() and y.grad.isfinite().all()
    assert log_p[:2].max() < -1e4 and log_p[2] == 0  # the last bin reaches to infinity


# --- whole images ---------------------------------------------------------------------------------

@pytest.mark.parametrize("shape, levels", [((1, 2, 2), 3), ((3, 1, 2), 3), ((2, 2, 1), 4), ((1, 2, 3), 2)])
def test_probabilities_of_all_images_sum_to_one_for_every_class(shape, levels):
    model = pixelcnn(shape=shape, classes=3, grey_levels=levels, depth=2, width=4)
    every = torch.tensor(list(itertools.product(range(levels), repeat=model.dimension)), dtype=torch.float64)
    with torch.no_grad():
        log_density = model.log_likelihoods(every.view(-1, *shape) / (levels - 1))
    # a bin has volume L^-D
    total = (log_density - model.dimension * math.log(levels)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 3, 3)])
def test_no_pixel_sees_itself_or_a_later_one_and_each_sees_all_before_it(shape):
    """d(parameters of value i)/d(value j) is exactly zero for j >= i in the order rows, columns, channels."""
    model = pixelcnn(shape=shape, classes=2, grey_levels=5, depth=3, width=4)
    channels, size = shape[0], model.dimension

    def parameters(flat):
        y = flat.view(*shape[1:], channels).movedim(-1, 0)[None]
        mean, log_scale, coefficients = model.network(y)
        values = torch.stack([model.coloured(mean, coefficients, y[:, None]), log_scale])
        return values.sum((0, 1, 2)).movedim(0, -1).flatten()

    y = 2 * torch.rand(size, dtype=torch.float64) - 1
    jacobian = torch.autograd.functional.jacobian(parameters, y)
    order = torch.arange(size)
    assert (jacobian[order[:, None] <= order] == 0).all()
    # from the pixels before: all of them here; from the same pixel: the channels before
    assert (jacobian[order[:, None] > order] != 0).all()


@pytest.mark.parametrize("settings", [GREY, COLOUR])
def test_all_classes_at_once_are_the_classes_one_at_a_time(settings):
    model = pixelcnn(0.1, **settings)
    x = images(model)
    together = model.log_likelihoods(x)
    y = 2 * x - 1
    mean, log_scale, coefficients = model.network(y)
    for k in range(model.classes):
        total = model.dimension * math.log(model.grey_levels)
        for i in range(model.shape[0]):
            location = mean[:, k, i]
            for index, (row, earlier) in enumerate(model.pairs.T.tolist()):
                if row == i:
                    location = location + coefficients[:, k, index].tanh() * y[:, earlier]
            total = total + log_mass(y[:, i], location, log_scale[:, k, i], model.grey_levels).sum((1, 2))
        torch.testing.assert_close(together[:, k], total, rtol=1e-12, atol=1e-9)


def test_maps_add_up_to_the_likelihood():
    model = pixelcnn(0.1, **COLOUR)
    x = images(model)
    maps = model.log_likelihood_maps(x)
    assert maps.shape == (5, 4, 4, 4) and (maps <= 0).all()
    torch.testing.assert_close(maps.sum((2, 3)) + 48 * math.log(256), model.log_likelihoods(x))


# --- samples --------------------------------------------------------------------------------------

def test_samples_have_the_model_s_probabilities():
    """All 27 images of one pixel in three channels of three levels: frequencies against exp(log P)."""
    model = pixelcnn(0.5, shape=(3, 1, 1), classes=2, grey_levels=3, depth=1, width=4)
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    with torch.no_grad():
        p = model.log_likelihood_maps(every.double().view(-1, 3, 1, 1) / 2).exp()[:, 1].flatten()
    drawn = (model.sample(torch.ones(20_000, dtype=torch.long)).flatten(1) * 2).round().long()
    counts = torch.bincount(drawn @ torch.tensor([9, 3, 1]), minlength=27)
    # five standard deviations
    assert ((counts / 20_000 - p).abs() <= 5 * (p / 20_000).sqrt() + 1e-3).all()


def test_samples_of_whole_images_have_the_model_s_entropy():
    """The mean of log P over the samples of each class is the sum over all images of P log P."""
    model = pixelcnn(0.4, shape=(1, 2, 2), classes=2, grey_levels=3, depth=1, width=4)
    every = torch.cartesian_prod(*[torch.arange(3)] * 4).double().view(-1, 1, 2, 2) / 2
    with torch.no_grad():
        log_p = model.log_likelihood_maps(every).sum((2, 3))
        for y in range(2):
            samples = model.sample(torch.full((20_000,), y))
            found = model.log_likelihood_maps(samples).sum((2, 3))[:, y]
            expected = (log_p.exp() * log_p).sum(0)[y]
            assert abs(found.mean() - expected) < 5 * found.std() / 20_000**0.5


@pytest.mark.parametrize("settings", [GREY, COLOUR])
def test_samples_are_images_on_the_grey_levels(settings):
    model = ConditionalPixelCNN(**settings)
    x = model.sample(torch.arange(4))
    top = model.grey_levels - 1
    assert x.shape == (4, *model.shape) and 0 <= x.min() and x.max() <= 1
    assert torch.equal((x * top).round() / top, x)


# --- the protocol ---------------------------------------------------------------------------------

def test_bits_per_dim_is_the_code_length_of_the_grey_levels():
    model = pixelcnn(0.1, **COLOUR)
    x = images(model)
    code = -model.log_likelihood_maps(x).sum((2, 3)) / math.log(2)
    torch.testing.assert_close(bits_per_dim(model.log_likelihoods(x), model), code / 48)
    torch.testing.assert_close(model(x), model.log_likelihoods(x) - math.log(4))
    torch.testing.assert_close(model.score(x), model(x).logsumexp(1))


@pytest.mark.parametrize("settings", [GREY, COLOUR])
def test_an_untrained_model_needs_about_the_bits_of_a_grey_level(settings):
    model = ConditionalPixelCNN(**settings)
    bits = bits_per_dim(model.score(images(model).float()), model)
    assert (bits / math.log2(model.grey_levels) - 1.05).abs().max() < 0.1


@pytest.mark.parametrize("settings", [GREY, COLOUR])
def test_scores_are_finite_and_differentiable_at_the_ends_and_between_levels(settings):
    model = pixelcnn(0.1, **settings).float()
    for x in (torch.zeros(2, *model.shape), torch.ones(2, *model.shape), torch.rand(2, *model.shape)):
        x.requires_grad_()
        before = x.detach().clone()
        scores = model(x)
        scores.sum().backward()
        assert scores.isfinite().all() and x.grad.isfinite().all() and x.grad.abs().max() > 0
        assert torch.equal(x, before) and torch.equal(model(x), scores)


def test_gradient_of_the_scores_is_right_between_levels():
    model = pixelcnn(shape=(3, 2, 2), classes=2, grey_levels=9, depth=1, width=3)
    x = (0.05 + 0.9 * torch.rand(2, 3, 2, 2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(model, x)


def test_the_loss_is_the_printed_formula():
    model, y = pixelcnn(0.1, **GREY), torch.tensor([0, 3, 9, 1, 1])
    x = images(model)
    own, joint = model.log_likelihoods(x)[torch.arange(5), y], model(x)
    log_posterior = joint[torch.arange(5), y] - joint.logsumexp(1)
    for alpha in (0, 1, 1000):
        expected = -own.mean() / 64 - alpha * log_posterior.mean()
        torch.testing.assert_close(weighted(model, x, y, alpha), expected)


@pytest.mark.parametrize("changes, message", [
    (dict(classes=1), "classes must be >= 2, got 1"),
    (dict(grey_levels=1), "grey_levels must be >= 2, got 1"),
    (dict(depth=0), "depth must be >= 1, got 0"), (dict(width=0), "width must be >= 1, got 0")])
def test_bad_arguments_get_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message):
        ConditionalPixelCNN(**{**GREY, **changes})


def test_wrong_image_shape_gets_one_clear_line():
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        pixelcnn(**GREY)(torch.zeros(2, 3, 8, 8, dtype=torch.float64))


# --- training and the zoo -------------------------------------------------------------------------

def test_a_trained_model_is_read_back_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    data = load("digits").train
    build = partial(ConditionalPixelCNN, **{**GREY, "depth": 1, "width": 4})
    make = partial(trained, build, partial(weighted, alpha=1.0), data[:2], steps=3, batch=16)
    first = make()
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr("lib.train._update", None)  # a second training would fail
    second = make()
    x = data.images[:8]
    assert not second.training and torch.equal(first(x), second(x))


def test_the_zoo_trains_on_labels_or_shuffled_ones_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    data = load("digits")
    x = data.test.images[:8]
    make = partial(zoo_pixelcnn.conditional_pixelcnn, 1.0, data, size=1e-6)
    scores = {control: make(control=control)(x) for control in zoo.CONTROLS}
    assert all(not torch.equal(*pair) for pair in itertools.combinations(scores.values(), 2))
    assert not torch.equal(scores["none"], make(seed=1)(x))
    for changes, message in [(dict(size=0), "size must be > 0, got 0"),
                             (dict(control="no"), "one of none, untrained, shuffled, got 'no'")]:
        with pytest.raises(ValueError, match=message):
            make(**changes)
    with pytest.raises(ValueError, match="alpha must be >= 0, got -1"):
        zoo_pixelcnn.conditional_pixelcnn(-1, data)

"""Thresholds, the class "no image", and the split flow that classifies by its label latent."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.detect import REJECTIONS, Reject, floor, rates, threshold, two_sided
from lib.models.glow import ConditionalGlow
from lib.models.label_latent import LabelLatent
from lib.models.protocol import GenerativeClassifier, bits_per_dim


class Plane(GenerativeClassifier):
    """Two classes on one pixel, scores far apart."""
    space, normalised, random = "pixels", True, False
    classes, shape, grey_levels = 2, (1, 1, 1), 17

    def forward(self, x):
        return torch.stack([100 * x.flatten(), 40 - 300 * x.flatten()], 1)


class Energies(Plane):
    normalised = False


@given(st.floats(0, 0.9), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_thresholds_reject_the_share_asked_for(rejection, seed):
    nll = np.random.default_rng(seed).normal(size=500)
    assert np.mean(nll > threshold(nll, rejection)) == pytest.approx(rejection, abs=1 / 500)
    low, high = two_sided(nll, rejection)
    assert np.mean((nll < low) | (nll > high)) == pytest.approx(rejection, abs=2 / 500)
    assert low < high <= threshold(nll, rejection / 2) + 1e-12


def test_no_validation_image_exceeds_the_strictest_threshold_of_nothing():
    nll = np.random.default_rng(0).normal(size=100)
    assert not (nll > threshold(nll, REJECTIONS[0])).any()


def test_only_the_two_sided_test_rejects_what_is_too_likely():
    nll = np.random.default_rng(0).normal(3, 0.1, size=1000)
    attacks = np.full(50, 1.0)                                         # two bits/dim likelier than any image
    low, high = two_sided(nll, 0.05)
    assert not (attacks > threshold(nll, 0.05)).any() and (attacks < low).all() and high > low


@pytest.mark.parametrize("call", [threshold, two_sided])
@pytest.mark.parametrize("rejection", [-0.1, 1.0, float("nan")])
def test_bad_rejections_are_named(call, rejection):
    with pytest.raises(ValueError, match=r"rejection must be in \[0, 1\), got"):
        call(np.zeros(3), rejection)


@given(st.floats(-3, 12))
def test_floor_inverts_bits_per_dim(bits):
    assert bits_per_dim(torch.tensor(floor(bits, Plane()), dtype=torch.float64), Plane()).item() == pytest.approx(bits, abs=1e-12)


@given(st.floats(0, 1), st.floats(-300, 100))
@settings(deadline=None)
def test_no_image_wins_exactly_where_the_detector_rejects(pixel, cut):
    x, model = torch.tensor([[[[pixel]]]]), Plane()
    z = Reject(model, cut)(x)
    assert z.shape == (1, 3) and torch.equal(z[:, :2], model(x))
    gap = model.score(x).item() - cut
    if abs(gap) > 1e-3:                                                # float32 cannot tell the cut itself
        assert (z.argmax(1).item() == 2) == (gap < 0)


def test_reject_needs_a_density():
    with pytest.raises(ValueError, match="Reject needs a normalised model, got Energies"):
        Reject(Energies(), 0.0)


def test_rates_of_known_scores():
    found = rates(np.array([0.0, 1, 2, 3]), np.array([2.5, 4, 5, 6]))
    # of the 16 pairs only (3, 2.5) is in the wrong order
    assert found["auroc"] == 15 / 16 and found["fpr95"] == 0.25
    assert found["fpr"][0] == found["tpr"][0] == 0 and found["fpr"][-1] == found["tpr"][-1] == 1


@pytest.fixture(scope="module")
def split():
    torch.manual_seed(0)
    model = ConditionalGlow((1, 4, 4), 3, grey_levels=17, levels=2, depth=2, width=8, prior="split").double()
    for weight in model.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return model


def test_label_latent_keeps_the_likelihood_and_names_the_class_by_its_logits(split):
    x = torch.rand(20, 1, 4, 4, dtype=torch.float64)
    noise, model = split.draw_noise(x), LabelLatent(split)
    scores, (z, _) = model(x, noise), split.encode(x, noise)
    torch.testing.assert_close(scores.logsumexp(1), split.log_prob(x, noise), rtol=0, atol=1e-9)
    torch.testing.assert_close(scores.softmax(1), split.prior.label_logits(z).softmax(1), rtol=0, atol=1e-12)
    assert not torch.equal(scores.argmax(1), split(x, noise).argmax(1))  # it is another classifier


def test_label_latent_needs_the_split_prior():
    with pytest.raises(ValueError, match="flow must have the split prior, got ClassGaussian"):
        LabelLatent(ConditionalGlow((1, 4, 4), 3, levels=2, depth=1, width=4))

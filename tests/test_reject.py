"""lib.reject: thresholds a class, the rule with rejection, and the class that stands for it."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.attacks.attack import attack
from lib.attacks.ddn import ddn
from lib.attacks.goals import escape
from lib.models.protocol import GenerativeClassifier
from lib.reject import RejectByClass, class_log_prob, class_wise, rejected, thresholds


class Gaussians(GenerativeClassifier):
    """Three Gaussians of two pixels."""

    space, normalised, random, classes, shape, grey_levels = "features", True, False, 3, (1, 1, 2), 256

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor([[0.2, 0.2], [0.8, 0.2], [0.5, 0.8]]))

    def forward(self, x):
        z = -0.5 * ((x.flatten(1)[:, None] - self.mean) / 0.1).square().sum(2) - math.log(2 * math.pi * 0.01)
        return z + self.log_prior


def drawn(seed=0, n=300):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = Gaussians().mean.detach()[labels] + 0.1 * torch.randn(n, 2, generator=draw)
    return x.clamp(0, 1).view(n, 1, 1, 2), labels


def test_class_log_prob_is_free_of_the_prior():
    x, _ = drawn()
    model = Gaussians()
    assert torch.allclose(class_log_prob(model, x), model(x).double() + math.log(3), atol=1e-6)
    model.normalised = False
    with pytest.raises(ValueError, match="class_log_prob needs a normalised model, got Gaussians"):
        class_log_prob(model, x)


@pytest.mark.parametrize("percentile", [0, 1, 2, 10])
def test_thresholds_reject_their_share_of_the_correct_training_images_of_each_class(percentile):
    x, y = drawn(n=900)
    scores = class_log_prob(Gaussians(), x)
    delta, right = thresholds(scores, y, percentile), scores.argmax(1) == y
    for c in range(3):
        mine = right & (y == c)
        assert rejected(scores[mine], delta).mean() == pytest.approx(percentile / 100, abs=1 / int(mine.sum()))


def test_thresholds_ignore_mistakes_and_classes_never_found():
    scores, y = torch.tensor([[3.0, 0.0], [1.0, 5.0], [2.0, 0.0]]).double(), torch.tensor([0, 0, 1])
    assert thresholds(scores, y, 50).tolist() == [3.0, -math.inf]
    assert not rejected(torch.tensor([[0.0, 1.0]]).double(), np.array([3.0, -math.inf])).any()
    with pytest.raises(ValueError, match=r"percentile must be in \[0, 100\], got 101"):
        thresholds(scores, y, 101)


@given(st.integers(0, 10_000), st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_the_rule_rejects_at_least_what_the_union_bound_says(seed, classes):
    """Ledger sec5.2.classwise_vs_policy."""
    draw = np.random.default_rng(seed)
    scores, delta = torch.from_numpy(draw.normal(size=(200, classes))), draw.normal(size=classes)
    dbar, policy = class_wise(scores, delta).mean(), rejected(scores, delta).mean()
    assert 1 - classes * (1 - dbar) - 1e-12 <= policy <= 1
    equal = np.full(classes, delta[0])
    assert rejected(scores, equal).mean() <= class_wise(scores, equal).min() + 1e-12


def test_the_extra_class_wins_exactly_where_the_rule_rejects():
    x, y = drawn(1)
    model = Gaussians()
    delta = thresholds(class_log_prob(model, x), y, 10)
    z = RejectByClass(model, delta)(x)
    assert z.shape == (300, 4) and torch.equal(z[:, :3], model(x))
    assert torch.equal(z.argmax(1) == 3, torch.from_numpy(rejected(class_log_prob(model, x), delta)))
    with pytest.raises(ValueError, match=r"one threshold for each of its 3 classes, got Gaussians \(features\) and delta of shape \(2,\)"):
        RejectByClass(model, np.zeros(2))


def test_an_attack_that_knows_the_rule_gets_past_it_and_needs_to_go_further():
    x, y = drawn(2)
    model = Gaussians()
    scores = class_log_prob(model, x)
    delta = thresholds(scores, y, 10)
    chosen = ((scores.argmax(1) == y).numpy() & ~rejected(scores, delta)).nonzero()[0][:20]
    x, y = x[chosen], y[chosen]
    plain = attack(ddn, escape(model, y), x, steps=60)
    knowing = attack(ddn, escape(RejectByClass(model, delta), y, reject=(3,)), x, steps=60)
    caught = rejected(class_log_prob(model, plain.x), delta)
    assert plain.success.all() and caught.mean() > 0.5
    assert knowing.success.double().mean() > 0.9
    assert not rejected(class_log_prob(model, knowing.x), delta)[knowing.success].any()
    assert knowing.distance.median() > plain.distance.median()

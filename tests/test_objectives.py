"""The family of losses between likelihood and classification: its named members, its limits, its bounds."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.models.objectives import label_weighted

CLASSES = 3


def model_and_batch(seed=0):
    """A small float64 flow with noise on every parameter, eight images and their labels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ConditionalGlow((1, 4, 4), CLASSES, grey_levels=17, levels=2, depth=2, width=8).double()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return model, torch.randint(17, (8, 1, 4, 4)).double() / 16, torch.randint(CLASSES, (8,))


def value_and_gradient(loss, model, x, y):
    """The loss and its gradient as one vector, under one draw of the model's noise."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        value = loss(model, x, y)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return value.detach(), torch.cat([g.flatten() for g in gradients])


def test_weight_one_is_the_joint_likelihood():
    model, x, y = model_and_batch()
    torch.testing.assert_close(value_and_gradient(partial(label_weighted, weight=1), model, x, y),
                               value_and_gradient(losses.base, model, x, y))


def test_weight_of_one_more_than_the_dimension_is_reweight_up_to_a_constant():
    model, x, y = model_and_batch()
    weighted = partial(label_weighted, weight=model.dimension + 1)
    value, gradient = value_and_gradient(weighted, model, x, y)
    expected, expected_gradient = value_and_gradient(losses.reweight, model, x, y)
    torch.testing.assert_close(value, expected + math.log(CLASSES) / model.dimension)
    torch.testing.assert_close(gradient, expected_gradient)


def test_weight_zero_is_blind_to_labels():
    model, x, y = model_and_batch()
    blind = partial(label_weighted, weight=0)
    value, gradient = value_and_gradient(blind, model, x, y)
    other, other_gradient = value_and_gradient(blind, model, x, (y + 1) % CLASSES)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        expected = -model.log_prob(x).mean() / model.dimension
    torch.testing.assert_close(value, expected)
    assert value == other and torch.equal(gradient, other_gradient)


def test_a_blind_start_stays_blind():
    """Equal classes have equal gradients when no label enters, and unequal ones as soon as one does."""
    model, x, y = model_and_batch()
    model.prior.mean.data[:] = model.prior.mean[0].clone()
    model.prior.log_scale.data[:] = model.prior.log_scale[0].clone()
    for weight, equal in ((0, True), (1, False)):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            label_weighted(model, x, y, weight).backward()
        gradient = model.prior.mean.grad
        assert torch.allclose(gradient, gradient[:1].expand_as(gradient), rtol=1e-9, atol=1e-12) is equal
        model.zero_grad()


@settings(max_examples=20, deadline=None)
@given(weights=st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)), seed=st.integers(0, 5))
def test_the_loss_is_linear_in_the_weight_and_its_slope_is_the_label_term(weights, seed):
    model, x, y = model_and_batch(seed)
    with torch.no_grad(), torch.random.fork_rng():
        values = []
        for weight in (*weights, 0):
            torch.manual_seed(1)
            values.append(label_weighted(model, x, y, weight).item())
        torch.manual_seed(1)
        # -log p(y|x), from the pairwise gaps: log sum_k exp(s_k - s_y)
        scores = model(x)
        label = (scores - scores.gather(1, y[:, None])).logsumexp(1).mean().item()
    for weight, value in zip(weights, values):
        assert value - values[2] == pytest.approx(weight * label / model.dimension, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("weight", [-1, -1e-9, math.nan])
def test_a_weight_below_zero_is_refused(weight):
    model, x, y = model_and_batch()
    with pytest.raises(ValueError, match="weight must be >= 0, got"):
        label_weighted(model, x, y, weight)

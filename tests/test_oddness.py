"""The detector of any model, and the goal of an attacker who knows it."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lib.attacks.attack import attack
from lib.attacks.goals import escape
from lib.attacks.pgd import pgd
from lib.models.protocol import SPACES, GenerativeClassifier
from lib.oddness import oddness, unnoticed


class Linear(GenerativeClassifier):
    """Scores that are a linear map of the image, declared to be whatever the test says."""

    random = False

    def __init__(self, space="energy", normalised=False):
        super().__init__()
        self.space, self.normalised = space, normalised
        self.classes, self.shape, self.grey_levels = 3, (1, 2, 2), 256
        self.weight = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return 4 * x.flatten(1) @ self.weight


def test_each_kind_of_score_has_its_oddness():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(oddness(Linear("pixels", True), z), -z.exp().sum(1).log())
    torch.testing.assert_close(oddness(Linear("posterior"), z), -z.softmax(1).max(1).values.log())
    torch.testing.assert_close(oddness(Linear("energy"), z), -z.max(1).values)
    # logits are determined up to a constant for each image, and so is nothing that a detector may look at
    torch.testing.assert_close(oddness(Linear("posterior"), z + 7), oddness(Linear("posterior"), z))


@given(seed=st.integers(0, 1000), cut=st.floats(-5, 5), space=st.sampled_from(SPACES), normalised=st.booleans())
@settings(max_examples=40, deadline=None)
def test_unnoticed_is_another_class_and_no_odd_image(seed, cut, space, normalised):
    model, draw = Linear(space, normalised), torch.Generator().manual_seed(seed)
    x, y = torch.rand(16, 1, 2, 2, generator=draw), torch.randint(3, (16,), generator=draw)
    z = model(x)
    both = (z.argmax(1) != y) & (oddness(model, z) < cut)
    assert torch.equal(unnoticed(model, y, cut).value(x) > 0, both)
    if normalised:
        torch.testing.assert_close(unnoticed(model, y, cut).value(x), escape(model, y, floor=-cut).value(x))


class Bumps(Linear):
    """Scores -5 |x - c_k|^2: the widest margin lies far from every centre, where the best score is low."""

    def forward(self, x):
        return -5 * torch.cdist(x.flatten(1), self.weight.T).square()


@pytest.mark.parametrize("normalised", [False, True])
def test_an_attack_that_knows_passes_where_one_that_does_not_is_noticed(normalised):
    """Negative control included: with a cut that nothing meets, nothing passes."""
    model = Bumps("energy", normalised)
    x = torch.rand(32, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    y = model(x).argmax(1)
    how = dict(eps=0.5, norm=torch.inf, steps=30, seed=0)
    blind = attack(pgd, escape(model, y), x, **how)
    cut = oddness(model, model(blind.x)).quantile(0.2).item()
    knowing = attack(pgd, unnoticed(model, y, cut), x, **how)

    def past(found):
        z = model(found.x)
        return ((z.argmax(1) != y) & (oddness(model, z) <= cut)).sum()

    assert past(knowing) > past(blind)
    assert not attack(pgd, unnoticed(model, y, -1e6), x, **how).success.any()

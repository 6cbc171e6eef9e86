"""Where the boundary attack starts, and findings of one goal judged by another."""
import pytest
import torch

from lib.attacks.attack import fresh_value
from lib.attacks.goals import escape
from lib.attacks.starts import nearest_starts


class Line(torch.nn.Module):
    """Class 1 right of 1/2 on the mean pixel; noise of the given width moves the line in every pass."""

    def __init__(self, noise=0.0):
        super().__init__()
        self.noise, self.random = noise, noise > 0

    def forward(self, x):
        at = x.flatten(1).mean(1) - 0.5 + self.noise * torch.randn(len(x))
        return torch.stack([-at, at], 1)


def grey(*values):
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()


def test_the_nearest_image_that_qualifies_is_taken():
    x, pool = grey(0.3, 0.45), grey(0.9, 0.1, 0.6, 0.4, 0.55)
    start = nearest_starts(escape(Line(), torch.tensor([0, 0])), x, pool)
    assert torch.equal(start, grey(0.55, 0.55))                       # 0.4 and 0.1 are nearer, and of the same class
    assert torch.equal(nearest_starts(escape(Line(), torch.tensor([0, 1])), grey(0.3, 0.8), pool), grey(0.55, 0.4))


def test_an_image_without_a_start_is_told():
    with pytest.raises(ValueError, match="pool must hold an image that reaches the goal, but 1 of 2 images have none"):
        nearest_starts(escape(Line(), torch.tensor([0, 1])), grey(0.3, 0.8), grey(0.9, 0.7))


def test_a_fresh_value_is_the_median_of_the_draws_and_leaves_the_generator_alone():
    x, goal = grey(0.7), escape(Line(noise=0.5), torch.tensor([0]))
    before = torch.get_rng_state()
    values = torch.stack([fresh_value(goal, x, seed=s, draws=1) for s in range(400)])
    many = torch.stack([fresh_value(goal, x, seed=s, draws=25) for s in range(40)])
    assert torch.equal(before, torch.get_rng_state())
    assert values.mean().item() == pytest.approx(0.4, abs=0.2) and many.std() < values.std() / 2
    assert torch.equal(fresh_value(goal, x, seed=3), fresh_value(goal, x, seed=3))

"""Where the boundary attack starts, and findings of one goal judged by another."""
import pytest
import torch

from lib.attacks.attack import Found, best, fresh_value, into_ball, length
from lib.attacks.goals import decided, escape, settled
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


def test_points_of_the_sphere_stay_inside_the_ball_in_float32():
    x = torch.rand(500, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    far = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for eps, norm in ((0.065, 2), (0.43, 2), (8 / 255, torch.inf)):
        distance = length(into_ball(far, x, eps, norm) - x, norm)
        assert (distance <= eps).all() and (distance > 0.999 * eps).all()


def test_a_decision_does_not_change_and_asks_more_than_one_lucky_draw():
    x, goal = grey(*torch.linspace(0.2, 0.9, 60).tolist()), escape(Line(noise=0.2), torch.zeros(60, dtype=torch.long))
    still = decided(goal, draws=10)
    assert torch.equal(still.value(x), still.value(x)) and not still.random
    z = still.scores(x)
    assert z.shape == (10, 60, 2)
    # 8 of 10 draws at least: the value that a share of 0.7 exceeds
    assert torch.equal(still.value(x) > 0, (z[..., 1] > z[..., 0]).sum(0) >= 8)
    # the log-mean-exp of the same draws follows the luckiest of them, and says yes more often
    assert (settled(goal, draws=10).value(x) > 0).sum() > (still.value(x) > 0).sum()


def test_the_best_within_a_radius_is_the_surest_not_the_nearest():
    def found(distance, value):
        d, v = torch.tensor(distance), torch.tensor(value)
        return Found(d[:, None], v > 0, v, d, torch.ones(3), torch.zeros(3, dtype=torch.bool), v > 0)

    near, sure = found([0.1, 0.1, 0.5], [0.1, -2.0, 9.0]), found([0.3, 0.3, 0.3], [5.0, -1.0, -1.0])
    assert best(near, sure).distance.tolist() == pytest.approx([0.1, 0.3, 0.5])
    assert best(near, sure, eps=0.4).distance.tolist() == pytest.approx([0.3, 0.3, 0.3])
    assert best(near, sure, eps=0.2).distance.tolist() == pytest.approx([0.1, 0.1, 0.5])
    assert best(near, sure).calls.tolist() == [2, 2, 2]

"""Gradients from scores alone: any gradient attack becomes one that only asks for scores."""
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lib.attacks.attack import Draws, wide
from lib.attacks.goals import Goal

DIRECTIONS = {"nes": lambda normal: normal, "spsa": torch.sign}


def score_only(method: Callable, *, samples: int = 50, sigma: float = 0.01, rule: str = "nes") -> Callable:
    """`method` with every gradient of the model estimated from 2 `samples` further passes.

    rule  "nes": Gaussian directions (Ilyas et al. 2018); "spsa": random signs (Uesato et al. 2018)
    The passes are counted by `attack`. Raises ValueError for samples < 1, sigma <= 0 or another rule.
    """
    if samples < 1 or not sigma > 0 or rule not in DIRECTIONS:
        raise ValueError("score_only needs samples >= 1, sigma > 0 (pixels in [0, 1]) and rule nes or spsa, got "
                         f"samples={samples}, sigma={sigma}, rule={rule!r}")

    def estimating(goal: Goal, x: Tensor, *, draw: Draws, **settings) -> Tensor:
        def scores(x):
            return _Estimated.apply(x, goal.scores, draw, samples, sigma, DIRECTIONS[rule])
        return method(replace(goal, scores=scores), x, draw=draw, **settings)
    return estimating


class _Estimated(torch.autograd.Function):
    """The model's scores z(x), and for its backward an estimate of J^T v, each image from its own differences.

    J^T v ~ 1/samples sum_i u_i <v, z(x + sigma u_i) - z(x - sigma u_i)> / (2 sigma),  E[u u^T] = I
    Differences of the batch's summed loss would share one image's luck with all others, so that larger batches would
    attack worse. Pixels stay in [0, 1], which halves the slope of a pixel at its end.
    """

    @staticmethod
    def forward(ctx, x, scores, draw, samples, sigma, direction):
        ctx.save_for_backward(x)
        ctx.ask = scores, draw, samples, sigma, direction
        return scores(x)

    @staticmethod
    def backward(ctx, v):
        x, (scores, draw, samples, sigma, direction) = ctx.saved_tensors[0].detach(), ctx.ask
        estimate = torch.zeros_like(x)
        for _ in range(samples):
            u = direction(draw.normal(x))
            change = _difference(scores, (x + sigma * u).clamp(0, 1), (x - sigma * u).clamp(0, 1))
            # scores may have an axis of draws in front (`expected`)
            slope = (v * change).sum(-1).reshape(-1, len(x)).sum(0) / (2 * sigma * samples)
            estimate += wide(slope, x) * u
        return estimate, None, None, None, None, None


def _difference(scores: Callable, plus: Tensor, minus: Tensor) -> Tensor:
    """z(plus) - z(minus), under the same noise of a random model: else the noise would swamp the difference."""
    seed = int(torch.randint(2**31, ()))

    def ask(images):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return scores(images)
    return ask(plus) - ask(minus)

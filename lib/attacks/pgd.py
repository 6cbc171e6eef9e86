"""Projected gradient ascent in a ball, and its one-step form (FGSM)."""
import math
from functools import partial

import torch
from torch import Tensor

from lib.attacks.attack import REDRAWS, Draws, into_ball, length, look, typical, wide
from lib.attacks.goals import Goal


def pgd(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, steps: int = 40, starts: int = 1,
        step: float | None = None, rule: str = "steepest") -> Tensor:
    """Climb `goal.climb` inside the ball of radius `eps` (finite) and keep the best iterate by value, clean image included.

    steps   >= 1 gradient steps from each start
    starts  the clean image, then starts - 1 random points of the ball
    step    length of a step as a share of eps, by default 2.5/steps
    rule    "steepest": along the gradient's direction of steepest ascent in the norm; "adam": Adam on the perturbation
    """
    if not math.isfinite(eps) or steps < 1 or starts < 1 or rule not in ("steepest", "adam"):
        raise ValueError("pgd needs a finite eps, steps >= 1, starts >= 1 and rule steepest or adam, got "
                         f"eps={eps}, steps={steps}, starts={starts}, rule={rule!r}")
    pace = eps * (2.5 / steps if step is None else step)
    candidates = [x]
    for start in range(starts):
        here = x if start == 0 else into_ball(x + _in_ball(x, eps, norm, draw), x, eps, norm)
        best, best_value = here, torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        first = second = torch.zeros_like(x)
        for t in range(steps + 1):
            terms, gradient = look(goal, here)
            value = terms.amin(1)
            better = value > best_value
            best, best_value = torch.where(wide(better, x), here, best), torch.where(better, value, best_value)
            if t == steps:
                break
            if rule == "adam":
                first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
                move = (first / (1 - 0.9 ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
            else:
                move = uphill(gradient, norm)
            here = into_ball(here + pace * move, x, eps, norm)
        # in a random model the best iterate is also the luckiest; the last one is not
        candidates += [best, here] if goal.random else [best]
    return _most(goal, candidates)


@torch.no_grad()
def _most(goal: Goal, candidates: list[Tensor]) -> Tensor:
    """Per image the candidate of largest value, in a random model of the largest median over fresh draws."""
    values = torch.stack([typical(goal, x, REDRAWS if goal.random else 1) for x in candidates])
    images, chosen = torch.stack(candidates), values.argmax(0)
    return images[chosen, torch.arange(len(chosen), device=chosen.device)]


fgsm = partial(pgd, steps=1, step=1.0)


def uphill(gradient: Tensor, norm: float) -> Tensor:
    """The unit step of steepest ascent: g/|g| in L2, sign(g) in Linf; zero where the gradient is zero."""
    if norm == 2:
        return gradient / wide(length(gradient, 2).clamp(min=1e-30), gradient)
    return gradient.sign()


def _in_ball(x: Tensor, eps: float, norm: float, draw: Draws) -> Tensor:
    """A uniform point of the ball of radius eps."""
    if norm == math.inf:
        return eps * (2 * draw.uniform(x) - 1)
    # |d| = eps u^(1/D) makes the point uniform in the ball
    radius = draw.uniform(x.flatten(1)[:, :1])[:, 0] ** (1 / x[0].numel())
    return eps * wide(radius, x) * uphill(draw.normal(x), 2)

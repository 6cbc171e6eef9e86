"""Decoupled direction and norm (Rony et al. 2019, arXiv 1811.09600, Algorithm 1): a short L2 perturbation, cheaply."""
import math

import torch
from torch import Tensor

from lib.attacks.attack import Draws, Nearest, length, look, wide
from lib.attacks.goals import Goal
from lib.attacks.pgd import uphill


def ddn(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, steps: int = 100, radius: float = 1.0,
        gamma: float = 0.05) -> Tensor:
    """Walk along `goal.climb` on a sphere that shrinks after each success and grows after each failure.

    Ours: where only a later term fails (a detector's floor), the sphere shrinks if the climb falls outwards. Likelihood
    is lost far out, and a sphere that grew there would never come back.

    norm    2 only; eps bounds the radius
    steps   >= 1 gradient steps
    radius  of the first sphere, pixel units, > 0
    gamma   by which share the radius changes in a step, in (0, 1)
    """
    if norm != 2 or steps < 1 or not radius > 0 or not 0 < gamma < 1:
        raise ValueError("ddn needs norm 2, steps >= 1, radius > 0 and gamma in (0, 1), got "
                         f"norm={norm}, steps={steps}, radius={radius}, gamma={gamma}")
    far = length(torch.maximum(x, 1 - x), 2).clamp(max=eps)    # no image of the box (and ball) is further away
    radii = far.clamp(max=radius)
    held, here = Nearest(goal, x), x
    for t in range(steps + 1):
        terms, gradient = look(goal, here)
        held.offer(here, terms.amin(1))
        # the step falls from 1 to 0.01 along a cosine
        step = 0.01 + 0.99 * (1 + math.cos(math.pi * t / steps)) / 2
        d = here - x
        inwards = (gradient * d).flatten(1).sum(1) < 0
        shrinks = (terms > 0).all(1) | (terms[:, 0] > 0) & inwards
        # eps <- (1 -/+ gamma) eps, then d <- eps d/|d|
        radii = torch.minimum(radii * torch.where(shrinks, 1 - gamma, 1 + gamma), far)
        d = d + step * uphill(gradient, 2)
        here = (x + wide(radii, x) * uphill(d, 2)).clamp(0, 1)
    return held.x

"""Carlini and Wagner's L2 attack (2017, arXiv 1608.04644, Section VI.A), with a hinge for every term of the goal."""
from dataclasses import replace

import torch
from torch import Tensor

from lib.attacks.attack import Draws, Nearest
from lib.attacks.goals import Goal

# how far inside the box an image starts: at 0 and 1 themselves atanh is infinite, and such pixels would never move
EDGE = 1e-6

def cw(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, kappa: float = 0.0, binary_steps: int = 6,
       steps: int = 200, lr: float = 0.05, weight: float = 1.0) -> Tensor:
    """Minimise |d|^2 + sum_k c_k max(0, kappa_k - term_k) over images x + d = (tanh w + 1)/2, by Adam on w.

    norm          2 only
    kappa         >= 0, nats, by how much the first term (the margin) must be exceeded; zero for the detector's term,
                  whose hinge max(0, floor - log p) fetaya2020 (Section 4.3) adds to the loss
    binary_steps  >= 1 rounds; each begins at x and ends with the next weights c_k, every term's for itself (ours): ten
                  times as large while its failure is the worst, then by bisection. No early abort.
    steps         >= 1 steps of Adam at rate lr > 0 in a round
    weight        > 0, the first c_k times the margin still lacking: the search does not see the scale of the scores
    """
    if norm != 2 or not kappa >= 0 or binary_steps < 1 or steps < 1 or not lr > 0 or not weight > 0:
        raise ValueError("cw needs norm 2, kappa >= 0 (nats), binary_steps >= 1, steps >= 1, lr > 0 and weight > 0, "
                         f"got norm={norm}, kappa={kappa}, binary_steps={binary_steps}, steps={steps}, lr={lr}, "
                         f"weight={weight}")

    def wanted(scores, labels):
        terms = goal.terms(scores, labels)
        return torch.cat([terms[:, :1] - kappa, terms[:, 1:]], 1)

    start = torch.atanh((2 * x - 1) * (1 - EDGE))
    clean = (torch.tanh(start) + 1) / 2
    judged = replace(goal, terms=wanted)
    held, c = Nearest(judged, x), None
    for _ in range(binary_steps):
        w, here = start.clone(), Nearest(judged, x)
        adam = torch.optim.Adam([w], lr=lr)
        for _ in range(steps):
            image = ((torch.tanh(w) + 1) / 2).requires_grad_()
            lack = -wanted(goal.scores(image), goal.labels)
            if c is None:
                c = (weight / lack.detach()[:, :1].abs().clamp(min=1e-6)).expand_as(lack)
                low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
            push, = torch.autograd.grad((c * lack.relu()).sum(), image)
            image, lack = image.detach(), lack.detach()
            here.offer(image, -lack.amax(1))
            # d/dw of |d|^2 + hinges, where dx/dw = (1 - tanh^2 w)/2 = 2 x (1 - x)
            w.grad = (2 * (image - clean) + push) * 2 * image * (1 - image)
            adam.step()
        held.offer(here.x, here.value)
        low, high, c = _bisect(c, low, high, (here.value > 0)[:, None], lack)
    return held.x


def _bisect(c: Tensor, low: Tensor, high: Tensor, reached: Tensor, lack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The next (low, high, c): all weights down after a success, else that of the term up which lacks most at the end.

    Raising every failing term would let the weights race each other: a detector's hinge that holds the image where it
    was makes the margin fail as well.
    """
    raised = ~reached & (lack >= lack.amax(1, keepdim=True))
    low, high = torch.where(raised, c, low), torch.where(reached, c, high)
    middle = torch.where(high.isfinite(), (low + high) / 2, 10 * c)
    return low, high, torch.where(reached | raised, middle, c)

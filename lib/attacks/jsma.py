"""Jacobian saliency maps (Papernot et al. 2016, arXiv 1511.07528, Algorithm 3): few pixels, changed by much."""
import torch
from torch import Tensor

from lib.attacks.attack import Draws, class_gradients
from lib.attacks.goals import Goal


def jsma(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, theta: float = 1.0,
         gamma: float = 0.2) -> Tensor:
    """Change the pair of pixels that raises the target and lowers the sum of the others most, until the class is it.

    Works from `goal.scores` and `goal.labels` alone: a floor and rejected classes only count when `attack` judges.
    Without a target, the runner-up of each step is one. The number of pixels is bounded, not the norm.

    theta  change of a pixel in one step, in [-1, 1] and not 0
    gamma  share of the values that may be changed, in (0, 1]
    """
    if not 0 < abs(theta) <= 1 or not 0 < gamma <= 1:
        raise ValueError(f"jsma needs theta in [-1, 1], not 0, and gamma in (0, 1], got theta={theta}, gamma={gamma}")
    here, rows = x.flatten(1), torch.arange(len(x), device=x.device)
    for _ in range(int(gamma * here.shape[1] / 2)):
        scores, gradients = class_gradients(goal, here.view_as(x))
        top, runner_up = scores.argmax(1), scores.scatter(1, goal.labels[:, None], -torch.inf).argmax(1)
        fooled = (top == goal.labels) if goal.targeted else (top != goal.labels)
        if fooled.all():
            break
        target = goal.labels if goal.targeted else runner_up
        sign = 1 if theta > 0 else -1
        # alpha = dz_t/dx, beta = sum_{j != t} dz_j/dx, both along the change
        alpha = sign * gradients[rows, target].flatten(1)
        beta = sign * gradients.sum(1).flatten(1) - alpha
        spent = here >= 1 if theta > 0 else here <= 0
        pair = torch.stack([_pair(a, b) for a, b in zip(alpha.masked_fill(spent, -torch.inf), beta)])
        change = theta * (pair & ~fooled[:, None])
        here = (here + change).clamp(0, 1)
    return here.view_as(x)


def _pair(alpha: Tensor, beta: Tensor) -> Tensor:
    """(D,) bool: the two values p, q of largest -(alpha_p + alpha_q)(beta_p + beta_q), or none if no pair helps."""
    a, b = alpha[:, None] + alpha, beta[:, None] + beta
    saliency = torch.where((a > 0) & (b < 0), -a * b, 0.0).fill_diagonal_(0)
    chosen = torch.zeros_like(alpha, dtype=torch.bool)
    if saliency.max() > 0:
        flat = int(saliency.argmax())
        chosen[[flat // len(alpha), flat % len(alpha)]] = True
    return chosen

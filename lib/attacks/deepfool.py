"""DeepFool (Moosavi-Dezfooli et al. 2016, arXiv 1511.04599, Algorithm 2): the nearest linearised class boundary."""
import torch
from torch import Tensor

from lib.attacks.attack import Draws, class_gradients, length, wide
from lib.attacks.goals import Goal


def deepfool(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, steps: int = 50,
             overshoot: float = 0.02) -> Tensor:
    """Step to the nearest boundary as the linearised scores see it, until the class is another one (or the target).

    Works from `goal.scores` and `goal.labels` alone: a floor and rejected classes are ignored, and only count when
    `attack` judges. A target is reached from the leading class of each step.

    norm       2 only
    steps      >= 1 linearisations, each of one forward and C backward passes
    overshoot  >= 0, by which share the sum of steps is stretched
    """
    if norm != 2 or steps < 1 or not overshoot >= 0:
        raise ValueError(f"deepfool needs norm 2, steps >= 1 and overshoot >= 0, got norm={norm}, steps={steps}, "
                         f"overshoot={overshoot}")
    total, here, rows = torch.zeros_like(x), x, torch.arange(len(x), device=x.device)
    for _ in range(steps):
        scores, gradients = class_gradients(goal, here)
        top = scores.argmax(1)
        fooled = (top == goal.labels) if goal.targeted else (top != goal.labels)
        if fooled.all():
            break
        goes = top if goal.targeted else goal.labels
        # f_k = z_k - z_goes, w_k = grad f_k; the boundary of class k is |f_k|/|w_k| away
        f = scores - scores[rows, goes][:, None]
        w = gradients - gradients[rows, goes][:, None]
        away = f.abs() / w.flatten(2).norm(dim=2).clamp(min=1e-30)
        comes = goal.labels if goal.targeted else away.scatter(1, goes[:, None], torch.inf).argmin(1)
        w = w[rows, comes]
        # r = |f|/|w|^2 w
        r = wide((f[rows, comes].abs() + 1e-4) / length(w, 2).square().clamp(min=1e-30), w) * w
        total = torch.where(wide(fooled, x), total, total + r)
        here = (x + (1 + overshoot) * total).clamp(0, 1)
    return here

"""The attack of adversarial training on likelihoods: short, and neither judged nor kept best (pope2020, Section 4)."""
import math

import torch

from lib.attacks.attack import into_ball, look, wide
from lib.attacks.goals import unlikely
from lib.attacks.pgd import uphill


def raise_nll(model, x: torch.Tensor, y: torch.Tensor, *, eps: float, steps: int) -> torch.Tensor:
    """Images within `eps` (Linf, pixels in [0, 1]) of x whose -log p(x) is higher: the last of `steps` >= 1 iterates.

    An adversary for `lib.train.train`; labels y are not looked at. Steps of 2.5 eps/steps along the gradient's sign;
    where the gradient is not finite the image stays where it is.
    """
    if steps < 1 or not eps > 0:
        raise ValueError(f"raise_nll needs eps > 0 (pixels in [0, 1]) and steps >= 1, got eps={eps}, steps={steps}")
    goal, here = unlikely(model.score, 0.0, len(x), random=True), x
    for _ in range(steps):
        _, gradient = look(goal, here)
        gradient = gradient.masked_fill(wide(~gradient.flatten(1).isfinite().all(1), gradient), 0)
        # x <- Proj(x + a sign(grad NLL))
        here = into_ball(here + 2.5 * eps / steps * uphill(gradient, math.inf), x, eps, math.inf)
    return here

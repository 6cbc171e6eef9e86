"""Where a decision-based attack starts: at a real image that already is what the attacker wants."""
import torch
from torch import Tensor

from lib.attacks.goals import Goal, decided


@torch.no_grad()
def nearest_starts(goal: Goal, x: Tensor, pool: Tensor, passes: int = 10) -> Tensor:
    """For each image of x (n, *shape) the nearest one of `pool` (m, *shape), in L2, that reaches the goal: (n, *shape).

    fetaya2020, Section 4.3: noise is always rejected, so the detector-aware boundary attack needs a real image of
    another class that the detector accepts. The nearest stands for the best of several targets, at a ninth of the
    queries. Decisions are those of `decided(goal, passes)` on this batch, the ones that the attack will meet.
    Raises ValueError where an image finds no start in the pool.
    """
    still = decided(goal, passes)
    order = torch.cdist(x.flatten(1), pool.flatten(1)).argsort(1)
    start, missing = pool[order[:, 0]], torch.ones(len(x), dtype=torch.bool, device=x.device)
    for choice in order.T:
        start[missing] = pool[choice[missing]]
        missing &= ~(still.value(start) > 0)
        if not missing.any():
            return start
    raise ValueError(f"pool must hold an image that reaches the goal, but {int(missing.sum())} of {len(x)} images have none")

"""The weakest attacker: Gaussian noise of growing length, in directions drawn anew."""
import torch
from torch import Tensor

from lib.attacks.attack import Draws, Nearest, length, wide
from lib.attacks.goals import Goal


@torch.no_grad()
def noise(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, levels: int = 60, tries: int = 10) -> Tensor:
    """Add Gaussian noise, scaled so that it has the wanted length after clipping, until the goal is reached.

    eps     largest length tried; if infinite, the distance of the furthest corner of the box
    levels  >= 1 lengths, equally spaced up to the largest
    tries   >= 1 directions for each length
    """
    if levels < 1 or tries < 1:
        raise ValueError(f"noise needs levels >= 1 and tries >= 1, got levels={levels}, tries={tries}")
    far = length(torch.maximum(x, 1 - x), norm).clamp(max=eps)
    held = Nearest(goal, x, norm)
    held.offer(x, goal.value(x))
    for level in range(1, levels + 1):
        for _ in range(tries):
            if (held.value > 0).all():
                return held.x
            image = _clipped(x, draw.normal(x), far * level / levels, norm)
            # an image that is done stays: else it would depend on how long the others of its batch take
            image = torch.where(wide(held.value > 0, x), held.x, image)
            held.offer(image, goal.value(image))
    return held.x


def _clipped(x: Tensor, direction: Tensor, wanted: Tensor, norm: float) -> Tensor:
    """clip(x + s direction) with s such that it lies `wanted` (n,) from x; the length grows with s: bisection."""
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 100.0)
    for _ in range(30):
        s = (low + high) / 2
        short = length((x + wide(s, x) * direction).clamp(0, 1) - x, norm) < wanted
        low, high = torch.where(short, s, low), torch.where(short, high, s)
    return (x + wide(low, x) * direction).clamp(0, 1)

"""Greedy local search (Narodytska and Kasiviswanathan 2016, arXiv 1612.06299), which sees scores only."""
import torch
from torch import Tensor

from lib.attacks.attack import Draws, wide
from lib.attacks.goals import Goal


@torch.no_grad()
def localsearch(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, rounds: int = 150, pixels: int = 5,
                reach: int = 5, r: float = 1.5, candidates: int = 128) -> Tensor:
    """Probe pixels one by one, move the most telling of them, look next in their neighbourhood.

    A probe sets a pixel (all channels) to 0 or 1, whichever it is nearer. The move v <- r v of a centred value
    v = x - 1/2 wraps around at the box's edges, so it throws a bright pixel to the dark and a dark one to the bright.
    The settings are those of foolbox 2.4 but for two: the probe stays in the box, and the pixels moved are those whose
    probe left the goal's value *lowest*, pixels already at an edge (foolbox issue 237).

    rounds      >= 1, each of `candidates` + 1 passes
    pixels      >= 1 moved in a round
    reach       >= 0, half the side of the squares around moved pixels that the next round probes
    r           in [0, 2], the factor of a move
    candidates  >= 1 pixels probed in a round, drawn at random from those squares; 10 % of all in the first
    """
    if rounds < 1 or pixels < 1 or reach < 0 or not 0 <= r <= 2 or candidates < 1:
        raise ValueError("localsearch needs rounds >= 1, pixels >= 1, reach >= 0, r in [0, 2] and candidates >= 1, got "
                         f"rounds={rounds}, pixels={pixels}, reach={reach}, r={r}, candidates={candidates}")
    n, _, height, width = x.shape
    here, near = x.clone(), x.new_ones(n, 1, height, width)
    seeds = max(1, height * width // 10)
    open_ = goal.value(x) <= 0
    for turn in range(rounds):
        if not open_.any():
            break
        keys = draw.uniform(near).mul(near).flatten(1)
        keys, chosen = keys.topk(min(candidates, seeds if turn == 0 else height * width), dim=1)
        values = torch.stack([_probed(goal, here, pixel, open_) for pixel in chosen.unbind(1)], 1)
        values = values.masked_fill(keys == 0, torch.inf)
        moved = chosen.gather(1, values.topk(min(pixels, values.shape[1]), dim=1, largest=False).indices)
        mask = x.new_zeros(n, height * width).scatter_(1, moved, 1).view_as(near)
        # v <- r v, and around by 1 where it leaves [-1/2, 1/2]
        v = r * (here - 0.5)
        v = v - (v > 0.5).to(v) + (v < -0.5).to(v)
        here = torch.where((mask > 0) & wide(open_, x), v + 0.5, here)
        open_ = open_ & ~(goal.value(here) > 0)
        near = torch.nn.functional.max_pool2d(mask, 2 * reach + 1, stride=1, padding=reach)
    return here


def _probed(goal: Goal, x: Tensor, pixel: Tensor, open_: Tensor) -> Tensor:
    """The goal's value (n,) with one pixel of each open image at the nearer edge of the box; inf for the others."""
    mask = torch.zeros_like(x[:, 0], dtype=torch.bool).flatten(1).scatter_(1, pixel[:, None], True).view_as(x[:, :1])
    values = x.new_full((len(x),), torch.inf)
    values[open_] = goal.rows(open_).value(torch.where(mask, (x >= 0.5).to(x), x)[open_])
    return values

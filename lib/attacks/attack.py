"""One call for every attack: `attack(method, goal, x, ...)`, which trusts no method with its own success.

A method is a function (goal, x, eps, norm, draw, **settings) -> images of x's shape. It sees one batch, may draw
random numbers through `draw` and through torch's global generator, and need not check anything. All the rest happens
here, once: random state, batches, box and ball, the clean image where an attack did harm to itself, success in a
fresh pass, and the count of what it cost.
"""
import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lib.attacks.goals import Goal

# a ball is entered by this share of its radius: rounding to float32 would leave half the points of its sphere outside
SLACK = 1e-5
# share of fresh draws of a random model that must agree before an attack believes in a success: most will, later
CONVINCED = 0.7
# by how much an attack on a random model may be stretched away from its image, to succeed in most draws
STRETCH = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0)
# fresh draws that an image must convince before a method on a random model keeps it
REDRAWS = 10
# by what share of its distance a success on a random model must be nearer than the last to be worth those draws
NEARER = 0.01


class Found(NamedTuple):
    """What an attack found for n images."""

    x: Tensor          # (n, *shape), pixels in [0, 1]
    success: Tensor    # (n,) bool: value > 0
    value: Tensor      # (n,) of the goal, nats, in a fresh pass (random models: the median over fresh draws)
    distance: Tensor   # (n,) from the clean image in the attack's norm
    calls: Tensor      # (n,) passes of the model spent on each image, scoring not counted
    frozen: Tensor     # (n,) bool: some gradient was not finite; such a one counts as zero
    rounded: Tensor    # (n,) bool: still successful after rounding to grey levels


def attack(method: Callable, goal: Goal, x: Tensor, *, eps: float = math.inf, norm: float = 2, seed: int = 0,
           batch: int = 100, draws: int = 10, grey_levels: int = 256, **settings) -> Found:
    """Run `method` on images x (n, *shape), pixels in [0, 1], and judge what it found.

    eps          radius of the ball in pixel units, >= 0; inf for minimum-norm attacks
    norm         2 or inf
    draws        fresh passes that judge a random model: the goal is reached if it is in most of them
    grey_levels  number of values of a pixel, for `rounded`
    settings     of the method
    An attack of a random model with eps = inf is stretched along its own direction (`STRETCH`) until most draws
    agree: an image that succeeded in one lucky draw lies on the boundary and fails in half of the others.
    Same seed, same result; the caller's random state is left as it was. Raises ValueError for bad arguments.
    """
    _check(goal, x, eps, norm, batch, draws, grey_levels)
    draws = draws if goal.random else 1
    parts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for rows in torch.arange(len(x)).split(batch):
            mine, clean, tally = goal.rows(rows), x[rows], _Tally(len(rows))
            with torch.enable_grad():
                found = method(tally.watch(mine), clean, eps=eps, norm=norm, draw=Draws(seed, rows.tolist()), **settings)
            found = into_ball(found.detach().nan_to_num(0.5), clean, eps, norm)
            parts.append(_judge(mine, clean, found, norm, math.isinf(eps), draws, grey_levels)
                         + (torch.full((len(rows),), tally.images / len(rows)), tally.frozen))
    x, value, distance, rounded, calls, frozen = (torch.cat(part) for part in zip(*parts))
    return Found(x, value > 0, value, distance, calls, frozen, rounded)


@torch.no_grad()
def _judge(goal: Goal, clean: Tensor, found: Tensor, norm: float, minimal: bool, draws: int, grey_levels: int):
    """(x, value, distance, rounded): scored in fresh passes, and the clean image back where the value fell."""
    def value(images):
        return _median(goal, images, draws)

    if minimal and goal.random:
        found = _stretched(goal, clean, found, draws)
    before, after = value(clean), value(found)
    fell = ~(after >= before)
    found, after = torch.where(wide(fell, clean), clean, found), torch.where(fell, before, after)
    steps = grey_levels - 1
    return found, after, length(found - clean, norm), value((found * steps).round() / steps) > 0


def _median(goal: Goal, x: Tensor, draws: int) -> Tensor:
    return torch.stack([goal.value(x) for _ in range(draws)]).median(0).values


@torch.no_grad()
def fresh_value(goal: Goal, x: Tensor, *, seed: int = 0, draws: int = 10) -> Tensor:
    """(n,) nats: the goal's value at images x in fresh passes, for a random model the median over `draws` of them.

    So a finding of one goal can be judged by another: what fooled the classifier, by the detector.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _median(goal, x, draws if goal.random else 1)


def _stretched(goal: Goal, clean: Tensor, found: Tensor, draws: int) -> Tensor:
    """Each image at the first factor of `STRETCH` where nearly all draws succeed, so that most fresh ones will."""
    kept, left = found.clone(), torch.arange(len(clean), device=clean.device)
    for factor in STRETCH:
        if not len(left):
            break
        tried = (clean[left] + factor * (found[left] - clean[left])).clamp(0, 1)
        good = typical(goal.rows(left), tried, draws, share=CONVINCED) > 0
        kept[left[good]], left = tried[good], left[~good]
    return kept


class _Tally:
    """Counts the images a method passes through the model, and notes gradients that are not finite."""

    def __init__(self, n: int) -> None:
        self.images, self.frozen = 0, torch.zeros(n, dtype=torch.bool)

    def watch(self, goal: Goal) -> Goal:
        def scores(x):
            self.images += len(x) * goal.passes
            if x.requires_grad and x.is_leaf:
                x.register_hook(self.mend)
            return goal.scores(x)
        return replace(goal, scores=scores)

    def mend(self, gradient: Tensor) -> Tensor:
        """The gradient, with zero for the images where it is not finite."""
        bad = ~gradient.flatten(1).isfinite().all(1)
        if len(self.frozen) == len(bad):    # a method that sub-selects images is not followed
            self.frozen = self.frozen | bad.cpu()
        return gradient.masked_fill(wide(bad, gradient), 0)


class Draws:
    """Random numbers that depend on the seed and the image only, not on the batch the image came in."""

    def __init__(self, seed: int, images: list[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in images]

    def uniform(self, like: Tensor) -> Tensor:
        """U[0, 1) of the shape of `like`, whose leading axis is the batch."""
        draws = [torch.rand(like.shape[1:], generator=g, dtype=like.dtype) for g in self.generators]
        return torch.stack(draws).to(like.device)

    def normal(self, like: Tensor) -> Tensor:
        """N(0, 1) of the shape of `like`, whose leading axis is the batch."""
        draws = [torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in self.generators]
        return torch.stack(draws).to(like.device)


def look(goal: Goal, x: Tensor) -> tuple[Tensor, Tensor]:
    """Terms (n, k) and the gradient of the climb (n, *shape) at x, by one pass."""
    x = x.detach().requires_grad_()
    scores = goal.scores(x)
    gradient, = torch.autograd.grad(goal.climb(scores, goal.labels).sum(), x)
    return goal.terms(scores, goal.labels).detach(), gradient


def class_gradients(goal: Goal, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n, C) and the gradient of each (n, C, *shape) at x, by one pass; averaged where the goal is `expected`."""
    x = x.detach().requires_grad_()
    scores = goal.scores(x)
    scores = scores.mean(0) if scores.dim() == 3 else scores
    if scores.shape[1] < 2:
        raise ValueError(f"this attack needs the scores of at least 2 classes, got {scores.shape[1]}")
    gradients = [torch.autograd.grad(score.sum(), x, retain_graph=True)[0] for score in scores.unbind(1)]
    return scores.detach(), torch.stack(gradients, 1)


class Nearest:
    """The best of the images offered: the nearest that reaches the goal; until one does, that of largest value.

    What a single draw of a random model calls a success is believed only if nearly all of `REDRAWS` fresh ones agree:
    among a hundred iterates some draw always flatters, at first the one next to the clean image. As they cost ten
    passes, they are asked only of images that are nearer by the share `NEARER`.
    """

    def __init__(self, goal: Goal, clean: Tensor, norm: float = 2) -> None:
        self.goal, self.clean, self.norm, self.x = goal, clean, norm, clean
        self.value = clean.new_full((len(clean),), -torch.inf)
        self.distance = torch.full_like(self.value, torch.inf)

    @torch.no_grad()
    def offer(self, x: Tensor, value: Tensor) -> None:
        """Take those of images x (n, *shape) that are better than what is held; `value` (n,) is the goal's there."""
        distance = length(x - self.clean, self.norm)
        if self.goal.random:
            value = value.masked_fill((self.value > 0) & (distance > (1 - NEARER) * self.distance), -torch.inf)
        hopeful = _beats(value, distance, self.value, self.distance) & (value > 0) & self.goal.random
        for draws in (2, REDRAWS):      # most flattery does not survive two draws
            if hopeful.any():
                value = value.masked_scatter(hopeful, typical(self.goal.rows(hopeful), x[hopeful], draws, share=CONVINCED))
                hopeful &= value > 0
        taken = _beats(value, distance, self.value, self.distance)
        self.x = torch.where(wide(taken, x), x, self.x)
        self.value = torch.where(taken, value, self.value)
        self.distance = torch.where(taken, distance, self.distance)


def best(*found: Found, eps: float = math.inf) -> Found:
    """Several attacks on the same images as one: per image the nearest success, or else the largest value.

    With a finite `eps`: per image the largest value within that distance, which fresh noise is least likely to undo.
    So a targeted attack becomes untargeted: best(*(attack(ddn, become(model, t), x) for t in targets)), once their
    values mean the same. `calls` add up, `frozen` is kept where any attack froze.
    """
    held = found[0]
    for other in found[1:]:
        if math.isinf(eps):
            taken = _beats(other.value, other.distance, held.value, held.distance)
        else:
            near, mine = other.distance <= eps, held.distance <= eps
            taken = torch.where(near == mine, other.value > held.value, near)
        fields = zip(other, held)
        held = Found(*(torch.where(wide(taken.to(new.device), new), new, old) for new, old in fields))
    return held._replace(calls=torch.stack([f.calls for f in found]).sum(0),
                         frozen=torch.stack([f.frozen for f in found]).any(0))


def typical(goal: Goal, x: Tensor, draws: int, share: float = 0.5) -> Tensor:
    """The value (n,) that a share of fresh draws of a random model exceeds: 0.5 for the (lower) median."""
    # one pass over all draws: on small images much faster than one pass each
    many = replace(goal, labels=goal.labels.repeat(draws)).value(x.repeat(draws, *(1 for _ in x.shape[1:])))
    return many.view(draws, len(x)).quantile(1 - share, dim=0, interpolation="lower")


def _beats(value: Tensor, distance: Tensor, held: Tensor, held_distance: Tensor) -> Tensor:
    """(n,) bool: nearer where both reach the goal, else of larger value."""
    return torch.where((value > 0) & (held > 0), distance < held_distance, value > held)


def length(d: Tensor, norm: float) -> Tensor:
    """The norm (2 or inf) of each image's perturbation: (n, *shape) -> (n,)."""
    return torch.linalg.vector_norm(d.flatten(1), ord=norm, dim=1)


def into_ball(x: Tensor, clean: Tensor, eps: float, norm: float) -> Tensor:
    """The nearest point to x in the ball around `clean`, then in the box [0, 1] (which keeps it in the ball)."""
    d, eps = x - clean, eps * (1 - SLACK)
    if norm == 2 and math.isfinite(eps):
        # d <- d min(1, eps/|d|)
        d = d * wide((eps / length(d, 2).clamp(min=1e-12)).clamp(max=1), d)
    elif math.isfinite(eps):
        d = d.clamp(-eps, eps)
    return (clean + d).clamp(0, 1)


def wide(flag: Tensor, like: Tensor) -> Tensor:
    """(n,) -> (n, 1, ..., 1), to broadcast over images of the shape of `like`."""
    return flag.view(-1, *(1 for _ in like.shape[1:]))


def _check(goal, x, eps, norm, batch, draws, grey_levels) -> None:
    """Raise ValueError for the first argument out of range."""
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0 (pixels in [0, 1]), got {eps}")
    if norm not in (2, math.inf):
        raise ValueError(f"norm must be 2 or inf, got {norm}")
    for name, number, least in (("batch", batch, 1), ("draws", draws, 1), ("grey_levels", grey_levels, 2)):
        if number < least:
            raise ValueError(f"{name} must be >= {least}, got {number}")
    if len(goal.labels) != len(x):
        raise ValueError(f"x must have one image for each of the goal's {len(goal.labels)} labels, got {len(x)}")
    if not len(x) or not (x.amin() >= 0 and x.amax() <= 1):
        raise ValueError("x must be at least one image with pixels in [0, 1]")

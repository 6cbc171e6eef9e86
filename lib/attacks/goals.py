"""What an attacker wants: a value per image, reached where it is positive, and a quantity to climb.

Gaps between generative scores are near a hundred nats. There the softmax is 0 or 1 in float32, its gradient vanishes,
and a cross-entropy attack fails without a word. Nothing here passes through a softmax.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Goal:
    """What is wanted for each of n images, as functions of the model's scores, so that one pass serves all of it.

    scores  (n, *shape) -> (n, C), the model; only this is called with images
    terms   (scores, labels) -> (n, k), in the unit of the scores (nats); the goal is reached where all k are > 0
    climb   (scores, labels) -> (n,), to be raised: never saturates, has a gradient where the terms still fail
    labels  (n,) what the terms need to know of each image: its class, the target, or nothing (zeros)
    random  True when two passes over the same images differ
    targeted  True when the labels are classes to become, for methods that work from scores and labels alone
    passes  of the model that one call of `scores` makes for each image
    """

    scores: Callable[[Tensor], Tensor]
    terms: Callable[[Tensor, Tensor], Tensor]
    climb: Callable[[Tensor, Tensor], Tensor]
    labels: Tensor
    random: bool = False
    targeted: bool = False
    passes: int = 1

    def rows(self, chosen) -> "Goal":
        """The same goal for some of the images: an index tensor, a mask or a slice."""
        return replace(self, labels=self.labels[chosen])

    def value(self, x: Tensor) -> Tensor:
        """(n,), nats: the smallest term, positive where the goal is reached."""
        return self.terms(self.scores(x), self.labels).amin(1)


def escape(model, y: Tensor, floor: float | None = None, reject: tuple[int, ...] = ()) -> Goal:
    """Any class but the true one: the margin max_{k != y} z_k - z_y, nats.

    y (n,) true classes. floor: also log p(x) >= floor (nats), so that a detector with this threshold accepts the
    image. reject: classes that mean "no image" (the last one of `lib.detect.Reject`); such an answer counts as caught.
    """
    def terms(z, y):
        return _with_floor(_margin(z, y, reject), z, floor)

    def climb(z, y):
        # the soft margin of -log1p(max z - z): same argmax, and the gap to each class counts by its ratio
        return _soft_margin(-torch.log1p(z.amax(1, keepdim=True) - z), y) if floor is None and not reject \
            else terms(z, y).amin(1)

    return Goal(model, terms, climb, y, getattr(model, "random", False))


def become(model, target: Tensor, floor: float | None = None) -> Goal:
    """The class `target` (n,): the margin z_t - max_{k != t} z_k, nats; `floor` as in `escape`."""
    def terms(z, t):
        return _with_floor(-_margin(z, t), z, floor)

    def climb(z, t):
        return -_soft_margin(z, t) if floor is None else terms(z, t).amin(1)

    return Goal(model, terms, climb, target, getattr(model, "random", False), targeted=True)


def likely(score: Callable[[Tensor], Tensor], floor: float, n: int, random: bool = False) -> Goal:
    """log p(x) above `floor` (nats), for n images; `score`: (n, *shape) -> (n,), e.g. a model's `score`."""
    return _of_score(score, lambda s: s - floor, n, random)


def unlikely(score: Callable[[Tensor], Tensor], ceiling: float, n: int, random: bool = False) -> Goal:
    """log p(x) below `ceiling` (nats), for n images; `score`: (n, *shape) -> (n,)."""
    return _of_score(score, lambda s: ceiling - s, n, random)


def energy(model, k: int, level: float, n: int) -> Goal:
    """The score of class k above `level`, whatever the others say (one-vs-rest energies), for n images."""
    return _of_score(lambda x: model(x)[:, k], lambda s: s - level, n, getattr(model, "random", False))


def expected(goal: Goal, draws: int) -> Goal:
    """The goal in expectation over a random model: terms and climb averaged over `draws` >= 1 passes."""
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    return replace(goal, scores=lambda x: torch.stack([goal.scores(x) for _ in range(draws)]),
                   passes=draws * goal.passes,
                   terms=lambda z, y: torch.stack([goal.terms(one, y) for one in z]).mean(0),
                   climb=lambda z, y: torch.stack([goal.climb(one, y) for one in z]).mean(0))


def settled(goal: Goal, draws: int = 8, seed: int = 0) -> Goal:
    """The goal of a random model with its noise held still, for attacks that take scores to be a function.

    The scores are the log-mean-exp over `draws` >= 1 passes, log 1/n sum_i exp z_i (nats), always with the noise of
    `seed`: a batch asked twice is answered alike, in another batch an image meets other noise. What such an attack
    finds must still be judged on fresh draws, as `attack` does. A goal that is not random is returned as it is.
    """
    fixed = _fixed(goal, draws, seed)
    return replace(fixed, scores=lambda x: fixed.scores(x).logsumexp(0) - math.log(draws)) if goal.random else goal


def decided(goal: Goal, draws: int = 10, seed: int = 0, share: float = 0.7) -> Goal:
    """The goal of a random model as a decision that does not change: reached in nearly all of `draws` fixed draws.

    The value is the one that a `share` of the draws exceeds, so an attack that sees nothing but decisions gains little
    by fitting the noise of a single draw, as it would under the log-mean-exp of `settled`. Noise as there. A goal that
    is not random is returned as it is.
    """
    fixed = _fixed(goal, draws, seed)

    def terms(z, y):
        values = torch.stack([goal.terms(one, y).amin(1) for one in z])
        return values.quantile(1 - share, dim=0, interpolation="lower")[:, None]

    return replace(fixed, terms=terms, climb=lambda z, y: terms(z, y)[:, 0]) if goal.random else goal


def _fixed(goal: Goal, draws: int, seed: int) -> Goal:
    """The goal with the scores (draws, n, C) of a random model under the noise of `seed`, the same at every call."""
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")

    def scores(x):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # one pass over all draws: on small images two to three times faster than one pass each
            z = goal.scores(x.repeat(draws, *(1 for _ in x.shape[1:])))
        return z.unflatten(0, (draws, len(x)))

    return replace(goal, scores=scores, random=False, passes=draws * goal.passes)


def _of_score(score, value, n: int, random: bool) -> Goal:
    """A goal about one number per image."""
    return Goal(lambda x: score(x)[:, None], lambda z, _: value(z), lambda z, _: value(z)[:, 0],
                torch.zeros(n, dtype=torch.long), random)


def _margin(z: Tensor, y: Tensor, reject: tuple[int, ...] = ()) -> Tensor:
    """Best score among other classes that are no rejection, minus the best of the own class and the rejections."""
    caught = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[:, None], True)
    if reject:
        caught[:, list(reject)] = True
    return z.masked_fill(caught, -torch.inf).amax(1) - z.masked_fill(~caught, -torch.inf).amax(1)


def _soft_margin(z: Tensor, y: Tensor) -> Tensor:
    """logsumexp_{k != y} z_k - z_y: as the margin, but every close class pulls."""
    own = torch.zeros_like(z, dtype=torch.bool).scatter_(1, y[:, None], True)
    return z.masked_fill(own, -torch.inf).logsumexp(1) - z.gather(1, y[:, None])[:, 0]


def _with_floor(margin: Tensor, z: Tensor, floor: float | None) -> Tensor:
    """The terms (n, 1) or, with the detector's, (n, 2): log p(x) = logsumexp z must exceed the floor."""
    return margin[:, None] if floor is None else torch.stack([margin, z.logsumexp(1) - floor], 1)

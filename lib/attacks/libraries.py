"""Attacks of the libraries we depend on, as methods for `attack`. The libraries are imported where they are used."""
import logging
import math
import warnings

import torch
from torch import Tensor, nn

from lib.attacks.attack import Draws, length, wide
from lib.attacks.goals import Goal, decided, escape, settled


def boundary(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, start: Tensor, queries: int = 8000,
             passes: int = 10, curve: list | None = None) -> Tensor:
    """The boundary attack (Brendel et al. 2018, by foolbox): a walk along the boundary from images that reach the goal.

    It sees decisions only, whether the goal is reached, and returns the nearest image (L2) that it asked for and that
    reaches the goal. `eps` is not used.

    start    (n, *shape), pixels in [0, 1]: where to start for each of the n images, all of which must be one batch
    queries  >= 16 decisions per image, all of them spent
    passes   draws of a random model's noise that one decision asks, always the same ones (`decided`)
    curve    a list, to which the L2 distance found so far is appended after every query, as (n,)
    """
    if norm != 2 or queries < 16 or start.shape != x.shape:
        raise ValueError("boundary needs norm 2, queries >= 16 and one start for each image of one batch, got "
                         f"norm={norm}, queries={queries}, {len(start)} starts, {len(x)} images")
    from foolbox import PyTorchModel
    from foolbox.attacks import BoundaryAttack

    walk = _Walk(decided(goal, passes), x)
    missed = int((~walk.ask(start)).sum())
    if missed:
        raise ValueError(f"start must reach the goal, but {missed} of {len(start)} images do not")
    every = 10
    # foolbox asks for the starts again, then once a step and once more every tenth step; with a limit of 0 on its
    # own step length it never stops early
    steps = (queries - 2) * every // (every + 1)
    walker = BoundaryAttack(steps=steps, source_step_convergance=0.0, update_stats_every_k=every)
    with warnings.catch_warnings():
        # its statistics take the mean of an empty window, and compare nothing with the result
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        walker.run(PyTorchModel(walk.eval(), bounds=(0, 1), device=x.device), x, torch.zeros_like(goal.labels),
                   starting_points=start)
    if curve is not None:
        curve.extend(walk.curve)
    return walk.best


class _Walk(nn.Module):
    """The goal as a model of two classes, "not reached" and "reached", that keeps the nearest image that reached it."""

    def __init__(self, goal: Goal, x: Tensor) -> None:
        super().__init__()
        self.goal, self.x, self.best, self.curve = goal, x, x, []
        self.distance = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)

    @torch.no_grad()
    def ask(self, images: Tensor) -> Tensor:
        """(n,) bool: whether each image reaches the goal. A value that is not a number does not."""
        reached, distance = self.goal.value(images) > 0, length(images - self.x, 2)
        nearer = reached & (distance < self.distance)
        self.best = torch.where(wide(nearer, images), images, self.best)
        self.distance = torch.where(nearer, distance, self.distance)
        self.curve.append(self.distance)
        return reached

    def forward(self, images: Tensor) -> Tensor:
        reached = self.ask(images).to(images.dtype)
        return torch.stack([1 - reached, reached], 1)


def autoattack(goal: Goal, x: Tensor, *, eps: float, norm: float, draw: Draws, passes: int = 8) -> Tensor:
    """AutoAttack, version "standard" (Croce and Hein 2020, by pyautoattack): APGD-CE, APGD-T, FAB-T and Square.

    The goal must be a plain `escape` of a model with at least 4 scores; `eps` finite. The scores go in as they are,
    except to APGD-CE, whose softmax saturates on scores a hundred nats apart: it climbs -log1p(max z - z), which has
    the same argmax. A random model is attacked with the noise of `passes` draws held still (`settled`).
    Raises RuntimeError if an image has a zero gradient, which AutoAttack itself only logs.
    """
    if not math.isfinite(eps):
        raise ValueError(f"autoattack needs a finite eps, got {eps}")
    goal = settled(goal, passes)
    classes = _classes(goal, x)
    from pyautoattack import AutoAttack

    suite = AutoAttack(goal.scores, norm="L2" if norm == 2 else "Linf", eps=eps, device=x.device,
                       seed=int(torch.randint(2**31, ())))
    suite.apgd_targeted.n_target_classes = suite.fab.n_target_classes = min(9, classes - 1)
    suite.apgd.model = lambda images: _unsaturated(goal.scores(images))
    suite.logger.addFilter(_no_zero_gradient)
    try:
        return suite.run_standard_evaluation(x, goal.labels, batch_size=len(x))[0]
    finally:
        suite.logger.removeFilter(_no_zero_gradient)


def _no_zero_gradient(record: logging.LogRecord) -> bool:
    """Lets AutoAttack's warnings through, but for the one that makes its result worthless."""
    if "zero gradient" in record.getMessage():
        raise RuntimeError(f"autoattack: {record.getMessage()}")
    return True


def _unsaturated(z: Tensor) -> Tensor:
    # -log1p(max z - z)
    return -torch.log1p(z.amax(1, keepdim=True) - z)


@torch.no_grad()
def _classes(goal: Goal, x: Tensor) -> int:
    """The number of classes of a plain `escape` of at least 4, else ValueError."""
    classes = goal.scores(x[:1]).shape[-1]
    plain = escape(goal.scores, goal.labels)
    # each class in turn far above the others: only the margin of `escape` answers all of these alike
    probes = [row.expand(len(x), classes) for row in torch.eye(classes, device=x.device)]
    if classes < 4 or not all(torch.equal(goal.terms(z, goal.labels), plain.terms(z, goal.labels)) for z in probes):
        raise ValueError("autoattack needs a goal `escape` without floor or rejection, on at least 4 classes, "
                         f"got {classes} classes and terms {goal.terms.__qualname__}")
    return classes

"""How odd an image is to a model, whatever its scores are, and the attacker who knows that the odd are turned away."""
from dataclasses import replace

import torch
from torch import Tensor

from lib.attacks.goals import Goal, escape
from lib.models.protocol import GenerativeClassifier


def oddness(model: GenerativeClassifier, scores: Tensor) -> Tensor:
    """(n,), nats, the larger the odder, from the model's scores (n, classes): what a detector of any model thresholds.

    -log p(x) of a normalised model; -log max_y p(y|x) of a posterior (Hendrycks and Gimpel 2017, arXiv 1610.02136); of
    another, such as an unnormalised energy, minus its best score.
    """
    return -scores.logsumexp(1) if model.normalised else -_familiar(model, scores).amax(1)


def unnoticed(model: GenerativeClassifier, y: Tensor, cut: float) -> Goal:
    """Any class but the true ones y (n,), and an oddness of at most `cut` (nats): past classifier and detector at once."""
    if model.normalised:
        return escape(model, y, floor=-cut)
    plain = escape(model, y)

    def terms(z, y):
        # the best score of a fooled model is another class's: left in, the true one's would pull the attack back to x
        others = _familiar(model, z).scatter(1, y[:, None], -torch.inf)
        return torch.stack([plain.terms(z, y)[:, 0], cut + others.amax(1)], 1)

    return replace(plain, terms=terms, climb=lambda z, y: terms(z, y).amin(1))


def _familiar(model, scores):
    """(n, classes): how familiar the image looks as each class, nats."""
    return scores.log_softmax(1) if model.space == "posterior" else scores

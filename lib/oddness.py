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
    return -_familiarity(model, scores)


def unnoticed(model: GenerativeClassifier, y: Tensor, cut: float) -> Goal:
    """Any class but the true ones y (n,), and an oddness of at most `cut` (nats): past classifier and detector at once."""
    plain = escape(model, y)

    def terms(z, y):
        return torch.stack([plain.terms(z, y)[:, 0], cut - oddness(model, z)], 1)

    def climb(z, y):
        # what makes a fooled model sure is another class: with the true one left in, its score would pull back to x
        return torch.minimum(plain.terms(z, y)[:, 0], cut + _familiarity(model, z, hide=y))

    return replace(plain, terms=terms, climb=climb)


def _familiarity(model, scores, hide=None):
    """Minus the oddness (n,), nats; of all classes but one for each image where `hide` (n,) names it."""
    scores = scores.log_softmax(1) if model.space == "posterior" and not model.normalised else scores
    if hide is not None:
        scores = scores.scatter(1, hide[:, None], -torch.inf)
    return scores.logsumexp(1) if model.normalised else scores.amax(1)

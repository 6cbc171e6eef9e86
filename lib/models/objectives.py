"""Between likelihood and classification: the family of losses to which Base and Reweight belong.

Pure functions (model, images, labels) -> scalar, in nats, as in `lib.models.losses`.
"""

import torch
from torch.nn import functional as F

from lib.models.protocol import GenerativeClassifier


def label_weighted(model: GenerativeClassifier, x: torch.Tensor, y: torch.Tensor,
                   weight: float) -> torch.Tensor:
    """-[log p(x) + weight log p(y|x)]/D: the two terms of fetaya2020, Eq. 4, the second times `weight` >= 0.

    x is a batch (batch, *shape) in [0, 1], y its labels (batch,), D the unpadded dimension. Weight 0 is the
    class-blind likelihood -log p(x)/D, which no label enters; 1 is `losses.base`; D + 1 is `losses.reweight`
    (Eq. 6) up to the constant log p(y)/D, because log p(x|y) holds log p(y|x) once more.
    Raises ValueError for a negative weight.
    """
    if not weight >= 0:
        raise ValueError(f"weight must be >= 0, got {weight}")
    scores = model(x)
    # log p(x) = logsumexp_y [log p(x|y) + log p(y)]
    image = -scores.logsumexp(1).mean()
    # log p(y|x) = score - logsumexp(scores)
    return (image + weight * F.cross_entropy(scores, y)) / model.dimension

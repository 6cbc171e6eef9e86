"""The decision rule with rejection of sdim2020: a threshold for each class, on the score of the class that wins."""
import numpy as np
import torch
from torch import Tensor, nn

from lib.detect import joint_scores
from lib.models.protocol import GenerativeClassifier


def class_log_prob(model: GenerativeClassifier, images: Tensor, seed: int = 0, batch: int = 256) -> Tensor:
    """log p(x|c) of images (n, channels, height, width), of what the model's scores are a density of: (n, classes), nats.

    One draw of a random model's noise, fixed by `seed` and `batch`. Raises ValueError for a model without a density.
    """
    if not model.normalised:
        raise ValueError(f"class_log_prob needs a normalised model, got {type(model).__name__} ({model.space})")
    return joint_scores(model, images, seed, batch).double() - model.log_prior


def thresholds(scores: Tensor, labels: Tensor, percentile: float) -> np.ndarray:
    """delta_c: the percentile of log p(x|c) over those images of class c that are classified correctly: (classes,), nats.

    scores (n, classes), labels (n,), of training images in the paper; percentile in [0, 100]. A class of which no image
    is classified correctly has no threshold: -inf, which rejects nothing.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must be in [0, 100], got {percentile}")
    right = scores.argmax(1) == labels
    own = [scores[right & (labels == c), c].numpy() for c in range(scores.shape[1])]
    return np.array([np.percentile(s, percentile) if len(s) else -np.inf for s in own])


def rejected(scores: Tensor, delta: np.ndarray) -> np.ndarray:
    """(n,) bool: the rule of sdim2020, Eq. 9: reject where log p(x|y*) < delta_{y*}, y* the class of the largest score."""
    best = scores.max(1)
    return best.values.numpy() < delta[best.indices.numpy()]


def class_wise(scores: Tensor, delta: np.ndarray) -> np.ndarray:
    """(classes,): the share of all images below each class's threshold, whose mean is what the paper's Table 3 prints.

    Not the share that the rule rejects: an image counts against classes that it would never be given to.
    """
    return (scores.numpy() < delta).mean(0)


class RejectByClass(nn.Module):
    """A classifier with one class more, "no image", for attacks that know the rule: scores (batch, C + 1), nats.

    The last is max_k z_k + (delta_{y*} - log p(x|y*)), the largest exactly where the rule rejects.
    """

    def __init__(self, model: GenerativeClassifier, delta: np.ndarray) -> None:
        super().__init__()
        if not model.normalised or np.shape(delta) != (model.classes,):
            raise ValueError(f"RejectByClass needs a normalised model and one threshold for each of its {model.classes} "
                             f"classes, got {type(model).__name__} ({model.space}) and delta of shape {np.shape(delta)}")
        self.model, self.random, self.classes, self.shape = model, model.random, model.classes + 1, model.shape
        self.register_buffer("delta", torch.as_tensor(delta, dtype=torch.float32, device=next(model.parameters()).device))

    def forward(self, x: Tensor) -> Tensor:
        z = self.model(x)
        best = z.max(1)
        # log p(x|y*) = z_{y*} - log p(y)
        no_image = best.values + self.delta[best.indices] - (best.values - self.model.log_prior)
        return torch.cat([z, no_image[:, None]], 1)

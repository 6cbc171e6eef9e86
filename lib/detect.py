"""Scores of images, and the detector that rejects what is too unlikely (fetaya2020, Section 4 and Appendix B)."""
import math

import numpy as np
import torch
from torch import nn

from lib.models.protocol import GenerativeClassifier, bits_per_dim

REJECTIONS = (0.0, 0.01, 0.05, 0.214)     # shares of validation images that a threshold rejects; 0 and 21.4 % are the paper's


@torch.no_grad()
def joint_scores(model: GenerativeClassifier, images: torch.Tensor, seed: int = 0, batch: int = 256) -> torch.Tensor:
    """Joint scores log p(x|y) + log p(y) of images (n, channels, height, width): (n, classes), nats, on the CPU.

    One draw of the model's noise, fixed by `seed` and `batch`; the caller's generator is left as it was.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.cat([model(x.to(device)).cpu() for x in images.split(batch)])


def nll(scores: torch.Tensor, model: GenerativeClassifier) -> np.ndarray:
    """-log p(x) in bits/dim from joint scores (..., classes): what the detector thresholds."""
    return bits_per_dim(scores.double().logsumexp(-1), model).numpy()


def conditional_nll(scores: torch.Tensor, model: GenerativeClassifier) -> np.ndarray:
    """-log p(x|y) in bits/dim for every class, from joint scores (..., classes)."""
    return bits_per_dim(scores.double() - model.log_prior, model).numpy()


def threshold(calibration: np.ndarray, rejection: float) -> float:
    """The threshold in bits/dim that a share `rejection` in [0, 1) of the calibration images exceeds (0: none does)."""
    if not 0 <= rejection < 1:
        raise ValueError(f"rejection must be in [0, 1), got {rejection}")
    return float(np.quantile(calibration, 1 - rejection))


def two_sided(calibration: np.ndarray, rejection: float) -> tuple[float, float]:
    """(low, high) in bits/dim: the typicality test that rejects what lies outside, so a share `rejection` in [0, 1).

    A one-sided threshold lets everything pass that is likelier than the data; attacks that raise the likelihood
    (fetaya2020, Section 2) are caught only here. Both tails have the same share.
    """
    if not 0 <= rejection < 1:
        raise ValueError(f"rejection must be in [0, 1), got {rejection}")
    low, high = np.quantile(calibration, [rejection / 2, 1 - rejection / 2])
    return float(low), float(high)


def floor(threshold: float, model: GenerativeClassifier) -> float:
    """The log p(x) in nats at which -log p(x) is `threshold` bits/dim: the inverse of `bits_per_dim`."""
    return (math.log2(model.grey_levels) - threshold) * model.dimension * math.log(2)


def rates(data: np.ndarray, others: np.ndarray) -> dict[str, np.ndarray | float]:
    """How well a score (n,), higher for outliers, tells `others` from `data`: the ROC curve and its area.

    fpr: share of data rejected; tpr: share of the others rejected; auroc; fpr95: share of data rejected where 95 %
    of the others are.
    """
    from sklearn.metrics import roc_auc_score, roc_curve
    truth, scores = np.repeat([0, 1], [len(data), len(others)]), np.concatenate([data, others])
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    return {"fpr": fpr, "tpr": tpr, "auroc": float(roc_auc_score(truth, scores)), "fpr95": float(fpr[tpr >= 0.95][0])}


class Reject(nn.Module):
    """A classifier with one class more, "no image" (fetaya2020, Section 4.3): the answer of model and detector in one.

    Scores (batch, C + 1), nats: those of the model, then max_k z_k + (floor - log p(x)), which is the largest exactly
    where log p(x) < floor. `floor` in nats, as from `floor(threshold, model)`.
    """

    def __init__(self, model: GenerativeClassifier, floor: float) -> None:
        super().__init__()
        if not model.normalised:
            raise ValueError(f"Reject needs a normalised model, got {type(model).__name__} ({model.space})")
        self.model, self.floor = model, floor
        self.random, self.classes, self.shape = model.random, model.classes + 1, model.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.model(x)
        no_image = z.amax(1) + self.floor - z.logsumexp(1)
        return torch.cat([z, no_image[:, None]], 1)

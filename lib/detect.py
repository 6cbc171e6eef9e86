"""Scores of images, and the detector that rejects what is too unlikely (fetaya2020, Section 4 and Appendix B)."""
import numpy as np
import torch

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

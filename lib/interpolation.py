"""Straight lines between images of different classes (fetaya2020, Section 4.4)."""
import numpy as np
import torch

from lib.detect import joint_scores, nll
from lib.models.protocol import GenerativeClassifier


def endpoints(labels: torch.Tensor, usable: np.ndarray, pairs: int, seed: int = 0) -> np.ndarray:
    """(pairs, 2) indices of usable images of different classes, each unordered pair at most once.

    `usable` (n,) says which images may be endpoints (the paper: classified correctly and accepted). Fewer pairs come
    back where there are not as many; ValueError where there is none.
    """
    chosen = np.flatnonzero(usable)
    first, second = np.triu_indices(len(chosen), 1)
    every = np.stack([chosen[first], chosen[second]], 1)
    every = every[labels.numpy()[every[:, 0]] != labels.numpy()[every[:, 1]]]
    if not len(every):
        raise ValueError(f"usable must leave images of two classes, got {len(chosen)} images")
    return np.random.default_rng(seed).permutation(every)[:pairs]


def walk(model: GenerativeClassifier, images: torch.Tensor, labels: torch.Tensor, pairs: np.ndarray,
         alphas: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """What the model thinks along the lines between pairs of images; every array has shape (pairs, alphas).

    Returns nll (-log p(x_alpha), bits/dim), start and end (p(y_0|x_alpha) and p(y_1|x_alpha)), and confidence (the
    largest class probability).
    """
    x0, x1 = images[pairs[:, 0]], images[pairs[:, 1]]
    a = torch.as_tensor(alphas, dtype=x0.dtype)[None, :, None, None, None]
    # x_alpha = alpha x_1 + (1 - alpha) x_0
    line = a * x1[:, None] + (1 - a) * x0[:, None]
    scores = joint_scores(model, line.flatten(0, 1), seed).unflatten(0, line.shape[:2])
    posterior = scores.double().softmax(-1).numpy()
    y0, y1 = (labels.numpy()[pairs[:, k], None, None] for k in (0, 1))
    return {"nll": nll(scores, model), "confidence": posterior.max(-1),
            "start": np.take_along_axis(posterior, y0, -1)[..., 0], "end": np.take_along_axis(posterior, y1, -1)[..., 0]}

"""The one protocol of all five works: images go to joint scores log p(x|y) + log p(y)."""

import math

import torch
from torch import nn

SPACES = ("pixels", "features", "bound", "distance", "energy", "posterior")


class GenerativeClassifier(nn.Module):
    """Base of every model: `forward(x)` returns joint scores, the attributes declare what these scores are.

    `forward(x)`: x of shape (batch, *shape), pixels in [0, 1], on the grid {0, 1/(L-1), ..., 1} of L grey
    levels for real images and anywhere in between under attack -> (batch, classes), log p(x|y) + log p(y) in
    nats, finite. The prediction is the argmax.

    space       what the scores measure, one of SPACES; only "pixels" is a log-density of the image itself
    normalised  True when exp(scores) sums and integrates to one, so that logsumexp over classes is log p(x)
    random      True when forward draws noise: two calls differ, torch.manual_seed fixes them
    classes     number of classes C
    shape       (channels, height, width) of one image, before any padding inside the model
    grey_levels number L of values a pixel takes, 256 for 8-bit images
    """

    space: str
    normalised: bool
    random: bool
    classes: int
    shape: tuple[int, int, int]
    grey_levels: int

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if getattr(cls, "space", SPACES[0]) not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {cls.space!r}")

    @property
    def dimension(self) -> int:
        """D, the number of values of one image, padding not counted."""
        return math.prod(self.shape)

    @property
    def log_prior(self) -> float:
        """log p(y) in nats: uniform and treated as known, as in fetaya2020."""
        return -math.log(self.classes)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x) = logsumexp_y [log p(x|y) + log p(y)], (batch,), nats: what a detector thresholds."""
        if not self.normalised:
            raise ValueError(f"score needs a normalised model, got {type(self).__name__} ({self.space})")
        return self(x).logsumexp(1)


def bits_per_dim(log_density: torch.Tensor, model: GenerativeClassifier) -> torch.Tensor:
    """Bits per dimension of log-densities in nats (any shape), the only place where this unit is made.

    With L grey levels a pixel value k/(L-1) stands for the bin [k/L, (k+1)/L) of the unit interval. Models
    score the dequantised image v = ((L-1) x + u)/L, u ~ U[0,1)^D, so `log_density` is a density on the unit
    cube of v, not per grey level. One bin has volume L^-D, and by Jensen the code length of the discrete
    image is at most the mean of -log p(v) + D log L, hence bits/dim = -log p(v)/(D ln 2) + log2 L. The
    uniform density gives log2 L.

    Raises ValueError unless the model declares a normalised density of pixels: feature densities, bounds,
    energies and distances have no bits per dimension of the image.
    """
    if model.space != "pixels" or not model.normalised:
        kind = f"{'normalised' if model.normalised else 'unnormalised'} scores of {model.space}"
        raise ValueError(f"bits_per_dim needs a density of pixels, got {type(model).__name__}: {kind}")
    return -log_density / (model.dimension * math.log(2)) + math.log2(model.grey_levels)


def log_mean_exp(model: GenerativeClassifier, x: torch.Tensor, draws: int = 8) -> torch.Tensor:
    """Scores averaged over a random model's noise: log 1/n sum_i exp(forward_i(x)), (batch, classes), nats.

    A tighter bound on the discrete log-likelihood than one draw (importance-weighted dequantisation), for
    uses that only need a decision. `draws` >= 1; the noise comes from torch's global generator.
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    scores = torch.stack([model(x) for _ in range(draws)])
    return scores.logsumexp(0) - math.log(draws)

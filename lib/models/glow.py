"""Conditional Glow (fetaya2020): one flow, a class-conditional prior, all classes in one encoding."""

import math

import torch
from torch import nn

from lib.models.flow import MultiScaleFlow
from lib.models.priors import ClassGaussian, SplitGaussian
from lib.models.protocol import GenerativeClassifier

# Range of the padding noise after scaling (fetaya2020, Appendix A.3).
PADDING_SCALE = 2 / 256


class ConditionalGlow(GenerativeClassifier):
    """Generative classifier by an invertible network (fetaya2020, Section 4.1 and Appendix A).

    shape        (channels, height, width) of an image; height and width multiples of 2**(levels-1)
    classes      C >= 2; p(y) = 1/C
    grey_levels  L >= 2, values a pixel takes (256 for 8-bit images, 17 for scikit-learn's digits)
    levels       resolutions (paper: 4);  depth: steps per level (12 MNIST, 16 CIFAR10)
    width        channels of the hidden convolutions (128 MNIST, 256 CIFAR10)
    prior        "gaussian" (Base and Reweight, which differ in the loss only) or "split"

    Input x in [0, 1]. Two kinds of noise enter, by one law in training, calibration, evaluation and attack:
    dequantisation v = ((L-1) x + u)/L with u ~ U[0,1)^D, one grey level wide, and D padding channels a = c
    u', u' ~ U[0,1)^D, c = 2/256. The network sees (v - 1/2, a). All log-densities are those of v on the unit
    cube: log p(x|y) = log p(v - 1/2, a | y) + D log c, where the last term undoes the scaling of the padding.
    """

    space, normalised, random = "pixels", True, True

    def __init__(self, shape: tuple[int, int, int], classes: int, *, grey_levels: int = 256, levels: int = 3,
                 depth: int = 4, width: int = 64, prior: str = "gaussian") -> None:
        super().__init__()
        self.config = dict(shape=list(shape), classes=classes, grey_levels=grey_levels, levels=levels,
                           depth=depth, width=width, prior=prior)
        for name, least in dict(classes=2, grey_levels=2, levels=1, depth=1, width=1).items():
            if self.config[name] < least:
                raise ValueError(f"{name} must be >= {least}, got {self.config[name]}")
        channels, height, width_px = self.shape = tuple(shape)
        self.classes, self.grey_levels = classes, grey_levels
        self.flow = MultiScaleFlow((2 * channels, height, width_px), levels, depth, width)
        size = 2 * self.dimension
        if prior == "gaussian":
            self.prior: nn.Module = ClassGaussian(classes, size)
        elif prior == "split":
            top = math.prod(self.flow.shapes[-1])
            if top < classes:
                raise ValueError(f"levels must leave the top latent at least `classes` = {classes} "
                                 f"coordinates for the split prior, got levels={levels}, which leaves {top}")
            self.prior = SplitGaussian(classes, size, width)
        else:
            raise ValueError(f"prior must be 'gaussian' or 'split', got {prior!r}")
        self.register_buffer("initialised", torch.tensor(False))
        self.to(memory_format=torch.channels_last)

    def draw_noise(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One draw of the noise for x, U[0, 1), (batch, 2, *shape): dequantisation, then padding."""
        return torch.rand(len(x), 2, *self.shape, dtype=x.dtype, device=x.device, generator=generator)

    def _padded(self, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """(batch, channels, ...) in [0, 1] -> network input (batch, 2 channels, ...)."""
        if x.shape[1:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"x must have shape (batch, {wanted}), got {tuple(x.shape)}")
        noise = self.draw_noise(x) if noise is None else noise
        # v = ((L-1) x + u)/L on the unit cube, minus 1/2;  padding a = c u'
        v = ((self.grey_levels - 1) * x + noise[:, 0]) / self.grey_levels
        return torch.cat([v - 0.5, PADDING_SCALE * noise[:, 1]], dim=1)

    @torch.no_grad()
    def initialise(self, x: torch.Tensor) -> None:
        """Data-dependent initialisation of the actnorms on images x; happens here and nowhere else.

        Raises RuntimeError on a second call: a trained model must not be reset by a stray batch.
        """
        if self.initialised:
            raise RuntimeError("initialise must be called once, on a fresh model; this one is initialised")
        self.flow.initialise(self._padded(x, None))
        self.initialised.fill_(True)

    def encode(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents z (batch, 2D) and log_det (batch,), nats: log p(x|y) = log p(z|y) + log_det.

        `noise` as from `draw_noise`; by default drawn afresh from torch's global generator.
        """
        z, log_det = self.flow(self._padded(x, noise))
        # p(x, u') = p(x, a) c^D  =>  log p gains D log c
        return z, log_det + self.dimension * math.log(PADDING_SCALE)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (batch, 2D) -> images on the grid {0, 1/(L-1), ..., 1}: the bin that holds v."""
        v = self.flow.inverse(z)[:, :self.shape[0]] + 0.5
        return (v * self.grey_levels).floor().clamp(0, self.grey_levels - 1) / (self.grey_levels - 1)

    def log_likelihoods(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x|y) for every class from one encoding: (batch, classes), nats."""
        z, log_det = self.encode(x, noise)
        return self.prior.log_prob(z) + log_det[:, None]

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Joint scores log p(x|y) + log p(y): (batch, classes), nats."""
        return self.log_likelihoods(x, noise) + self.log_prior

    def log_prob(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x) = logsumexp_y [log p(x|y) + log p(y)]: (batch,), nats."""
        return self(x, noise).logsumexp(1)

    @torch.no_grad()
    def sample(self, labels: torch.Tensor | int, temperature: float = 1.0) -> torch.Tensor:
        """Images (batch, *shape) of the given labels (batch,), or of so many uniformly drawn labels.

        `temperature` >= 0 multiplies the standard deviations of the prior (1: the model's own distribution).
        """
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        if isinstance(labels, int):
            labels = torch.randint(self.classes, (labels,), device=self.initialised.device)
        return self.decode(self.prior.sample(labels, temperature))

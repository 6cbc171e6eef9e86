"""Supervised deep infomax (sdim2020): a generative classifier of features, its critic and its discriminative twin.

An encoder E maps an image to d numbers; each class is a Gaussian over them, and a critic keeps E informative about the
image. The density is one of features: it has no bits per dimension of the image.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models.protocol import GenerativeClassifier

FILTERS = (32, 64, 128, 256)
VARIANTS = ("paper", "authors")
# of the authors' code, p3i0t/robust-generative-classifier: weights of the three parts, and the margin per feature
AUTHORS_WEIGHT, AUTHORS_MARGIN = 0.33, 5.0


class Block(nn.Module):
    """relu(conv-bn-relu-conv-bn + shortcut), 3x3; the shortcut is a 1x1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
                                  nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if (inputs, stride) == (outputs, 1) else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """The encoder of 8n + 2 layers (sdim2020, Section 5): images (batch, *shape) -> (batch, outputs).

    Four stages of n blocks; a stage halves the map while it is wider than 4 pixels, which gives the paper's 32, 16, 8
    and 4 and keeps 4x4 local features for smaller images. Raises ValueError for n < 1 or images below 4 pixels a side.
    """

    def __init__(self, shape: tuple[int, int, int], outputs: int, n: int = 1, filters: tuple[int, ...] = FILTERS,
                 hidden: bool = False) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
        if min(shape[1:]) < 4:
            raise ValueError(f"shape must be at least 4 pixels high and wide, got {tuple(shape)}")
        self.stem = nn.Sequential(nn.Conv2d(shape[0], filters[0], 3, 1, 1, bias=False), nn.BatchNorm2d(filters[0]), nn.ReLU())
        width, size, stages = filters[0], max(shape[1:]), []
        for i, out in enumerate(filters):
            stride = 2 if i and size > 4 else 1
            size = -(-size // stride)
            stages.append(nn.Sequential(*(Block(width if j == 0 else out, out, stride if j == 0 else 1) for j in range(n))))
            width = out
        self.stages = nn.ModuleList(stages)
        head = [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()] if hidden else []
        self.head = nn.Sequential(*head, nn.Linear(width, outputs))

    def local_and_global(self, x: Tensor, stage: int = -1) -> tuple[Tensor, Tensor]:
        """The feature map (batch, filters, h, w) after `stage` and the output (batch, outputs)."""
        maps, x = [], self.stem(x)
        for block in self.stages:
            x = block(x)
            maps.append(x)
        return maps[stage], self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_and_global(x)[1]


class SDIM(GenerativeClassifier):
    """Class-conditional Gaussians over the features of a ResNet (sdim2020, Section 3).

    shape, classes  of the images;  n, filters: of the encoder;  d: number of features;  critic: width of T
    variant  "paper", or "authors": their code's head with a hidden layer and local features of the second stage, and
             the objective of `sdim_loss`; its critic and shortcuts stay those of the paper
    """

    space, normalised, random = "features", True, False

    def __init__(self, shape: tuple[int, int, int], classes: int, grey_levels: int = 256, n: int = 1,
                 filters: tuple[int, ...] = FILTERS, d: int = 64, critic: int = 256, variant: str = "paper") -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        if d < 1:
            raise ValueError(f"d must be >= 1, got {d}")
        self.shape, self.classes, self.grey_levels, self.variant = tuple(shape), classes, grey_levels, variant
        self.config = dict(shape=list(shape), classes=classes, grey_levels=grey_levels, n=n, filters=list(filters), d=d,
                           critic=critic, variant=variant)
        self.encoder = ResNet(shape, d, n, filters, hidden=variant == "authors")
        self.local_stage = 1 if variant == "authors" else -1
        self.mean = nn.Parameter(torch.randn(classes, d))
        self.log_std = nn.Parameter(torch.zeros(classes, d))
        # Table 8: 1x1 convolutions on a local feature beside the global vector
        self.T = nn.Sequential(nn.Conv2d(filters[self.local_stage] + d, critic, 1), nn.ReLU(), nn.Conv2d(critic, critic, 1),
                               nn.ReLU(), nn.Conv2d(critic, 1, 1))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Local features (batch, filters, h, w) and the features xhat = E(x) (batch, d)."""
        return self.encoder.local_and_global(x, self.local_stage)

    def log_prob(self, xhat: Tensor) -> Tensor:
        """log p(xhat|c) of every class, (batch, d) -> (batch, classes), nats."""
        standard = (xhat[:, None] - self.mean) * (-self.log_std).exp()
        # -1/2 sum_j [ (xhat_j - mu_cj)^2/sigma_cj^2 + log(2 pi sigma_cj^2) ]
        return -0.5 * standard.square().sum(2) - self.log_std.sum(1) - 0.5 * self.mean.shape[1] * math.log(2 * math.pi)

    def critic(self, local: Tensor, xhat: Tensor) -> Tensor:
        """T(L_i(x), xhat) at every position: (batch, filters, h, w) and (batch, d) -> (batch, h w)."""
        spread = xhat[:, :, None, None].expand(-1, -1, *local.shape[2:])
        return self.T(torch.cat([local, spread], 1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Joint scores log p(xhat|c) + log p(c), (batch, classes), nats."""
        return self.log_prob(self.encoder(x)) + self.log_prior


class Twin(GenerativeClassifier):
    """The discriminative counterpart: the encoder with one output a class; scores are logits of p(y|x), nats."""

    space, normalised, random = "posterior", False, False

    def __init__(self, shape: tuple[int, int, int], classes: int, grey_levels: int = 256, n: int = 1,
                 filters: tuple[int, ...] = FILTERS) -> None:
        super().__init__()
        self.shape, self.classes, self.grey_levels = tuple(shape), classes, grey_levels
        self.config = dict(shape=list(shape), classes=classes, grey_levels=grey_levels, n=n, filters=list(filters))
        self.encoder = ResNet(shape, classes, n, filters)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


# --- bounds on the information between local and global features ----------------------------------------------------

def jsd_bound(positive: Tensor, negative: Tensor) -> Tensor:
    """The Jensen-Shannon bound of Deep InfoMax, in (-inf, 0], nats, from T at pairs of one image and of two images.

    A bound on a shifted Jensen-Shannon divergence, not on the mutual information itself; T = 0 gives -2 log 2.
    """
    # E_J[-softplus(-T)] - E_M[softplus(T)]
    return -F.softplus(-positive).mean() - F.softplus(negative).mean()


def dv_bound(positive: Tensor, negative: Tensor) -> Tensor:
    """The Donsker-Varadhan bound on the mutual information (sdim2020, Eq. 1), nats."""
    # E_J[T] - log E_M[exp T]
    return positive.mean() - (negative.flatten().logsumexp(0) - math.log(negative.numel()))


def nwj_bound(positive: Tensor, negative: Tensor) -> Tensor:
    """The bound of sdim2020, Eq. 2, for the Kullback-Leibler divergence, f*(t) = exp(t - 1), nats."""
    # E_J[T] - E_M[exp(T - 1)]
    return positive.mean() - (negative - 1).exp().mean()


# --- the objective --------------------------------------------------------------------------------------------------

class Parts(NamedTuple):
    """The three parts of the objective, scalars in nats."""

    mi: Tensor
    nll: Tensor
    margin: Tensor


def parts(model: SDIM, x: Tensor, y: Tensor, margin: float = 10.0, squared: bool = True) -> Parts:
    """J_MI (Eq. 3), J_NLL (Eq. 5) and J_LM (Eq. 6) on a batch x (batch, *shape) with labels y (batch,).

    margin   K, nats, >= 0;  squared: the hinge squared, as in the paper, or not (its footnote 1)
    Negative pairs are the global features with the local ones of the next image of the batch (Appendix B.2).
    Raises ValueError for a batch of one, which has no negative pairs.
    """
    if len(x) < 2:
        raise ValueError(f"x must hold at least 2 images, for the negative pairs, got {len(x)}")
    local, xhat = model.features(x)
    return Parts(-jsd_bound(model.critic(local, xhat), model.critic(local.roll(1, 0), xhat)),
                 *gaussian_parts(model.log_prob(xhat), y, margin, squared))


def gaussian_parts(log_prob: Tensor, y: Tensor, margin: float = 10.0, squared: bool = True) -> tuple[Tensor, Tensor]:
    """J_NLL and J_LM from log p(xhat|c) (batch, classes), nats, and labels y (batch,)."""
    own = log_prob.gather(1, y[:, None])
    # max(log p(xhat|c) + K - log p(xhat|y), 0)
    hinge = (log_prob + margin - own).relu().scatter(1, y[:, None], 0.0)
    others = log_prob.shape[1] - 1
    # 1/N 1/(C-1) sum_i sum_{c != y_i} hinge^2
    return -own.mean(), (hinge.square() if squared else hinge).sum(1).mean() / others


def sdim_loss(model: SDIM, x: Tensor, y: Tensor, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0,
              margin: float = 10.0, squared: bool = True) -> Tensor:
    """J_SDIM = alpha J_MI + beta J_NLL + gamma J_LM (Eq. 7), nats; unbounded below, see the ledger's eq7.loss_unbounded.

    A model of `variant="authors"` gets their code's objective: weights of 0.33, log-likelihoods divided by d, and the
    plain hinge with a margin of 5 a feature; the other arguments are then unused.
    """
    if model.variant == "authors":
        local, xhat = model.features(x)
        mi = -jsd_bound(model.critic(local, xhat), model.critic(local.roll(1, 0), xhat))
        nll, hinge = gaussian_parts(model.log_prob(xhat) / model.mean.shape[1], y, AUTHORS_MARGIN, squared=False)
        return AUTHORS_WEIGHT * (mi + nll + hinge)
    mi, nll, hinge = parts(model, x, y, margin, squared)
    return alpha * mi + beta * nll + gamma * hinge


def twin_loss(model: Twin, x: Tensor, y: Tensor) -> Tensor:
    """-log p(y|x), mean over the batch, nats."""
    return F.cross_entropy(model(x), y)

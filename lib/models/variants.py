"""What else was tried (fetaya2020, Appendix C): robust priors, label smoothing, the flow-GAN.

Each is a ConditionalGlow with another prior or loss; all scores stay log-densities of the image, in nats.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.models.priors import LOG_2PI

TAILS = ("laplace", "cauchy", "mixture")


class HeavyTailed(nn.Module):
    """p(z|y) = prod_d q(u_d)/s_yd, u = (z - mu_y)/s_y, with tails of q heavier than the normal's (C.1).

    tails  "laplace": q(u) = exp(-|u|)/2;  "cauchy": q(u) = 1/(pi (1 + u^2));
           "mixture": q = (1-w) N(0, 1) + w Cauchy, the weight w of the tail learned per class and coordinate.

    `classes` components over `size` latent coordinates; mu and s are learned and start at 0 and 1, w at 0.12.
    The paper names the three families and leaves their parameters open.
    """

    def __init__(self, classes: int, size: int, tails: str) -> None:
        super().__init__()
        if tails not in TAILS:
            raise ValueError(f"tails must be one of {', '.join(TAILS)}, got {tails!r}")
        self.tails = tails
        self.mean = nn.Parameter(torch.zeros(classes, size))
        self.log_scale = nn.Parameter(torch.zeros(classes, size))
        if tails == "mixture":
            self.tail_logit = nn.Parameter(torch.full((classes, size), -2.0))

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log p(z|y) for every class: (batch, size) -> (batch, classes)."""
        u = (z[:, None] - self.mean) * (-self.log_scale).exp()
        if self.tails == "laplace":
            log_q = -u.abs() - math.log(2)
        else:
            log_q = -u.square().log1p() - math.log(math.pi)
        if self.tails == "mixture":
            # log [(1-w) N(u; 0, 1) + w Cauchy(u)],  w = sigmoid(tail_logit)
            log_normal = -0.5 * (u.square() + LOG_2PI)
            log_q = torch.logaddexp(F.logsigmoid(-self.tail_logit) + log_normal,
                                    F.logsigmoid(self.tail_logit) + log_q)
        return (log_q - self.log_scale).sum(-1)

    def sample(self, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """One latent per label, (batch,) -> (batch, size); `temperature` multiplies s."""
        mean = self.mean[labels]
        if self.tails == "laplace":
            u = torch.distributions.Laplace(torch.zeros_like(mean), 1.0).sample()
        else:
            u = torch.empty_like(mean).cauchy_()
        if self.tails == "mixture":
            heavy = torch.rand_like(mean) < self.tail_logit[labels].sigmoid()
            u = torch.where(heavy, u, torch.randn_like(mean))
        return mean + temperature * self.log_scale[labels].exp() * u


class RobustGlow(ConditionalGlow):
    """ConditionalGlow with a `HeavyTailed` class prior; further arguments as there (Appendix C.1)."""

    def __init__(self, shape: tuple[int, int, int], classes: int, *, tails: str, **settings) -> None:
        super().__init__(shape, classes, **settings)
        self.prior = HeavyTailed(classes, 2 * self.dimension, tails)
        self.config["prior"] = tails


def smooth(log_p: torch.Tensor, smoothing: float) -> torch.Tensor:
    """log p(x|y) where the latent cluster misses the label with probability `smoothing` (Appendix C.2).

    log_p  log p(x|k) of every cluster, (..., C), nats -> log p(x|y) of every label, (..., C), nats.

    With eps = `smoothing` in (0, 1): p(x|y) = (1-eps) p(x|k=y) + eps/(C-1) sum_{k != y} p(x|k). For eps at
    most 1 - 1/C it follows that p(x|y) >= eps/(C-1) max_k p(x|k) and p(y|x) >= eps/(C-1).
    """
    if not 0 < smoothing < 1:
        raise ValueError(f"smoothing must be in (0, 1), got {smoothing}")
    classes = log_p.shape[-1]
    # P(k|y): 1 - eps on the diagonal, eps/(C-1) elsewhere
    cluster = torch.full((classes, classes), smoothing / (classes - 1), dtype=log_p.dtype,
                         device=log_p.device)
    cluster.fill_diagonal_(1 - smoothing)
    return (log_p[..., None, :] + cluster.log()).logsumexp(-1)


class SmoothedClusters(nn.Module):
    """A class prior whose component is the latent k of `smooth`, not the label itself."""

    def __init__(self, prior: nn.Module, smoothing: float) -> None:
        super().__init__()
        self.clusters, self.smoothing = prior, smoothing

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log p(z|y) for every class: (batch, size) -> (batch, classes)."""
        return smooth(self.clusters.log_prob(z), self.smoothing)

    def sample(self, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """One latent per label, (batch,) -> (batch, size); `temperature` multiplies the clusters' scale."""
        classes = len(self.clusters.mean)
        # a step of 1 to C-1 around the circle of labels reaches each other label equally often
        step = torch.randint(1, classes, labels.shape, device=labels.device)
        missed = torch.rand(labels.shape, device=labels.device) < self.smoothing
        return self.clusters.sample((labels + missed * step) % classes, temperature)


class SmoothedGlow(ConditionalGlow):
    """ConditionalGlow with label smoothing by a latent cluster; further arguments as there (Appendix C.2)."""

    def __init__(self, shape: tuple[int, int, int], classes: int, *, smoothing: float, **settings) -> None:
        super().__init__(shape, classes, **settings)
        self.prior = SmoothedClusters(self.prior, smoothing)
        self.config["smoothing"] = smoothing


class Critic(nn.Module):
    """D(v, y): (batch, channels, height, width), (batch,) -> (batch,), high for real images of the class y.

    Three convolutions of `width` channels, the mean over pixels, one linear output per class. Spectral norms
    bound every layer's slope by one, the usual remedy for an unstable GAN.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        convolutions = [spectral_norm(nn.Conv2d(c, width, 3, padding=1)) for c in (channels, width, width)]
        self.features = nn.Sequential(*(layer for c in convolutions for layer in (c, nn.LeakyReLU(0.2))))
        self.per_class = spectral_norm(nn.Linear(width, classes))

    def forward(self, v: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scores of images v of the unit cube under the given labels."""
        return self.per_class(self.features(v - 0.5).mean((2, 3))).gather(1, labels[:, None])[:, 0]


class FlowGAN(ConditionalGlow):
    """ConditionalGlow with the critic of its loss `flow_gan` (Appendix C.3, after Grover et al., 2018).

    The critic is a part of the model only so that the one training loop trains both; scores do not touch it.
    `critic_width` channels; further arguments as in ConditionalGlow.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, *, critic_width: int = 32,
                 **settings) -> None:
        super().__init__(shape, classes, **settings)
        self.critic = Critic(shape[0], classes, critic_width)
        self.config["critic_width"] = critic_width


def flow_gan(model: FlowGAN, x: torch.Tensor, y: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """-log p(x|y)/D - log p(y|x) + weight * (hinge GAN): flow and critic descend one scalar (Appendix C.3).

    The simultaneous form: one step of Adam moves both, with the same learning rate and one gradient norm to
    clip; there is no inner loop of critic steps. Each adversarial term reaches the parameters of one player
    only. Real images are dequantised; false ones are drawn from p(z|y) with the labels of the batch, decoded
    without rounding, clamped to the unit cube, the padding left out. The paper leaves form and weight open.
    """
    noise = model.draw_noise(x)
    real = ((model.grey_levels - 1) * x + noise[:, 0]) / model.grey_levels
    false = (model.flow.inverse(model.prior.sample(y))[:, :model.shape[0]] + 0.5).clamp(0, 1)
    # the critic's: E max(0, 1 - D(real)) + E max(0, 1 + D(false)), no gradient to the flow
    critic = F.relu(1 - model.critic(real, y)).mean() + F.relu(1 + model.critic(false.detach(), y)).mean()
    # the flow's: -E D(false), no gradient to the critic
    frozen = {name: parameter.detach() for name, parameter in model.critic.named_parameters()}
    flow = -torch.func.functional_call(model.critic, frozen, (false, y)).mean()
    return losses.reweight(model, x, y) + weight * (critic + flow)

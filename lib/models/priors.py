"""Class-conditional priors p(z|y) on the flat latent z; log-densities in nats, all classes at once."""

import math

import torch
from torch import nn

LOG_2PI = math.log(2 * math.pi)


class ClassGaussian(nn.Module):
    """p(z|y) = N(mu_y, diag sigma_y^2) over the whole latent, mean and scale learned (Base and Reweight).

    `classes` components over `size` latent coordinates; all start as the standard normal.
    """

    def __init__(self, classes: int, size: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(classes, size))
        self.log_scale = nn.Parameter(torch.zeros(classes, size))

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log p(z|y) for every class: (batch, size) -> (batch, classes), by two matrix products."""
        # -1/2 sum_d (z - mu)^2/sigma^2 = -1/2 [z^2 . s - 2 z . (mu s) + mu^2 . s],  s = 1/sigma^2
        precision = (-2 * self.log_scale).exp()
        square = z.square() @ precision.T - 2 * z @ (self.mean * precision).T
        constant = (self.mean.square() * precision + 2 * self.log_scale + LOG_2PI).sum(1)
        return -0.5 * (square + constant)

    def sample(self, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """One latent per label, (batch,) -> (batch, size); `temperature` multiplies sigma."""
        noise = torch.randn_like(self.mean[labels])
        return self.mean[labels] + temperature * self.log_scale[labels].exp() * noise


class SplitGaussian(nn.Module):
    """p(z|y) = N(z_s; e_y, c I) N(z_n; mu(z_s, y), diag sigma^2(z_s, y)) (Appendix A.4, corrected).

    z_s is the first `classes` coordinates of z (the top level comes first), e_y the one-hot label, c > 0
    learned; a network with one hidden layer of `width` units predicts mean and scale of the rest z_n from z_s
    and y. The paper leaves open the size of z_s, c and the network. As printed, mu and sigma depend on z_n
    itself, which is no density.
    """

    def __init__(self, classes: int, size: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.from_latent = nn.Linear(classes, width)
        self.from_label = nn.Parameter(torch.randn(classes, width) / math.sqrt(classes))
        self.to_rest = nn.Linear(width, 2 * (size - classes))
        nn.init.zeros_(self.to_rest.weight)
        nn.init.zeros_(self.to_rest.bias)

    def rest(self, z_s: torch.Tensor, label_part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log scale of z_n; `label_part` selects the classes, its shape broadcasts with z_s's."""
        hidden = torch.relu(self.from_latent(z_s) + label_part)
        return self.to_rest(hidden).chunk(2, dim=-1)

    def log_prob(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """log p(z|y): (batch, size) -> (batch, classes), or (batch,) at the given labels."""
        every = labels is None
        label_part = self.from_label if every else self.from_label[labels]
        one_hot = torch.eye(self.classes, dtype=z.dtype, device=z.device)
        one_hot = one_hot if every else one_hot[labels]
        z_s, z_n = (z[:, None] if every else z).tensor_split([self.classes], dim=-1)
        # log N(z_s; e_y, c I) = -|z_s - e_y|^2/(2c) - C/2 log(2 pi c)
        log_s = -0.5 * ((z_s - one_hot).square().sum(-1) * (-self.log_variance).exp()
                        + self.classes * (self.log_variance + LOG_2PI))
        # log N(z_n; mu, sigma^2) = sum_d [-1/2 ((z_n - mu)/sigma)^2 - log sigma - 1/2 log 2 pi]
        mean, log_scale = self.rest(z_s, label_part)
        log_n = (-0.5 * ((z_n - mean) * (-log_scale).exp()).square() - log_scale - 0.5 * LOG_2PI).sum(-1)
        return log_s + log_n

    def label_logits(self, z: torch.Tensor) -> torch.Tensor:
        """Logits of p(y|z_s), (batch, classes): by Bayes' rule among N(e_y, c I) they are z_s / c."""
        return z[:, :self.classes] * (-self.log_variance).exp()

    def sample(self, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """One latent per label, (batch,) -> (batch, size); `temperature` multiplies sigma."""
        one_hot = torch.eye(self.classes, dtype=self.log_variance.dtype, device=labels.device)[labels]
        z_s = one_hot + temperature * (0.5 * self.log_variance).exp() * torch.randn_like(one_hot)
        mean, log_scale = self.rest(z_s, self.from_label[labels])
        return torch.cat([z_s, mean + temperature * log_scale.exp() * torch.randn_like(mean)], dim=1)

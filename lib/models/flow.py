"""The invertible network of Glow: actnorm, invertible 1x1 convolution, affine coupling, squeeze, split.

Every map follows one convention: `forward(x) -> z, log_det`, with log_det = log|det dz/dx| in nats per image,
shape (batch,) or a scalar where it does not depend on x, and `inverse(z) -> x`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Coupling(nn.Module):
    """Affine coupling (fetaya2020, Appendix A.1): channels 1..C/2 scale and shift the rest.

    `channels` >= 2 of the input, `width` of the hidden layers. The last convolution starts at zero, so the
    map starts as the constant scale sigmoid(2) = 0.88 on the rest.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.kept = channels // 2
        self.net = nn.Sequential(
            nn.Conv2d(self.kept, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1), nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * (channels - self.kept), 3, padding=1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, channels, height, width) -> the same shape and log_det of shape (batch,)."""
        x1, x2 = x.tensor_split([self.kept], dim=1)
        h, shift = self.net(x1).chunk(2, dim=1)
        h = h + 2  # near-identity at the start; a sigmoid cannot overflow as exp would
        # z2 = s(x1) * x2 + t(x1), s = sigmoid(h);  log|det| = sum log s
        z2 = torch.addcmul(shift, h.sigmoid(), x2)
        return torch.cat([x1, z2], dim=1), F.logsigmoid(h).flatten(1).sum(1)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Undo `forward`: x2 = (z2 - t(z1)) / s(z1)."""
        z1, z2 = z.tensor_split([self.kept], dim=1)
        h, shift = self.net(z1).chunk(2, dim=1)
        return torch.cat([z1, (z2 - shift) / (h + 2).sigmoid()], dim=1)


class Steps(nn.Module):
    """`depth` steps of flow at one resolution: actnorm, invertible 1x1 convolution, affine coupling.

    The parameters of all steps are stacked, so that a level needs one batched determinant.
    """

    def __init__(self, channels: int, depth: int, width: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(depth, channels))
        self.shift = nn.Parameter(torch.zeros(depth, channels))
        rotations = [nn.init.orthogonal_(torch.empty(channels, channels)) for _ in range(depth)]
        self.mixing = nn.Parameter(torch.stack(rotations))
        self.couplings = nn.ModuleList(Coupling(channels, width) for _ in range(depth))

    def _linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Actnorm folded into the convolution: W (s * x + b) = (W diag s) x + W b, one per step."""
        weight = self.mixing * self.log_scale.exp()[:, None, :]
        bias = (self.mixing @ self.shift[..., None])[..., 0]
        return weight, bias

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, channels, height, width) -> the same shape and log_det of shape (batch,)."""
        weight, bias = self._linear()
        # log|det| of actnorm and 1x1 convolution, alike at every pixel: H W (sum log s + log|det W|)
        pixels = x.shape[-2] * x.shape[-1]
        log_det = pixels * (self.log_scale.sum() + torch.linalg.slogdet(self.mixing).logabsdet.sum())
        for w, b, coupling in zip(weight, bias, self.couplings):
            x, coupling_log_det = coupling(F.conv2d(x, w[:, :, None, None], b))
            log_det = log_det + coupling_log_det
        return x, log_det

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Undo `forward`."""
        weight, bias = self._linear()
        for w, b, coupling in reversed(list(zip(torch.linalg.inv(weight), bias, self.couplings))):
            z = F.conv2d(coupling.inverse(z) - b[:, None, None], w[:, :, None, None])
        return z

    @torch.no_grad()
    def initialise(self, x: torch.Tensor) -> torch.Tensor:
        """Give every actnorm output mean 0 and variance 1 per channel on x; return the level's output."""
        for k, coupling in enumerate(self.couplings):
            std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
            std = std.clamp(min=1e-6)  # a channel that is constant on x keeps a finite scale
            self.log_scale[k], self.shift[k] = -std.log(), -mean / std
            weight, bias = self._linear()
            x, _ = coupling(F.conv2d(x, weight[k][:, :, None, None], bias[k]))
        return x


class MultiScaleFlow(nn.Module):
    """Bijection of images (batch, channels, height, width) to latents (batch, channels*height*width).

    The squeeze stands at the END of a level (fetaya2020, Appendix A), so the first level works on the
    unsqueezed channels. A level is: `depth` steps, then squeeze (C, H, W) -> (4C, H/2, W/2), then split: the
    second half of the channels leaves as latents, the first half goes on. `pixel_unshuffle` keeps the four
    pixels of a channel adjacent, so the split sends off whole channels of the level (of the 2 channels of a
    padded grey image, one). The last level has neither: with a prior per latent coordinate, a squeeze after
    it would only rename coordinates. Latents are ordered top level first.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, depth: int, width: int) -> None:
        super().__init__()
        channels, height, width_px = shape
        stride = 2 ** (levels - 1)
        if height % stride or width_px % stride:
            raise ValueError(f"levels must leave whole pixels: height and width must be multiples of "
                             f"2**(levels-1) = {stride}, got levels={levels} and {height}x{width_px}")
        if channels % 2:
            raise ValueError(f"channels must be even (they are split in halves), got {channels}")
        # shape of what leaves each level: squeeze times 4, split in two
        self.shapes = [(channels * 2**i, height // 2**i, width_px // 2**i) for i in range(levels)]
        self.levels = nn.ModuleList(Steps(c, depth, width) for c, _, _ in self.shapes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> latents (batch, size), log_det (batch,) in nats."""
        x = x.contiguous(memory_format=torch.channels_last)
        log_det, latents = 0.0, []
        for level in self.levels[:-1]:
            x, level_log_det = level(x)
            log_det = log_det + level_log_det
            x, z = F.pixel_unshuffle(x, 2).chunk(2, dim=1)
            latents.append(z.flatten(1))
        x, level_log_det = self.levels[-1](x)
        return torch.cat([x.flatten(1), *reversed(latents)], dim=1), log_det + level_log_det

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (batch, size) -> inputs (batch, channels, height, width)."""
        # as many latents leave a level as go on to the next
        sizes = [math.prod(s) for s in self.shapes]
        x, *rest = z.split([sizes[-1], *reversed(sizes[1:])], dim=1)
        x = x.unflatten(1, self.shapes[-1]).contiguous(memory_format=torch.channels_last)
        x = self.levels[-1].inverse(x)
        for level, shape, part in zip(reversed(self.levels[:-1]), reversed(self.shapes[1:]), rest):
            x = torch.cat([x, part.unflatten(1, shape)], dim=1)
            x = level.inverse(F.pixel_shuffle(x, 2))
        return x

    @torch.no_grad()
    def initialise(self, x: torch.Tensor) -> None:
        """Data-dependent initialisation of every actnorm, level by level, on inputs x."""
        for level in self.levels[:-1]:
            x, _ = F.pixel_unshuffle(level.initialise(x), 2).chunk(2, dim=1)
        self.levels[-1].initialise(x)

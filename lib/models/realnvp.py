"""The invertible network of RealNVP: couplings under checkerboard and channel masks, squeeze, split.

Dinh, Sohl-Dickstein and Bengio (2017), Section 3; the convention of every map is that of `lib.models.flow`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from lib.models.flow import level_shapes


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))) at `width` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True),
                                 nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, width, height, width_px) -> the same shape."""
        return x + self.net(x)


class MaskedCoupling(nn.Module):
    """Normalise each channel, then scale and shift what the mask hides by what it shows (Eqs. 7 to 9).

    mask      "checkerboard": pixels with i + j even are shown; "channels": the first half of the channels is
    swapped   show the other half instead
    width     channels of the network of `blocks` residual blocks

    log s = a tanh(h) with a >= 0 learned per channel: bounded for given weights, unlike Glow's. Where the
    paper has batch normalisation there is an affine map per channel, set on the first images, so that the
    density of an image does not depend on the rest of its batch.
    """

    def __init__(self, channels: int, width: int, blocks: int, mask: str, swapped: bool) -> None:
        super().__init__()
        self.mask, self.swapped = mask, swapped
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.reach = nn.Parameter(torch.ones(channels, 1, 1))
        self.net = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *(Residual(width) for _ in range(blocks)),
                                 nn.ReLU(inplace=True), nn.Conv2d(width, 2 * channels, 3, padding=1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def _shown(self, x: torch.Tensor) -> torch.Tensor:
        """The mask b, 1 where a value is shown; broadcasts with x."""
        channels, height, width = x.shape[1:]
        if self.mask == "channels":
            b = (torch.arange(channels, device=x.device) < channels // 2)[:, None, None]
        else:
            rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
            b = ((rows[:, None] + columns) % 2 == 0)[None]
        return (b != self.swapped).to(x.dtype)

    def _log_scale_and_shift(self, shown: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log s and t, zero where the value is shown."""
        h, t = self.net(shown).chunk(2, dim=1)
        return (1 - b) * self.reach.abs() * h.tanh(), (1 - b) * t

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, channels, height, width) -> the same shape and log_det of shape (batch,)."""
        b = self._shown(x)
        x = self.log_scale.exp() * x + self.shift
        log_s, t = self._log_scale_and_shift(b * x, b)
        # z = b x + (1-b) (x exp(s) + t);  log|det| = sum s + H W sum of the channels' log scales
        pixels = x.shape[2] * x.shape[3]
        return x * log_s.exp() + t, log_s.flatten(1).sum(1) + pixels * self.log_scale.sum()

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Undo `forward`."""
        b = self._shown(z)
        log_s, t = self._log_scale_and_shift(b * z, b)
        return ((z - t) * (-log_s).exp() - self.shift) * (-self.log_scale).exp()

    @torch.no_grad()
    def initialise(self, x: torch.Tensor) -> torch.Tensor:
        """Give every channel mean 0 and variance 1 on x before the coupling; return the output."""
        std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
        std = std.clamp(min=1e-6)[:, None, None]
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean[:, None, None] / std)
        return self(x)[0]


class RealNVPFlow(nn.Module):
    """Bijection of images (batch, channels, height, width) to latents (batch, channels*height*width).

    A level is `depth` couplings under alternating checkerboards, squeeze, `depth` under alternating halves of
    the channels, and a split that sends off half of them; the last level is depth + 1 checkerboard couplings
    (Section 3.6; paper: depth 3). Latents are ordered top level first.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, depth: int, width: int, blocks: int = 1) -> None:
        super().__init__()
        self.shapes = level_shapes(shape, levels)

        def couplings(c, mask, count):
            return nn.ModuleList(MaskedCoupling(c, width, blocks, mask, swapped=k % 2 == 1) for k in range(count))

        last = levels - 1
        self.spatial = nn.ModuleList(couplings(c, "checkerboard", depth + (i == last))
                                     for i, (c, _, _) in enumerate(self.shapes))
        self.channel = nn.ModuleList(couplings(4 * c, "channels", depth) for c, _, _ in self.shapes[:-1])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """-> latents (batch, size), log_det (batch,) in nats."""
        log_det, latents = 0.0, []
        for i, level in enumerate(self.spatial):
            for coupling in level:
                x, one = coupling(x)
                log_det = log_det + one
            if i < len(self.channel):
                x = F.pixel_unshuffle(x, 2)
                for coupling in self.channel[i]:
                    x, one = coupling(x)
                    log_det = log_det + one
                x, z = x.chunk(2, dim=1)
                latents.append(z.flatten(1))
        return torch.cat([x.flatten(1), *reversed(latents)], dim=1), log_det

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (batch, size) -> inputs (batch, channels, height, width)."""
        # as many latents leave a level as go on to the next
        sizes = [math.prod(s) for s in self.shapes]
        x, *rest = z.split([sizes[-1], *reversed(sizes[1:])], dim=1)
        x = x.unflatten(1, self.shapes[-1])
        for coupling in reversed(self.spatial[-1]):
            x = coupling.inverse(x)
        for i, part in zip(reversed(range(len(self.channel))), rest):
            x = torch.cat([x, part.unflatten(1, self.shapes[i + 1])], dim=1)
            for coupling in reversed(self.channel[i]):
                x = coupling.inverse(x)
            x = F.pixel_shuffle(x, 2)
            for coupling in reversed(self.spatial[i]):
                x = coupling.inverse(x)
        return x

    @torch.no_grad()
    def initialise(self, x: torch.Tensor) -> None:
        """Data-dependent initialisation of every channel normalisation, in order, on inputs x."""
        for i, level in enumerate(self.spatial):
            for coupling in level:
                x = coupling.initialise(x)
            if i < len(self.channel):
                x = F.pixel_unshuffle(x, 2)
                for coupling in self.channel[i]:
                    x = coupling.initialise(x)
                x, _ = x.chunk(2, dim=1)

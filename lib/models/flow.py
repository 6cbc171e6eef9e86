"""The invertible network of Glow: actnorm, invertible 1x1 convolution, affine coupling, squeeze, split.

Every map follows one convention: `forward(x) -> z, log_det`, with log_det = log|det dz/dx| in nats per image,
shape (batch,) or a scalar where it does not depend on x, and `inverse(z) -> x`.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


# log s of a coupling from its network's output h; both start near the identity, as h starts at 0
LOG_SCALES = {"sigmoid": lambda h: F.logsigmoid(h + 2),     # Glow's: s in (0, 1), no lower bound on log s
              "tanh": torch.tanh}                           # bounded: s in (1/e, e)


class Coupling(nn.Module):
    """Affine coupling (fetaya2020, Appendix A.1): channels 1..C/2 scale and shift the rest.

    `channels` >= 2 of the input, `width` of the hidden layers, `scale` one of LOG_SCALES. The last
    convolution starts at zero, so the map starts as a constant scale: sigmoid(2) = 0.88, or 1 for "tanh".
    """

    def __init__(self, channels: int, width: int, scale: str = "sigmoid") -> None:
        super().__init__()
        self.kept, self.log_scale = channels // 2, LOG_SCALES[scale]
        self.net = nn.Sequential(
            nn.Conv2d(self.kept, width, 3, padding=1), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1), nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * (channels - self.kept), 3, padding=1))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def _log_scale_and_shift(self, x1: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log s(x1) and t(x1), each (batch, channels - kept, height, width)."""
        first, *rest = self.net
        if self.kept == 1:
            # oneDNN is slow on one input channel: its nine neighbours as channels make a matrix product
            height, width = x1.shape[2:]
            padded = F.pad(x1[:, 0], (1, 1, 1, 1))
            taps = [padded[:, i:i + height, j:j + width] for i in range(3) for j in range(3)]
            h = F.conv2d(torch.stack(taps, -1).movedim(-1, 1), first.weight.view(-1, 9, 1, 1), first.bias)
        else:
            h = first(x1)
        for layer in rest:
            h = layer(h)
        h, shift = h.chunk(2, dim=1)
        return self.log_scale(h), shift

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, channels, height, width) -> the same shape and log_det of shape (batch,)."""
        x1, x2 = x.tensor_split([self.kept], dim=1)
        log_s, shift = self._log_scale_and_shift(x1)
        # z2 = s(x1) * x2 + t(x1);  log|det| = sum log s
        z2 = torch.addcmul(shift, log_s.exp(), x2)
        return torch.cat([x1, z2], dim=1), log_s.flatten(1).sum(1)

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Undo `forward`: x2 = (z2 - t(z1)) / s(z1)."""
        z1, z2 = z.tensor_split([self.kept], dim=1)
        log_s, shift = self._log_scale_and_shift(z1)
        return torch.cat([z1, (z2 - shift) * (-log_s).exp()], dim=1)


class Mixing(nn.Module):
    """The matrices W of `depth` invertible 1x1 convolutions, each starting as a random rotation.

    `lu`: W = P L (U + diag s) with a fixed permutation P, unit lower L, strictly upper U and fixed signs of s
    (Kingma and Dhariwal, 2018, Section 3.2); else W itself is the parameter.
    """

    def __init__(self, channels: int, depth: int, lu: bool) -> None:
        super().__init__()
        self.lu = lu
        rotations = torch.stack([nn.init.orthogonal_(torch.empty(channels, channels)) for _ in range(depth)])
        if not lu:
            self.weight = nn.Parameter(rotations)
            return
        permutation, lower, upper = torch.linalg.lu(rotations)
        s = upper.diagonal(dim1=1, dim2=2)
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", s.sign())
        self.log_s = nn.Parameter(s.abs().log())
        # L below the diagonal, U above it: the two share one matrix
        self.triangles = nn.Parameter(lower.tril(-1) + upper.triu(1))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W, (depth, channels, channels), and sum over the steps of log|det W|, a scalar."""
        if not self.lu:
            return self.weight, torch.linalg.slogdet(self.weight).logabsdet.sum()
        lower = self.triangles.tril(-1) + torch.eye(self.log_s.shape[1], device=self.log_s.device)
        upper = self.triangles.triu(1) + torch.diag_embed(self.sign * self.log_s.exp())
        # log|det W| = sum log|s|
        return self.permutation @ lower @ upper, self.log_s.sum()


class Steps(nn.Module):
    """`depth` steps of flow at one resolution: actnorm, invertible 1x1 convolution, affine coupling.

    The parameters of all steps are stacked, so that a level needs one batched determinant. `lu` as in Mixing,
    `scale` as in Coupling.
    """

    def __init__(self, channels: int, depth: int, width: int, lu: bool = False, scale: str = "sigmoid") -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(depth, channels))
        self.shift = nn.Parameter(torch.zeros(depth, channels))
        self.mixing = Mixing(channels, depth, lu)
        self.couplings = nn.ModuleList(Coupling(channels, width, scale) for _ in range(depth))

    def _linear(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Actnorm folded into the convolution, W (s * x + b) = (W diag s) x + W b, one per step; log|det|."""
        mixing, log_det = self.mixing()
        weight = mixing * self.log_scale.exp()[:, None, :]
        bias = (mixing @ self.shift[..., None])[..., 0]
        # log|det| of all steps at one pixel: sum log s + sum log|det W|
        return weight, bias, self.log_scale.sum() + log_det

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, channels, height, width) -> the same shape and log_det of shape (batch,)."""
        weight, bias, log_det_pixel = self._linear()
        # actnorm and 1x1 convolution are alike at every pixel:  log|det| = H W log|det of one pixel|
        log_det = x.shape[-2] * x.shape[-1] * log_det_pixel
        for w, b, coupling in zip(weight, bias, self.couplings):
            x, coupling_log_det = coupling(F.conv2d(x, w[:, :, None, None], b))
            log_det = log_det + coupling_log_det
        return x, log_det

    def inverse(self, z: torch.Tensor) -> torch.Tensor:
        """Undo `forward`."""
        weight, bias, _ = self._linear()
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
            weight, bias, _ = self._linear()
            x, _ = coupling(F.conv2d(x, weight[k][:, :, None, None], bias[k]))
        return x


def level_shapes(shape: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
    """(channels, height, width) at each of `levels` levels: squeeze times 4, split in two. ValueError for odd sizes."""
    channels, height, width = shape
    stride = 2 ** (levels - 1)
    if height % stride or width % stride:
        raise ValueError(f"levels must leave whole pixels: height and width must be multiples of "
                         f"2**(levels-1) = {stride}, got levels={levels} and {height}x{width}")
    return [(channels * 2**i, height // 2**i, width // 2**i) for i in range(levels)]


class MultiScaleFlow(nn.Module):
    """Bijection of images (batch, channels, height, width) to latents (batch, channels*height*width).

    The squeeze stands at the END of a level (fetaya2020, Appendix A), so the first level works on the
    unsqueezed channels. A level is: `depth` steps, then squeeze (C, H, W) -> (4C, H/2, W/2), then split: the
    second half of the channels leaves as latents, the first half goes on. `pixel_unshuffle` keeps the four
    pixels of a channel adjacent, so the split sends off whole channels of the level (of the 2 channels of a
    padded grey image, one). The last level has neither: with a prior per latent coordinate, a squeeze after
    it would only rename coordinates. Latents are ordered top level first. `lu` and `scale` as in Steps.
    """

    def __init__(self, shape: tuple[int, int, int], levels: int, depth: int, width: int, lu: bool = False,
                 scale: str = "sigmoid") -> None:
        super().__init__()
        if shape[0] % 2:
            raise ValueError(f"channels must be even (they are split in halves), got {shape[0]}")
        self.shapes = level_shapes(shape, levels)
        self.levels = nn.ModuleList(Steps(c, depth, width, lu, scale) for c, _, _ in self.shapes)

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

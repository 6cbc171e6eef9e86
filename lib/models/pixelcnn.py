"""Conditional PixelCNN++ (fetaya2020, Appendix E): a mixture component per class, exact discrete likelihoods."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

from lib.models.protocol import GenerativeClassifier

# Smallest log of a logistic's scale, where pixels lie in [-1, 1]; as in Salimans et al. (2017).
MIN_LOG_SCALE = -7.0


def log_mass(y: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor, levels: int) -> torch.Tensor:
    """Log-probability, nats, of pixels y in [-1, 1] under a discretised logistic; all shapes broadcast.

    The `levels` grey levels stand at -1, -1 + w, ..., 1 with w = 2/(levels-1). A level's mass is that of the
    logistic of location `mean` and scale exp(log_scale) on the bin of width w around it; the first and the
    last bin reach to infinity, so the masses sum to one. Between two levels it is the mass of the bin of
    width w around y; within w of an end the tail beyond that end is taken in by log-linear interpolation. The
    function is therefore continuous, and differentiable but for kinks at levels next to the ends. It does not
    underflow, however far y from `mean`.
    """
    half = 1 / (levels - 1)
    precision = (-log_scale).exp()
    upper, lower = (y + half - mean) * precision, (y - half - mean) * precision
    # log[s(b) - s(a)] = log s(b) + log s(-a) + log(1 - e^(a-b)),  s the logistic function, b - a = w/scale
    log_upper, log_lower = F.logsigmoid(upper), F.logsigmoid(-lower)
    log_between = torch.log(-torch.expm1(-2 * half * precision))
    # distance from either end in levels, at most one: at y = -1 log s(b) alone is left, at y = 1 log s(-a)
    from_black = ((y + 1) / (2 * half)).clamp(0, 1)
    from_white = ((1 - y) / (2 * half)).clamp(0, 1)
    between = torch.minimum(from_black, from_white) * log_between
    return from_white * log_upper + from_black * log_lower + between


class CausalConv(nn.Conv2d):
    """Convolution whose padding decides what a pixel sees; `margins`: zeros added (left, right, top, bottom).

    A negative margin cuts off. With kernel (a, b), output pixel (i, j) sees the input's rows i - top ... i -
    top + a - 1 and columns j - left ... j - left + b - 1.
    """

    def __init__(self, channels: int, out: int, kernel: tuple[int, int],
                 margins: tuple[int, int, int, int]) -> None:
        super().__init__(channels, out, kernel)
        self.margins = margins

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, out, ...), the margins decide the size."""
        return super().forward(F.pad(x, self.margins))


def down(channels: int, out: int) -> CausalConv:
    """2x3 convolution that sees this row and the one above, and a column to either side."""
    return CausalConv(channels, out, (2, 3), (1, 1, 1, 0))


def right(channels: int, out: int) -> CausalConv:
    """2x2 convolution that sees this pixel, the one to its left, and the two above them."""
    return CausalConv(channels, out, (2, 2), (1, 0, 1, 0))


def concat_elu(x: torch.Tensor) -> torch.Tensor:
    """ELU of x and of -x, which doubles the channels."""
    return F.elu(torch.cat([x, -x], 1))


class GatedResnet(nn.Module):
    """x + a * sigmoid(b), where (a, b) come out of two convolutions of kind `conv`, `down` or `right`.

    `aside` is whether a second stack of the same width enters between the two, through a 1x1 convolution.
    """

    def __init__(self, conv, width: int, aside: bool = False) -> None:
        super().__init__()
        self.first = conv(2 * width, width)
        self.aside = nn.Conv2d(2 * width, width, 1) if aside else None
        self.second = conv(2 * width, 2 * width)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        """Same shape as x; `other` is the second stack."""
        hidden = self.first(concat_elu(x))
        if self.aside is not None:
            hidden = hidden + self.aside(concat_elu(other))
        a, b = self.second(concat_elu(hidden)).chunk(2, 1)
        return x + a * b.sigmoid()


class ConditionalPixelCNN(GenerativeClassifier):
    """PixelCNN++ whose component k of the mixture of logistics is p(x|y=k) (fetaya2020, Appendix E).

    shape        (channels, height, width) of an image
    classes      C >= 2; p(y) = 1/C
    grey_levels  L >= 2, values a pixel takes (256 for 8-bit images, 17 for scikit-learn's digits)
    depth        gated resnets in each of the two stacks;  width: channels of the hidden convolutions

    Pixel i, in rows from the top left, has p(x_i|x_<i, y) from a discretised logistic for each class and
    channel. Its parameters come from a network that sees the pixels before i: a stack that goes down sees the
    rows above, a second one that goes right sees the row up to i. The mean of a channel depends linearly on
    the channels before it (G on R, B on R and G). In the ordinary PixelCNN++ the components are mixed at
    every pixel; here each class keeps its component through the whole image, log p(x|y) = sum_i log
    p(x_i|x_<i, y), for all classes in one pass.

    The likelihood is that of the grey levels themselves, without noise. Scores are nonetheless log-densities
    on the unit cube, like those of the flows: log P(x|y) + D log L is the density that is constant on each of
    the bins of volume L^-D, so `bits_per_dim` is the exact code length of the discrete image. Between grey
    levels, under attack, the network sees x as it is, and a pixel's probability becomes that of a bin around
    it (`log_mass`); there the score is continuous, but no density.

    Differs from Salimans et al. (2017): one resolution, no dropout, no weight normalisation.
    """

    space, normalised, random = "pixels", True, False

    def __init__(self, shape: tuple[int, int, int], classes: int, *, grey_levels: int = 256, depth: int = 3,
                 width: int = 24) -> None:
        super().__init__()
        self.config = dict(shape=list(shape), classes=classes, grey_levels=grey_levels, depth=depth,
                           width=width)
        for name, least in dict(classes=2, grey_levels=2, depth=1, width=1).items():
            if self.config[name] < least:
                raise ValueError(f"{name} must be >= {least}, got {self.config[name]}")
        self.shape, self.classes, self.grey_levels = tuple(shape), classes, grey_levels
        channels = shape[0]
        # pairs (i, j) of channels, j before i: the mean of i depends on the value of j
        self.register_buffer("pairs", torch.tril_indices(channels, channels, -1), persistent=False)
        seen = channels + 1  # a channel of ones tells the image from the padding
        # the shifts: two rows above; the row above; the column to the left, in this row and the one above
        self.enter_down = CausalConv(seen, width, (2, 3), (1, 1, 2, -1))
        self.enter_above = CausalConv(seen, width, (1, 3), (1, 1, 1, -1))
        self.enter_left = CausalConv(seen, width, (2, 1), (1, -1, 1, 0))
        self.downs = nn.ModuleList(GatedResnet(down, width) for _ in range(depth))
        self.rights = nn.ModuleList(GatedResnet(right, width, aside=True) for _ in range(depth))
        self.leave = nn.Conv2d(width, classes * (2 * channels + self.pairs.shape[1]), 1)
        self._start_alike()
        self.to(memory_format=torch.channels_last)

    @torch.no_grad()
    def _start_alike(self) -> None:
        """All classes start near one logistic with the spread of U[-1, 1]: 1/sqrt(3) = pi scale/sqrt(3).

        From the usual initial weights their log-likelihoods of an image would start hundreds of nats apart.
        """
        self.leave.weight.mul_(0.1)
        self.leave.bias.zero_()
        channels = self.shape[0]
        self.leave.bias.view(self.classes, -1)[:, channels:2 * channels] = -math.log(math.pi)

    def network(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Raw mean, log scale and colour coefficients of every pixel: three (batch, classes, ., rows, width).

        y in [-1, 1]; the first rows of images are enough, since no pixel sees a lower row.
        """
        seen = torch.cat([y, torch.ones_like(y[:, :1])], 1)
        from_above = self.enter_down(seen)
        from_left = self.enter_above(seen) + self.enter_left(seen)
        for go_down, go_right in zip(self.downs, self.rights):
            from_above = go_down(from_above)
            from_left = go_right(from_left, from_above)
        out = self.leave(F.elu(from_left)).unflatten(1, (self.classes, -1))
        mean, log_scale, coefficients = out.tensor_split([self.shape[0], 2 * self.shape[0]], 2)
        return mean, log_scale.clamp(min=MIN_LOG_SCALE), coefficients

    def coloured(self, mean: torch.Tensor, coefficients: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Means given the earlier channels of the same pixel; the channels are dimension -3."""
        # mean_i <- mean_i + sum_{j<i} tanh(c_ij) y_j,  i and j channels of one pixel
        return mean.index_add(-3, self.pairs[0], coefficients.tanh() * y[..., self.pairs[1], :, :])

    def log_likelihood_maps(self, x: torch.Tensor) -> torch.Tensor:
        """log P(x_i|x_<i, y), channels summed, every pixel and class: (batch, classes, height, width), nats."""
        if x.shape[1:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"x must have shape (batch, {wanted}), got {tuple(x.shape)}")
        y = (2 * x - 1)[:, None]
        mean, log_scale, coefficients = self.network(y[:, 0])
        return log_mass(y, self.coloured(mean, coefficients, y), log_scale, self.grey_levels).sum(2)

    def log_likelihoods(self, x: torch.Tensor) -> torch.Tensor:
        """log p(x|y) for every class from one pass, as a density on the unit cube: (batch, classes), nats."""
        return self.log_likelihood_maps(x).sum((2, 3)) + self.dimension * math.log(self.grey_levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Joint scores log p(x|y) + log p(y): (batch, classes), nats."""
        return self.log_likelihoods(x) + self.log_prior

    @torch.no_grad()
    def sample(self, labels: torch.Tensor) -> torch.Tensor:
        """An image on the grey levels for each label, (batch,) -> (batch, *shape); one pass a pixel.

        Draws from torch's global generator.
        """
        channels, height, width = self.shape
        each = torch.arange(len(labels), device=labels.device)
        x = torch.zeros(len(labels), *self.shape, device=labels.device, dtype=self.leave.weight.dtype)
        for row, column in itertools.product(range(height), range(width)):
            # of the labels' components, this pixel's parameters: (batch, ., 1, 1) each
            mean, log_scale, coefficients = (
                out[each, labels, :, row:, column:column + 1]
                for out in self.network(2 * x[:, :, :row + 1] - 1))
            uniform = torch.rand_like(mean).clamp(min=torch.finfo(x.dtype).tiny)
            for channel in range(channels):  # in their order: the mean depends on the values drawn before
                pixel = x[:, :, row:row + 1, column:column + 1]
                # a logistic is mean + scale logit(u);  the level drawn is the one whose bin holds it
                drawn = self.coloured(mean, coefficients, 2 * pixel - 1) + log_scale.exp() * uniform.logit()
                levels = ((drawn + 1) / 2 * (self.grey_levels - 1)).round().clamp(0, self.grey_levels - 1)
                pixel[:, channel] = levels[:, channel] / (self.grey_levels - 1)
        return x


def weighted(model: ConditionalPixelCNN, x: torch.Tensor, y: torch.Tensor, alpha: float) -> torch.Tensor:
    """-log p(x|y)/D - alpha log p(y|x), nats, averaged over the batch (fetaya2020, Appendix E).

    alpha = 1 is Eq. 6. p(x|y) is the density on the unit cube: the first term is smaller by log L than that of
    the grey levels' probabilities.
    """
    scores = model(x)
    # log p(x|y) = score - log p(y);  log p(y|x) = score - logsumexp(scores)
    return F.nll_loss(scores - model.log_prior, y) / model.dimension + alpha * F.cross_entropy(scores, y)

"""A flow without classes, log p(x) alone: Glow and RealNVP as pope2020 attacks them."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from lib.models.flow import LOG_SCALES, Mixing, MultiScaleFlow
from lib.models.priors import LOG_2PI, ClassGaussian
from lib.models.protocol import GenerativeClassifier
from lib.models.realnvp import RealNVPFlow

FAMILIES = ("glow", "realnvp")
# RealNVP's logit transform keeps values this far away from 0 and 1 (Dinh et al., 2017, Section 4.1)
MARGIN = 0.05


class FlowDensity(GenerativeClassifier):
    """log p(x) by an invertible network; one class, so that every attack and detector takes it.

    shape        (channels, height, width) of an image; height and width multiples of 2**levels
    grey_levels  L >= 2, values a pixel takes
    family       "glow": squeeze first, as in its reference implementation; "realnvp"
    levels       resolutions;  depth: steps per level (RealNVP: couplings of each kind);  width: hidden channels
    lu, scale    Glow's 1x1 convolution by its LU factors; its scales sigmoid or bounded, see `lib.models.flow`
    rotations    seed from which Glow's initial 1x1 convolutions are drawn, all other weights left as they are

    Input x in [0, 1]. The network sees v - 1/2 (RealNVP: the logit of v squeezed away from 0 and 1), where
    v = ((L-1) x + u)/L, u ~ U[0,1)^D, is the dequantised image; all log-densities are those of v on the unit
    cube. The prior is a normal with learned mean and scale per latent coordinate.
    """

    space, normalised, random = "pixels", True, True
    classes = 1

    def __init__(self, shape: tuple[int, int, int], *, grey_levels: int = 256, family: str = "glow", levels: int = 2,
                 depth: int = 4, width: int = 32, lu: bool = False, scale: str = "sigmoid",
                 rotations: int | None = None) -> None:
        super().__init__()
        self.config = dict(shape=list(shape), grey_levels=grey_levels, family=family, levels=levels, depth=depth,
                           width=width, lu=lu, scale=scale, rotations=rotations)
        for name, least in dict(grey_levels=2, levels=1, depth=1, width=1).items():
            if self.config[name] < least:
                raise ValueError(f"{name} must be >= {least}, got {self.config[name]}")
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
        if scale not in LOG_SCALES:
            raise ValueError(f"scale must be one of {', '.join(LOG_SCALES)}, got {scale!r}")
        channels, height, width_px = self.shape = tuple(shape)
        self.grey_levels, self.family = grey_levels, family
        if family == "realnvp":
            if lu or scale != "sigmoid" or rotations is not None:
                raise ValueError("lu, scale and rotations are Glow's and must be left alone for realnvp, "
                                 f"got {lu}, {scale!r} and {rotations}")
            self.flow: nn.Module = RealNVPFlow(self.shape, levels, depth, width)
        else:
            if height % 2 or width_px % 2:
                raise ValueError(f"shape must have even height and width, got {height}x{width_px}")
            self.flow = MultiScaleFlow((4 * channels, height // 2, width_px // 2), levels, depth, width, lu, scale)
            if rotations is not None:
                with torch.random.fork_rng():
                    torch.manual_seed(rotations)
                    for level in self.flow.levels:
                        level.mixing = Mixing(level.log_scale.shape[1], depth, lu)
        self.prior = ClassGaussian(1, self.dimension)
        self.register_buffer("initialised", torch.tensor(False))
        self.to(memory_format=torch.channels_last)

    def draw_noise(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One draw of the dequantisation noise for x, U[0, 1), (batch, *shape)."""
        return torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)

    def _inward(self, x: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Images -> input of the network, and log|det| of the way from v there, (batch,) or 0."""
        if x.shape[1:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"x must have shape (batch, {wanted}), got {tuple(x.shape)}")
        noise = self.draw_noise(x) if noise is None else noise
        v = ((self.grey_levels - 1) * x + noise) / self.grey_levels
        if self.family == "glow":
            return F.pixel_unshuffle(v - 0.5, 2), 0.0
        # w = logit(p), p = m/2 + (1 - m) v;  log|dw/dv| = log(1 - m) - log p - log(1 - p)
        p = MARGIN / 2 + (1 - MARGIN) * v
        return p.logit(), (math.log(1 - MARGIN) - p.log() - (-p).log1p()).flatten(1).sum(1)

    @torch.no_grad()
    def initialise(self, x: torch.Tensor) -> None:
        """Data-dependent initialisation on images x; raises RuntimeError on a second call."""
        if self.initialised:
            raise RuntimeError("initialise must be called once, on a fresh model; this one is initialised")
        self.flow.initialise(self._inward(x, None)[0])
        self.initialised.fill_(True)

    def encode(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents z (batch, D) and log_det (batch,), nats: log p(x) = log p(z) + log_det."""
        inner, outer_log_det = self._inward(x, noise)
        z, log_det = self.flow(inner)
        return z, log_det + outer_log_det

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (batch, D) -> images on the grid {0, 1/(L-1), ..., 1}: the bin that holds v."""
        inner = self.flow.inverse(z)
        v = F.pixel_shuffle(inner, 2) + 0.5 if self.family == "glow" else (inner.sigmoid() - MARGIN / 2) / (1 - MARGIN)
        return (v * self.grey_levels).floor().clamp(0, self.grey_levels - 1) / (self.grey_levels - 1)

    def forward(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x) as the joint score of the one class: (batch, 1), nats."""
        z, log_det = self.encode(x, noise)
        return self.prior.log_prob(z) + log_det[:, None]

    def log_prob(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """log p(x), (batch,), nats."""
        return self(x, noise)[:, 0]

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0) -> torch.Tensor:
        """`n` images; `temperature` >= 0 multiplies the standard deviations of the prior."""
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        labels = torch.zeros(n, dtype=torch.long, device=self.initialised.device)
        return self.decode(self.prior.sample(labels, temperature))


def nll(model: FlowDensity, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """-log p(x)/D, nats; labels are not looked at (pope2020, Eq. 6 and Section 4)."""
    return -model.log_prob(x).mean() / model.dimension


@torch.no_grad()
def cost_by_part(model: FlowDensity, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
    """-log p(x) of a Glow split by what pays it: {part: (batch,)}, nats, adding up to the whole.

    For each level, lowest first: the volume its steps change, and the price of the latents that leave it. The parts
    tell where an attacked image becomes dear; volume counts as minus log|det|.
    """
    volumes, hooks = [], []
    for level in model.flow.levels:
        hooks.append(level.register_forward_hook(lambda _, __, out: volumes.append(-out[1])))
    try:
        z, _ = model.encode(x, noise)
    finally:
        for hook in hooks:
            hook.remove()
    # -log N(z; mu, s^2), coordinate by coordinate
    u = (z - model.prior.mean) * (-model.prior.log_scale).exp()
    price = 0.5 * u.square() + model.prior.log_scale + 0.5 * LOG_2PI
    sizes = [math.prod(shape) for shape in model.flow.shapes]
    # the top level's whole output comes first, then what left each lower one
    blocks = price.split([sizes[-1], *reversed(sizes[1:])], dim=1)
    latents = [block.sum(1) for block in reversed(blocks)]
    return {f"{what}, level {i}": part for i, pair in enumerate(zip(volumes, latents), 1)
            for what, part in zip(("volume", "latents"), pair)}

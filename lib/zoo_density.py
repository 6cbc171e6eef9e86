"""The trained flows without classes of pope2020: clean, adversarial and hybrid, a recipe for each data set."""
from functools import partial

from lib.attacks.in_training import raise_nll
from lib.data import Data
from lib.models.density import FlowDensity, nll
from lib.zoo import fit, recipe_of

TRAININGS = ("clean", "adversarial", "hybrid")
ITERATIONS = 10     # of the attack in training (pope2020, Section 5)
# eps in pixels: two of the digits' grey levels, 8/255 as in the paper. Sizes are chosen for two cores; `realnvp` has what
# differs for that family, whose couplings are three to four times as many.
# Twelve short trial runs, one seed each, looked at training time and the NLL of training and validation images.
SMALL = dict(levels=2, depth=4, width=32, steps=300, batch=32, lr=5e-3, clip=5.0, crop=0, flip=False, eps=2 / 16,
             realnvp=dict(depth=2, width=24))
RECIPES = {
    "digits": SMALL,
    "photos": SMALL | dict(steps=400, flip=True, eps=8 / 255),
    # the reference Glow: 3 levels, 32 steps, 512 channels, batch 64, eps 8/255; days of a GPU when trained adversarially
    "cifar10": dict(levels=3, depth=32, width=512, steps=100 * 45000 // 64, batch=64, lr=1e-3, clip=5.0, crop=0, flip=True,
                    eps=8 / 255, realnvp=dict(levels=2, depth=3, width=64)),
    # the architecture of the photos on images of 32x32, for two cores
    "small": SMALL | dict(steps=1000, flip=True, eps=8 / 255),
}


def density(training: str, data: Data, *, family: str = "glow", lu: bool = False, scale: str = "sigmoid",
            rotations: int | None = None, small: bool = False, size: float = 1.0, control: str = "none",
            device: str = "cpu", seed: int = 0) -> FlowDensity:
    """The flow of `family` trained on `data`; cached. `family`, `lu` and `scale` as in FlowDensity.

    training   "clean"; "adversarial": on attacked images alone; "hybrid": on both, 1:1 in every batch
    rotations  seed of Glow's initial 1x1 convolutions in place of `seed`, all else being the same
    `small` and `size` as in `lib.zoo`, and `control` but for "shuffled": labels are not looked at, so shuffling them changes nothing.
    """
    if control not in ("none", "untrained"):
        raise ValueError(f"control must be one of none, untrained, got {control!r}")
    if training not in TRAININGS:
        raise ValueError(f"training must be one of {', '.join(TRAININGS)}, got {training!r}")
    recipe = recipe_of(RECIPES, data, small)
    recipe = recipe | recipe.get(family, {})
    build = partial(FlowDensity, data.shape, grey_levels=data.levels, family=family, lu=lu, scale=scale, rotations=rotations,
                    **{k: recipe[k] for k in ("levels", "depth", "width")})
    adversary = None if training == "clean" else partial(raise_nll, eps=recipe["eps"], steps=ITERATIONS)
    return fit(build, nll, data, recipe, size=size, control=control, device=device, seed=seed, adversary=adversary,
               hybrid=training == "hybrid")

"""Image data sets, all through one function: `load(name) -> Data`.

Nothing is read or downloaded on import. Splits never depend on the seed, so that models trained with
different seeds meet the same test images. Test images are interleaved over the classes, so that the
first N in stored order are a fair sample for any N.
"""
from pathlib import Path

from lib.backgrounds import BG_DIGITS, BG_MNIST, bg_digits, bg_mnist
from lib.bundled import digits, photos
from lib.dataset import Data
from lib.download import COUNTS, DOWNLOADS, SCENES, SIDE, cache_folder, downloaded, scenes
from lib.folder import folder_of_images


def load(name: str, seed: int = 0) -> Data:
    """Load a data set by name (`catalogue()` lists them) or from a folder (`folder:PATH`).

    seed: of what is drawn at random, which is only the background behind each digit of `bg-*`.
    Downloads go to `cache_folder()`.
    Raises ValueError for an unknown name, a bad seed or a bad folder, FileNotFoundError where a download
    is needed and fails; each in one line.
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    if name == "digits":
        return digits()
    if name == "photos":
        return photos()
    if name in BG_DIGITS:
        return bg_digits(name, seed)
    if name in BG_MNIST:
        return bg_mnist(name, seed)
    if name in DOWNLOADS:
        return downloaded(name)
    if name in SCENES:
        return scenes(name)
    if str(name).startswith("folder:"):
        return folder_of_images(name)
    known = ", ".join(["digits", "photos", *BG_DIGITS, *DOWNLOADS, *BG_MNIST, *SCENES])
    raise ValueError(f"data must be one of {known}, folder:PATH; got {name!r}")


def catalogue() -> list[dict]:
    """One row for each data set, without loading or downloading any: name, images (train, validation, test),
    size (channels, height, width), levels, classes, source, where (it lies, or what would be downloaded)."""
    inside, drawn = "inside the packages", ((1157, 213, 427), (1, 8, 8), 17, 10)
    rows = [
        ("digits", *drawn, "scikit-learn", inside),
        ("photos", (3823, 767, 1519), (3, 16, 16), 256, 8, "scikit-image and scikit-learn", inside),
        *((name, *drawn, f"digits before photos, blur {x} of 28 pixels", inside) for name, x in BG_DIGITS.items()),
    ]
    for name, d in DOWNLOADS.items():
        folder = cache_folder() / d.folder
        here = any(all((folder / file).exists() for file in files) for files in (d.files, d.unpacked))
        if (cache_folder() / name / "train").is_dir():
            here, folder = True, cache_folder() / name
        where = str(folder) if here else f"needs download ({d.megabytes} MB) to {folder}"
        rows.append((name, d.counts, d.shape, 256, d.classes, f"torchvision.datasets.{d.source}", where))
    rows += [(name, DOWNLOADS["mnist"].counts, DOWNLOADS["mnist"].shape, 256, 10, f"mnist before cifar10, blur {x} of 28 pixels",
              "made of the two") for name, x in BG_MNIST.items()]
    for name, (source, folder, megabytes) in SCENES.items():
        where = str(cache_folder() / folder)
        where = where if Path(where).exists() else f"needs {megabytes} MB in {where}"
        rows.append((name, COUNTS, (3, SIDE, SIDE), 256, 1, f"torchvision.datasets.{source}", where))
    keys = ("name", "images", "size", "levels", "classes", "source", "where")
    return [dict(zip(keys, row)) for row in rows]

"""Data sets that torchvision downloads, or that lie where it would put them."""
import os
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lib.dataset import Data, Split, split_of
from lib.folder import folder_of_images


class Download(NamedTuple):
    """What torchvision calls a data set, what it downloads and where it looks."""

    source: str                # class of torchvision.datasets
    folder: str                # below the cache folder
    files: tuple[str, ...]     # as downloaded; torchvision verifies their checksums
    unpacked: tuple[str, ...]
    megabytes: int
    shape: tuple[int, int, int]
    counts: tuple[int, int, int]
    classes: int


_IDX = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
_GZ = tuple(f"{file}.gz" for file in _IDX)
_MAT = ("train_32x32.mat", "test_32x32.mat")
_GREY, _COLOUR = ((1, 32, 32), (54000, 6000, 10000)), ((3, 32, 32), (45000, 5000, 10000))
DOWNLOADS = {
    "mnist": Download("MNIST", "MNIST/raw", _GZ, _IDX, 11, *_GREY, 10),
    "fashionmnist": Download("FashionMNIST", "FashionMNIST/raw", _GZ, _IDX, 31, *_GREY, 10),
    "cifar10": Download("CIFAR10", "", ("cifar-10-python.tar.gz",), ("cifar-10-batches-py",), 170,
                        *_COLOUR, 10),
    "cifar100": Download("CIFAR100", "", ("cifar-100-python.tar.gz",), ("cifar-100-python",), 169,
                         *_COLOUR, 100),
    "svhn": Download("SVHN", "", _MAT, _MAT, 246, (3, 32, 32), (65931, 7326, 26032), 10),
}


def cache_folder() -> Path:
    """Where downloads lie: $REPRO_DATA, by default ~/.cache/generative-classifiers-on-trial."""
    default = Path.home() / ".cache" / "generative-classifiers-on-trial"
    return Path(os.environ.get("REPRO_DATA") or default).expanduser()


def downloaded(name: str) -> Data:
    """A torchvision data set, 256 grey levels; validation is the last tenth of the training images.

    MNIST and Fashion-MNIST are zero-padded from 28 to 32 pixels, as fetaya2020 does. Colour images that lie unpacked
    below the cache folder, as those of a `folder:` under the name of the data set, are taken from there.
    """
    from torchvision import datasets

    spec, root = DOWNLOADS[name], cache_folder()
    if (root / name / "train").is_dir():
        found = replace(folder_of_images(f"folder:{root / name}"), name=name)
        if found.shape != spec.shape or len(found.classes) != spec.classes:
            raise ValueError(f"data {name!r} must be {spec.classes} classes of images {spec.shape}, "
                             f"found {len(found.classes)} of {found.shape}: {root / name}")
        return found
    choices = {"train": True}, {"train": False}
    if name == "svhn":
        choices = {"split": "train"}, {"split": "test"}
    try:
        root.mkdir(parents=True, exist_ok=True)
        train, test = (getattr(datasets, spec.source)(root, download=True, **choice) for choice in choices)
    except (OSError, RuntimeError, HTTPException) as error:
        raise FileNotFoundError(f"data {name!r} could not be downloaded; put the original "
                                f"{', '.join(spec.files)} into {root / spec.folder} "
                                f"({' '.join(str(error).split())})") from error

    def part(source, start: int, stop: int) -> Split:
        codes = np.asarray(source.data)[start:stop]
        if codes.ndim == 3:  # MNIST: (n, 28, 28)
            codes = np.pad(codes, ((0, 0), (2, 2), (2, 2)))[:, None]
        elif codes.shape[-1] == 3:  # CIFAR: channels last
            codes = codes.transpose(0, 3, 1, 2)
        labels = source.labels if name == "svhn" else source.targets
        return split_of(codes, 256, np.asarray(labels)[start:stop])

    n, kept = len(train), len(train) - round(len(train) / 10)
    classes = tuple(getattr(train, "classes", "0123456789"))
    return Data(name, part(train, 0, kept), part(train, kept, n), part(test, 0, len(test)), classes, 256)


# Larger photographs of one kind each, for densities without classes (pope2020): side in pixels, images of each
# part. The paper prints neither its size nor its split but for the 1,200 test images of LSUN.
SIDE, COUNTS = 64, (20_000, 1_200, 1_200)
SCENES = {"celeba": ("CelebA", "celeba", 1400), "lsun": ("LSUN", "lsun/bedroom_train_lmdb", 43_000)}


def scenes(name: str) -> Data:
    """CelebA or LSUN Bedroom through torchvision: the first images in stored order, the middle square at 64x64.

    torchvision fetches CelebA from a file host with a quota and LSUN not at all; LSUN needs `lmdb` as well.
    """
    from torchvision import datasets

    source, folder, megabytes = SCENES[name]
    root = cache_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        if name == "celeba":
            images = datasets.CelebA(root, split="all", target_type=[], download=True)
        elif not (root / folder).exists():
            raise FileNotFoundError("torchvision does not fetch it")
        else:
            images = datasets.LSUN(root / "lsun", classes=["bedroom_train"])
    except (OSError, RuntimeError, HTTPException, ImportError) as error:
        raise FileNotFoundError(f"data {name!r} could not be had ({megabytes} MB); unpack torchvision's {source} to "
                                f"{root / folder} ({' '.join(str(error).split())})") from error
    if len(images) < sum(COUNTS):
        raise ValueError(f"data {name!r} needs at least {sum(COUNTS)} images, found {len(images)}: {root / folder}")

    def part(start: int, stop: int) -> Split:
        codes = np.stack([np.asarray(_middle(images[i][0])) for i in range(start, stop)]).transpose(0, 3, 1, 2)
        return split_of(codes, 256, np.zeros(stop - start))

    ends = np.cumsum((0, *COUNTS)).tolist()
    return Data(name, *(part(a, b) for a, b in zip(ends, ends[1:])), (name,), 256)


def _middle(image: Image.Image) -> Image.Image:
    """The middle square of a photograph, at SIDE x SIDE pixels."""
    width, height = image.size
    left, top = (width - min(width, height)) // 2, (height - min(width, height)) // 2
    box = (left, top, left + min(width, height), top + min(width, height))
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX, box)

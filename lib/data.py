"""Image data sets, all through one function: `load(name) -> Data`.

Nothing is read or downloaded on import. Splits never depend on the seed, so that models trained with
different seeds meet the same test images. Test images are interleaved over the classes, so that the
first N in stored order are a fair sample for any N.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

BLOCK, PATCH = 64, 16           # side of a photograph's block and of a patch, in pixels
ROWS, COLUMNS = 6, 8            # blocks taken from the middle of each photograph
FOREIGN = ("chelsea", "retina")
BLUR = {"bg-digits": 0, "bg-digits-0": 0, "bg-digits-1": 1, "bg-digits-5": 5}  # pixels at 28x28


class Split(NamedTuple):
    """One part of a data set, in stored order."""

    images: Tensor  # (n, c, h, w) float32 in [0, 1], on the grid k / (levels - 1)
    labels: Tensor  # (n,) int64, index into `Data.classes`; -1 for images of no class
    blocks: Tensor  # (n,) int64, images of one block are resampled together by a block bootstrap


@dataclass(frozen=True, eq=False)
class Data:
    """A data set; train, validation and test share no image."""

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    levels: int                                              # number of grey levels
    foreign: dict[str, Split] = field(default_factory=dict)  # images of no class, never trained on

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (channels, height, width) of one image."""
        return tuple(self.train.images.shape[1:])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all a result can depend on: images, labels, blocks and order of every split."""
        digest = hashlib.sha256(repr((self.levels, self.classes, tuple(self.foreign))).encode())
        for split in (self.train, self.validation, self.test, *self.foreign.values()):
            digest.update(repr(tuple(split.images.shape)).encode())
            digest.update((split.images * (self.levels - 1)).round().byte().numpy())
            digest.update(split.labels.numpy())
            digest.update(split.blocks.numpy())
        return digest.hexdigest()


def load(name: str, seed: int = 0) -> Data:
    """Load a data set by name (`catalogue()` lists them) or from a folder (`folder:PATH`).

    seed: of what is drawn at random, which is only the background behind each digit of `bg-digits*`.
    Downloads go to `cache_folder()`.
    Raises ValueError for an unknown name, a bad seed or a bad folder, FileNotFoundError where a download
    is needed and fails; each in one line.
    """
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    if name == "digits":
        return _digits()
    if name == "photos":
        return _photos()
    if name in BLUR:
        return _bg_digits(name, seed)
    if name in DOWNLOADS:
        return _downloaded(name)
    if name in SCENES:
        return _scenes(name)
    if str(name).startswith("folder:"):
        return _folder(name)
    known = ", ".join(["digits", "photos", *BLUR, *DOWNLOADS, *SCENES])
    raise ValueError(f"data must be one of {known}, folder:PATH; got {name!r}")


def _split(codes: np.ndarray, levels: int, labels, blocks=None) -> Split:
    """Split from grey levels (n, c, h, w) in 0 … levels-1; by default each image is its own block."""
    images = torch.from_numpy(np.ascontiguousarray(codes)).float() / (levels - 1)
    blocks = np.arange(len(codes)) if blocks is None else blocks
    return Split(images, *(torch.as_tensor(a, dtype=torch.int64) for a in (labels, blocks)))


# --- data that ships inside our dependencies ---------------------------------------------------------

def _digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8), 17 grey levels.

    The images are stored writer by writer: the labels repeat one sequence of about 130 digits. As in MNIST
    the held-out images come from other writers than the training images: the first 1,157 images (nine runs
    of the sequence) are training. Of the rest every third is validation, the others are test, so that a
    threshold calibrated on validation meets the same five runs at test time. Near-duplicates by one writer
    therefore do occur between validation and test, but not between training and test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    codes, labels = bunch.images[:, None].astype(np.uint8), bunch.target
    held_out = np.arange(1157, len(codes))
    parts = (np.arange(1157), held_out[2::3], held_out[np.arange(len(held_out)) % 3 != 2])
    return Data("digits", *(_split(codes[p], 17, labels[p]) for p in parts), tuple("0123456789"), 17)


def _photographs() -> dict[str, np.ndarray]:
    """The ten colour photographs (h, w, 3), uint8, that lie inside scikit-image and scikit-learn.

    All at full size, where 16 pixels show texture, but for `retina`, 1,411 pixels wide: at full size 41 % of
    its 16x16 patches are flat (standard deviation below 2 grey levels), halved 25 %.
    `motorcycle_right` is not used: it shows what `motorcycle_left` shows, so its patches are near-duplicates.
    """
    from skimage import data
    from sklearn.datasets import load_sample_image

    retina = data.retina()[:1410, :1410].reshape(705, 2, 705, 2, 3).mean((1, 3)).round().astype(np.uint8)
    return {
        "astronaut": data.astronaut(), "china": load_sample_image("china.jpg"), "coffee": data.coffee(),
        "flower": load_sample_image("flower.jpg"), "hubble": data.hubble_deep_field(),
        "ihc": data.immunohistochemistry(), "motorcycle": data.stereo_motorcycle()[0],
        "rocket": data.rocket(), "chelsea": data.chelsea(), "retina": retina,
    }


def _patches(photograph: np.ndarray) -> np.ndarray:
    """Patches (blocks, 16, 3, 16, 16) of the blocks in the middle of a photograph (h, w, 3)."""
    height, width, _ = photograph.shape
    rows, columns = min(ROWS, height // BLOCK), min(COLUMNS, width // BLOCK)
    top, left = (height - rows * BLOCK) // 2, (width - columns * BLOCK) // 2
    middle = photograph[top:top + rows * BLOCK, left:left + columns * BLOCK]
    k = BLOCK // PATCH
    grid = middle.reshape(rows, k, PATCH, columns, k, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return grid.reshape(rows * columns, k * k, 3, PATCH, PATCH)


def _photos() -> Data:
    """Colour patches (3, 16, 16) of eight photographs, 256 grey levels; the photograph is the class.

    The middle 384 x 512 pixels of each photograph are cut into 6 x 8 blocks of 64 pixels, each block into 16
    patches; a block belongs to one split whole: in every row of eight, five blocks are training, one is
    validation, two are test. That makes 768 patches a class. A patch that occurs more than once is left out
    (the black corner of `astronaut`, white spots in `ihc`), or train and test would share it.
    The order runs over classes first, then blocks, then places in a block: the first 96 test images are one
    from each of 96 blocks, but for patches left out. `foreign` holds two photographs no model sees:
    `chelsea`, a photograph like the others, and `retina`, a smooth one (likelihoods often favour those).
    """
    photographs = _photographs()
    classes = tuple(name for name in photographs if name not in FOREIGN)
    patches = np.stack([_patches(photographs[name]) for name in classes])  # (8, 48, 16, 3, 16, 16)
    block = np.arange(ROWS * COLUMNS)
    lane = (block % COLUMNS + 3 * (block // COLUMNS)) % COLUMNS            # each lane once in every row
    flat = patches.reshape(-1, 3 * PATCH * PATCH)
    _, inverse, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    single = (counts[inverse.reshape(-1)] == 1).reshape(patches.shape[:3])

    def part(lanes) -> Split:
        axes = np.arange(16), block[np.isin(lane, lanes)], np.arange(len(classes))
        place, chosen, label = np.meshgrid(*axes, indexing="ij")
        keep = single[label, chosen, place]
        place, chosen, label = place[keep], chosen[keep], label[keep]
        return _split(patches[label, chosen, place], 256, label, label * len(block) + chosen)

    def foreign(photograph) -> Split:
        cut = np.concatenate(_patches(photograph).swapaxes(0, 1))
        return _split(cut, 256, np.full(len(cut), -1), np.arange(len(cut)) % (len(cut) // 16))

    return Data("photos", part([1, 3, 5, 6, 7]), part([2]), part([0, 4]), classes, 256,
                {name: foreign(photographs[name]) for name in FOREIGN})


def _bg_digits(name: str, seed: int) -> Data:
    """Digits before a piece of a photograph, (1, 8, 8), 17 grey levels: max(digit, background).

    fetaya2020, Section 4.5 (BG-MNIST-X): greyscaled, downsampled backgrounds behind MNIST, blurred with a
    Gaussian of X = 5, 1 or 0 pixels of 28. Here the backgrounds are patches of `photos` from the same split,
    each used once at most, in an order drawn by `seed`, and the blur is X * 8/28 pixels of 8. It is applied
    before downsampling, where it is X * 16/28 pixels of 16: a kernel of 0.29 pixels would do nothing.
    The blocks are those of the backgrounds.
    """
    from scipy.ndimage import gaussian_filter

    digits, photos = _digits(), _photos()
    generator = np.random.default_rng(seed)
    luma = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    sigma = BLUR[name] * PATCH / 28

    def part(front: Split, back: Split) -> Split:
        chosen = generator.permutation(len(back.images))[:len(front.images)]
        grey = np.einsum("nchw,c->nhw", back.images.numpy()[chosen].astype(float), luma)
        grey = gaussian_filter(grey, (0, sigma, sigma))
        small = grey.reshape(-1, 8, 2, 8, 2).mean((2, 4))[:, None]
        codes = np.round(16 * np.maximum(front.images.numpy(), small))
        return _split(codes, 17, front.labels, back.blocks[chosen])

    parts = (part(getattr(digits, s), getattr(photos, s)) for s in ("train", "validation", "test"))
    return Data(name, *parts, digits.classes, 17)


# --- data to download ---------------------------------------------------------------------------------

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


def _downloaded(name: str) -> Data:
    """A torchvision data set, 256 grey levels; validation is the last tenth of the training images.

    MNIST and Fashion-MNIST are zero-padded from 28 to 32 pixels, as fetaya2020 does. Colour images that lie unpacked
    below the cache folder, as those of a `folder:` under the name of the data set, are taken from there.
    """
    from torchvision import datasets

    spec, root = DOWNLOADS[name], cache_folder()
    if (root / name / "train").is_dir():
        found = replace(_folder(f"folder:{root / name}"), name=name)
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
        return _split(codes, 256, np.asarray(labels)[start:stop])

    n, kept = len(train), len(train) - round(len(train) / 10)
    classes = tuple(getattr(train, "classes", "0123456789"))
    return Data(name, part(train, 0, kept), part(train, kept, n), part(test, 0, len(test)), classes, 256)


# Larger photographs of one kind each, for densities without classes (pope2020): side in pixels, images of each
# part. The paper prints neither its size nor its split but for the 1,200 test images of LSUN.
SIDE, COUNTS = 64, (20_000, 1_200, 1_200)
SCENES = {"celeba": ("CelebA", "celeba", 1400), "lsun": ("LSUN", "lsun/bedroom_train_lmdb", 43_000)}


def _scenes(name: str) -> Data:
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
        return _split(codes, 256, np.zeros(stop - start))

    ends = np.cumsum((0, *COUNTS)).tolist()
    return Data(name, *(part(a, b) for a, b in zip(ends, ends[1:])), (name,), 256)


def _middle(image: Image.Image) -> Image.Image:
    """The middle square of a photograph, at SIDE x SIDE pixels."""
    width, height = image.size
    left, top = (width - min(width, height)) // 2, (height - min(width, height)) // 2
    box = (left, top, left + min(width, height), top + min(width, height))
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX, box)


# --- images in a folder -------------------------------------------------------------------------------

def _folder(name: str) -> Data:
    """Images in PATH/train/<class>/ and PATH/test/<class>/, 256 grey levels.

    All of one size and mode (8-bit grey `L` or colour `RGB`). Files are taken in the order of their names,
    interleaved over the classes; validation is the last tenth (at least one image) of each training class.
    Raises ValueError, naming the folder or file at fault.
    """
    root = Path(name.removeprefix("folder:")).expanduser()
    train, test = _list_images(root / "train"), _list_images(root / "test")
    classes = tuple(train)
    if odd := sorted(set(train) ^ set(test)):
        raise ValueError(f"train and test must have the same classes, {odd[0]!r} is in one only: {root}")
    if len(classes) < 2:
        raise ValueError(f"data needs at least two classes, found only {classes[0]!r}: {root / 'train'}")
    for paths in train.values():
        if len(paths) < 2:
            raise ValueError(f"a training class needs at least 2 images, one to validate: {paths[0].parent}")
    kept = {c: len(paths) - max(1, round(len(paths) / 10)) for c, paths in train.items()}
    parts = {c: p[:kept[c]] for c, p in train.items()}, {c: p[kept[c]:] for c, p in train.items()}, test
    orders = [sorted((i, classes.index(c), path) for c, paths in part.items() for i, path in enumerate(paths))
              for part in parts]
    codes = _read_images([path for order in orders for *_, path in order])
    codes = np.split(codes, np.cumsum([len(order) for order in orders])[:-1])
    splits = (_split(x, 256, [label for _, label, _ in order]) for x, order in zip(codes, orders))
    return Data(name, *splits, classes, 256)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class below a folder, sorted by name."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise ValueError(f"data folder not found: {folder} (train and test each hold a folder per class)")
    found = {}
    for sub in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        found[sub.name] = sorted(p for p in sub.iterdir() if p.suffix.lower() in IMG_EXTENSIONS)
        if not found[sub.name]:
            raise ValueError(f"class folder holds no images: {sub}")
    if not found:
        raise ValueError(f"data folder is empty, expected a folder per class: {folder}")
    return found


def _read_images(paths: list[Path]) -> np.ndarray:
    """Grey levels (n, c, h, w), uint8, of images that must share one size and mode."""
    codes = None
    for i, path in enumerate(tqdm(paths, desc="reading images", disable=None)):
        try:
            with Image.open(path) as image:
                mode, pixels = image.mode, np.asarray(image)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, …
            raise ValueError(f"broken image: {path} ({type(error).__name__})") from error
        if mode not in ("L", "RGB"):
            raise ValueError(f"images must be 8-bit grey (L) or colour (RGB), got mode {mode}: {path}")
        pixels = pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)
        if codes is None:
            codes = np.empty((len(paths), *pixels.shape), np.uint8)
        if pixels.shape != codes.shape[1:]:
            raise ValueError(f"images must share one size and mode: {paths[0]} is {codes.shape[1:]}, "
                             f"{path} is {pixels.shape} (channels, height, width)")
        codes[i] = pixels
    return codes


# --- table --------------------------------------------------------------------------------------------

def catalogue() -> list[dict]:
    """One row for each data set, without loading or downloading any: name, images (train, validation, test),
    size (channels, height, width), levels, classes, source, where (it lies, or what would be downloaded)."""
    inside, drawn = "inside the packages", ((1157, 213, 427), (1, 8, 8), 17, 10)
    rows = [
        ("digits", *drawn, "scikit-learn", inside),
        ("photos", (3823, 767, 1519), (3, 16, 16), 256, 8, "scikit-image and scikit-learn", inside),
        *((name, *drawn, f"digits before photos, blur {x} of 28 pixels", inside) for name, x in BLUR.items()),
    ]
    for name, d in DOWNLOADS.items():
        folder = cache_folder() / d.folder
        here = any(all((folder / file).exists() for file in files) for files in (d.files, d.unpacked))
        if (cache_folder() / name / "train").is_dir():
            here, folder = True, cache_folder() / name
        where = str(folder) if here else f"needs download ({d.megabytes} MB) to {folder}"
        rows.append((name, d.counts, d.shape, 256, d.classes, f"torchvision.datasets.{d.source}", where))
    for name, (source, folder, megabytes) in SCENES.items():
        where = str(cache_folder() / folder)
        where = where if Path(where).exists() else f"needs {megabytes} MB in {where}"
        rows.append((name, COUNTS, (3, SIDE, SIDE), 256, 1, f"torchvision.datasets.{source}", where))
    keys = ("name", "images", "size", "levels", "classes", "source", "where")
    return [dict(zip(keys, row)) for row in rows]

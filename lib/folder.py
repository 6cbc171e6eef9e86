"""A data set of the reader's own: images in folders, one for each class."""
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lib.dataset import Data, split_of


def folder_of_images(name: str) -> Data:
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
    splits = (split_of(x, 256, [label for _, label, _ in order]) for x, order in zip(codes, orders))
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

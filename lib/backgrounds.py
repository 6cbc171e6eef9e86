"""Digits before pieces of photographs (fetaya2020, Section 4.5: BG-MNIST-X), and stand-ins made of bundled data."""
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from lib.bundled import digits, photos
from lib.dataset import Data, Split, split_of
from lib.download import downloaded

# name -> X, the bandwidth of the Gaussian blur, pixels at 28x28
BG_DIGITS = {"bg-digits": 0, "bg-digits-0": 0, "bg-digits-1": 1, "bg-digits-5": 5}
BG_MNIST = {"bg-mnist-0": 0, "bg-mnist-1": 1, "bg-mnist-5": 5}
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def bg_digits(name: str, seed: int) -> Data:
    """The stand-in for `bg_mnist`: digits before patches of photographs, (1, 8, 8), 17 grey levels.

    The blur is X * 8/28 pixels of 8. It is applied before downsampling, where it is X * 16/28 pixels of 16: a kernel of
    0.29 pixels would do nothing.
    """
    def small(grey: np.ndarray) -> np.ndarray:
        return _blurred(grey, BG_DIGITS[name] * 16 / 28).reshape(-1, 8, 2, 8, 2).mean((2, 4))
    return _before(name, digits(), photos(), small, seed)


def bg_mnist(name: str, seed: int) -> Data:
    """BG-MNIST-X: MNIST before greyscaled CIFAR-10, shrunk to 28 pixels, then blurred by X; zero-padded, (1, 32, 32).

    The paper leaves open how it shrinks (here bilinear, antialiased) and what "replaces the black background" does to
    the grey rim of a stroke (here the brighter of the two).
    """
    def framed(grey: np.ndarray) -> np.ndarray:
        small = F.interpolate(torch.from_numpy(grey)[:, None], 28, mode="bilinear", antialias=True)[:, 0]
        return np.pad(_blurred(small.numpy(), BG_MNIST[name]), ((0, 0), (2, 2), (2, 2)))
    return _before(name, downloaded("mnist"), downloaded("cifar10"), framed, seed)


def _blurred(grey: np.ndarray, sigma: float) -> np.ndarray:
    """Images (n, h, w) under a Gaussian of `sigma` pixels."""
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(grey, (0, sigma, sigma))


def _before(name: str, fronts: Data, backs: Data, fit: Callable[[np.ndarray], np.ndarray], seed: int) -> Data:
    """max(front, background), on the grey levels of `fronts`; `fit` takes grey backgrounds to the size of a front.

    Backgrounds come from the same split, in an order drawn by `seed`, each as often as the next one, give or take once.
    The blocks are those of the backgrounds.
    """
    generator, levels = np.random.default_rng(seed), fronts.levels

    def part(front: Split, back: Split) -> Split:
        chosen = np.resize(generator.permutation(len(back.images)), len(front.images))
        grey = [np.einsum("nchw,c->nhw", back.images[some].numpy().astype(float), LUMA) for some in torch.from_numpy(chosen).split(4096)]
        shown = np.maximum(front.images.numpy(), fit(np.concatenate(grey))[:, None])
        return split_of(np.round((levels - 1) * shown), levels, front.labels, back.blocks[chosen])

    parts = (part(getattr(fronts, s), getattr(backs, s)) for s in ("train", "validation", "test"))
    return Data(name, *parts, fronts.classes, levels)

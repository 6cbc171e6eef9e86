"""A data set: images in [0, 1] on their grey levels, labels and blocks, in three parts."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


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


def split_of(codes: np.ndarray, levels: int, labels, blocks=None) -> Split:
    """Split from grey levels (n, c, h, w) in 0 … levels-1; by default each image is its own block."""
    images = torch.from_numpy(np.ascontiguousarray(codes)).float() / (levels - 1)
    blocks = np.arange(len(codes)) if blocks is None else blocks
    return Split(images, *(torch.as_tensor(a, dtype=torch.int64) for a in (labels, blocks)))

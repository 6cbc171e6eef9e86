"""A small convolutional classifier, the independent judge of whether samples show the class asked for."""

import torch
from torch import nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """Images (batch, *shape) in [0, 1] -> logits (batch, classes) of p(y|x), nats up to a constant.

    Two 3x3 convolutions of `width` channels, a 2x2 maximum, a third convolution of twice as many, one linear
    layer on all that is left, with dropout. Not a generative classifier: it has no density. Raises ValueError
    for images of fewer than 2 pixels a side or fewer than 2 classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int = 32) -> None:
        super().__init__()
        channels, height, columns = shape
        if min(height, columns) < 2:
            raise ValueError(f"shape must be at least 2 pixels high and wide, got {tuple(shape)}")
        if classes < 2:
            raise ValueError(f"classes must be >= 2, got {classes}")
        self.config = dict(shape=list(shape), classes=classes, width=width)
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5),
            nn.Linear(2 * width * (height // 2) * (columns // 2), classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (batch, classes)."""
        return self.layers(x)


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean of -log p(y|x) over a batch, nats: x (batch, *shape), labels y (batch,)."""
    return F.cross_entropy(model(x), y)

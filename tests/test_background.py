"""Digits before backgrounds: the independent judge, and the images that the page makes itself."""
from functools import partial

import numpy as np
import pytest
import torch

from lib.data import load
from lib.models.small_cnn import SmallCNN, cross_entropy
from lib.train import train


def bars(n, seed):
    """Noisy 6x6 images with one bright row (class 0) or column (class 1), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = 0.3 * torch.rand(n, 1, 6, 6, generator=generator), torch.arange(n) % 2
    for image, label, place in zip(images, labels, torch.randint(6, (n,), generator=generator)):
        (image[0] if label == 0 else image[0].T)[place] += 0.6
    return images, labels


def fitted(images, labels):
    """A small judge after 60 steps."""
    torch.manual_seed(0)
    judge = SmallCNN((1, 6, 6), 2, width=8)
    return train(judge, cross_entropy, (images, labels), steps=60, batch=32, lr=1e-2)


def accuracy(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(1) == labels).double().mean().item()


def test_judge_learns_a_rule_and_not_the_images():
    images, labels = bars(256, seed=1)
    assert accuracy(fitted(images, labels), *bars(256, seed=2)) > 0.95


def test_judge_learns_nothing_from_labels_that_tell_nothing():
    images, labels = bars(256, seed=1)
    shuffled = labels[torch.randperm(256, generator=torch.Generator().manual_seed(3))]
    assert 0.3 < accuracy(fitted(images, shuffled), *bars(256, seed=2)) < 0.7


@pytest.mark.parametrize("shape, classes", [((1, 8, 8), 10), ((3, 5, 7), 4)])
def test_judge_gives_one_logit_a_class_and_its_judgement_does_not_depend_on_the_batch(shape, classes):
    torch.manual_seed(0)
    model, x = SmallCNN(shape, classes).eval(), torch.rand(6, *shape)
    logits = model(x)
    assert logits.shape == (6, classes)
    torch.testing.assert_close(torch.cat([model(one[None]) for one in x]), logits)


def test_loss_is_the_mean_surprise_of_the_right_label():
    logits, y = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.5, 0.0]], dtype=torch.float64), torch.tensor([1, 2])
    # -log softmax(logits)[y]
    by_hand = np.mean([np.log(np.exp(row).sum()) - row[k] for row, k in zip(logits.numpy(), y.numpy())])
    assert cross_entropy(torch.nn.Identity(), logits, y).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("build, message", [
    (partial(SmallCNN, (1, 1, 8), 10), r"shape must be at least 2 pixels high and wide, got \(1, 1, 8\)"),
    (partial(SmallCNN, (1, 8, 8), 1), "classes must be >= 2, got 1")])
def test_bad_sizes_name_the_parameter(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_pages_own_backgrounds_are_those_of_bg_digits():
    """Every test image of bg-digits-0 is its digit before a piece that the page cuts from `photos`."""
    digits, colours = load("digits").test.images, load("photos").test.images
    grey = torch.einsum("nchw,c->nhw", colours, torch.tensor([0.299, 0.587, 0.114]))
    pieces = torch.nn.functional.avg_pool2d(grey[:, None], 2)
    for image, digit in zip(load("bg-digits-0").test.images[:100], digits):
        made = (16 * torch.maximum(digit, pieces)).round() / 16
        # single precision may round a tie the other way
        wrong = (made - image).abs().gt(1e-6).flatten(1).sum(1)
        assert wrong.min() <= 1


def test_each_digit_keeps_its_place_before_other_backgrounds():
    one, other = (load("bg-digits-0", seed=k).train for k in (0, 1))
    digits = load("digits").train
    assert torch.equal(one.labels, digits.labels) and torch.equal(other.labels, digits.labels)
    assert not torch.equal(one.images, other.images)
    assert (one.images >= digits.images).all() and (other.images >= digits.images).all()

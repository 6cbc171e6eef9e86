"""Generative classifiers. Nothing is re-exported: a page's digest depends only on what it uses."""
import torch

# By PyTorch's default the convolutions of a GPU round to TF32: a thousandth of a bit/dim of a likelihood (tests/test_precision.py).
torch.backends.cudnn.allow_tf32 = False

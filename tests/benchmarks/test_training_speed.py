"""How fast the paper's MNIST Glow trains here: images/s, share of the device's own peak, time of the paper's 150 epochs.

`make benchmarks` prints a row for each way to train: 200 steps after 20 of warming up on a GPU, 8 after 2 on a CPU.
"""
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.train import _tf32, train
from lib.zoo import RECIPES, crop_and_flip

RECIPE, SHAPE, CLASSES = RECIPES["mnist"], (1, 32, 32), 10
GPU = torch.cuda.is_available()
DEVICE, WARM, STEPS = ("cuda", 20, 200) if GPU else ("cpu", 2, 8)
FAST = "compiled, captured, TF32" if GPU else "compiled"
# precision of fabric, fast
VARIANTS = {"float32": ("32-true", False), f"float32, {FAST}": ("32-true", True), "bf16-mixed": ("bf16-mixed", False),
            f"bf16-mixed, {FAST}": ("bf16-mixed", True)}
begun: list[float] = []


def stamped(x):
    """The paper's augmentation; notes when each step begins, at both ends of the measurement after all before it is done."""
    if GPU and len(begun) in (WARM, WARM + STEPS):
        torch.cuda.synchronize()
    begun.append(time.perf_counter())
    return crop_and_flip(x, crop=RECIPE["crop"], flip=RECIPE["flip"])


def peak(precision, n=8192 if GPU else 2048):
    """Floating-point operations a second that a product of n x n matrices reaches here; the best of ten."""
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16 if precision.startswith("bf16") else torch.float32)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        (a @ a).sum().item()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def operations(model, x, y):
    """Floating-point operations of matrix products and convolutions in one training step."""
    with FlopCounterMode(display=False) as counted:
        losses.reweight(model, x, y).backward()
    return counted.get_total_flops()


@pytest.mark.parametrize("name", VARIANTS)
def test_training_of_the_papers_glow(name):
    precision, fast = VARIANTS[name]
    batch = RECIPE["batch"]
    torch.manual_seed(0)
    images, labels = torch.rand(2048, *SHAPE), torch.randint(CLASSES, (2048,))
    model = ConditionalGlow(SHAPE, CLASSES, **{k: RECIPE[k] for k in ("levels", "depth", "width")})
    begun.clear()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    train(model, losses.reweight, (images, labels), steps=WARM + STEPS + 1, batch=batch, lr=1e-5, clip=RECIPE["clip"], device=DEVICE,
          precision=precision, fast=fast, augment=stamped)
    memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most" if GPU else ""
    with _tf32(GPU and fast):
        best = peak(precision)
    first, seconds = begun[WARM] - begun[0], (begun[WARM + STEPS] - begun[WARM]) / STEPS
    share = operations(model, images[:batch].to(DEVICE), labels[:batch].to(DEVICE)) / seconds / best
    print(f"\nGlow of fetaya2020 on {SHAPE}, batch {batch}, {name}, {torch.cuda.get_device_name() if GPU else DEVICE}: "
          f"{batch / seconds:.0f} images/s, {share:.0%} of the peak ({best / 1e12:.2f} TFLOP/s in a matrix product), warmed in "
          f"{first:.0f} s, {(first + seconds * RECIPE['steps']) / 3600:.1f} h for the paper's 150 epochs{memory}")
    assert len(begun) == WARM + STEPS + 1 and all(p.isfinite().all() for p in model.parameters())

"""One training loop: a fixed number of steps, resumable to the bit; trained models found by their digest.

Everything random in a step (which images, augmentation, noise) is drawn after seeding with (seed, step), so
the step number is the whole random and data-order state: a resumed run draws what the uninterrupted one would
have drawn.

Under torchrun the processes share every batch: each takes its part of the images, gradients are averaged. What is
drawn in a step then depends on the process as well, so a run is continued by as many processes as began it.
"""

import ctypes
import hashlib
import inspect
import math
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from lib import checkpoint as checkpoints
from lib.digest import digest, module_digests, syntax

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Adversary = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Interrupted(RuntimeError):
    """Training ran out of its wall time; with a checkpoint, the same call goes on from there."""


class Objective(nn.Module):
    """A model and its loss as one module, so that fabric's precision covers both; `fast` as in `train`."""

    def __init__(self, model: nn.Module, loss: Loss, fast: bool = False) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        if fast:
            torch.compiler.reset()      # what was compiled for another training would count against PyTorch's limit of eight
            # on CUDA the compiled kernels are captured as a graph; the noise stays what the plain run would draw
            self.loss = torch.compile(loss, dynamic=False, options={"triton.cudagraphs": True, "fallback_random": True})

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar loss of a batch."""
        return self.loss(self.model, x, y)


def random_crop(x: Tensor, padding: int) -> Tensor:
    """Shift each image by up to `padding` pixels each way, edges repeated (fetaya2020: 4 of 32 pixels)."""
    n, _, height, width = x.shape
    padded = F.pad(x, (padding,) * 4, mode="replicate").movedim(1, -1)
    rows = torch.randint(2 * padding + 1, (n, 1), device=x.device) + torch.arange(height, device=x.device)
    columns = torch.randint(2 * padding + 1, (n, 1), device=x.device) + torch.arange(width, device=x.device)
    image = torch.arange(n, device=x.device)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def random_flip(x: Tensor) -> Tensor:
    """Mirror each image left to right with probability 1/2."""
    mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(mirrored, x.flip(-1), x)


def learning_rate(step: int, steps: int, lr: float) -> float:
    """`lr`, a tenth of it after 70 % of the steps, a hundredth after 90 %.

    The paper's drops come after 40 % and 80 % of its 150 epochs; in our few steps that leaves the model
    undertrained (Reweight on cropped digits, lr 0.001, 900 steps: 3.00 bits/dim with the paper's drops, 2.85
    with these, 2.95 with a cosine).
    """
    return lr * (1.0 if step < 0.7 * steps else 0.1 if step < 0.9 * steps else 0.01)


def train(model: nn.Module, loss: Loss, data: tuple[Tensor, ...], *, steps: int, batch: int = 64,
          lr: float = 1e-3, seed: int = 0, augment: Callable[[Tensor], Tensor] | None = None,
          adversary: Adversary | None = None, hybrid: bool = False, clip: float | None = None,
          ema: float | None = None, device: str = "cpu", precision: str = "32-true", fast: bool = False,
          checkpoint: str | Path | None = None, save_seconds: float = 30, max_minutes: float = math.inf) -> nn.Module:
    """Train `model` in place with Adam for `steps` steps and return it in eval mode, on `device`.

    loss          (model, x, y) -> scalar
    data          (images, labels, ...), images (n, channels, height, width) in [0, 1]; batches without
                  replacement
    lr            initial learning rate, see `learning_rate`;  clip: largest gradient norm, None: no limit
    augment       images -> images, drawing from torch's global generator
    adversary     (model, x, y) -> images to train on in place of x, found against the model as it stands
    hybrid        train on x and the adversary's images, 1:1 in every batch (pope2020, Section 4)
    ema           decay in (0, 1) of an average of the weights, which the returned model then has; None: no
                  average
    device        "cpu", "cuda", "cuda:N" or "mps";  precision: as in lightning.fabric;
                  log-likelihoods of bf16 are off by 0.02 to 0.04 bits/dim, of float32 by 2e-6 (tests/test_precision.py)
    fast          compile the loss and its gradient, a minute or more; on CUDA the steps are captured and replayed as a
                  graph, and convolutions and matrix products round to TF32, which puts log-likelihoods off by
                  0.0004 to 0.0015 bits/dim while training (tests/test_precision.py)
    checkpoint    `NAME.safetensors`, or a folder in which the file is named by the digest of the run; written
                  every `save_seconds`, at the end and on interruption; an existing one is continued, a
                  finished one is loaded. A second process on the same file waits for the first.
    max_minutes   wall time after which Interrupted is raised, the checkpoint written

    Under torchrun every process calls this alike: `batch` is that of all together, a multiple of their number; batch
    norm sees the part of each; `checkpoint` lies on a file system that they share, and is written by the first.

    SIGINT and SIGTERM end the current step, write the checkpoint and are then delivered. Raises ValueError
    for a checkpoint of another run or a damaged one (left untouched), FloatingPointError for a loss or, with
    `clip`, a gradient that is not finite. Leaves torch's global generator as it was.
    """
    rank, processes = _place()
    settings = dict(steps=steps, batch=batch, lr=lr, seed=seed, clip=clip, ema=ema, precision=precision,
                    hybrid=hybrid, fast=fast)
    if hybrid and adversary is None:
        raise ValueError("hybrid must be False without an adversary, got True")
    _check(settings, device, len(data[0]))
    _keep_freed_memory()
    run = describe(model, loss, data, augment, adversary, settings)
    deadline = time.monotonic() + 60 * max_minutes
    callables = model, loss, augment, adversary
    path = None if checkpoint is None else _address(Path(checkpoint), run, device, callables)
    run |= {"processes": processes} if processes > 1 else {}
    with checkpoints.locked(path if rank == 0 else None, deadline), torch.random.fork_rng(), _tf32(fast and device.startswith("cuda")):
        _loop(model, loss, data, augment, adversary, settings, device, run, path, save_seconds, deadline)
    return model.eval()


def _loop(model, loss, data, augment, adversary, settings, device, run, path, save_seconds, deadline):
    """The body of `train`: arguments checked, generator forked, checkpoint locked."""
    from lightning.fabric import Fabric  # takes seconds to import, and only training needs it

    steps, seed, (rank, processes) = settings["steps"], settings["seed"], _place()
    kind, _, number = device.partition(":")
    if processes > 1:
        fabric = Fabric(accelerator=kind, devices=int(os.environ["LOCAL_WORLD_SIZE"]),
                        num_nodes=processes // int(os.environ["LOCAL_WORLD_SIZE"]),
                        strategy="ddp_find_unused_parameters_true", precision=settings["precision"])
        fabric.launch()
    else:
        fabric = Fabric(accelerator=kind, devices=[int(number)] if number else 1, precision=settings["precision"])
    images, labels = (t.to(fabric.device) for t in data[:2])
    optimizer = torch.optim.Adam(model.to(fabric.device).train().parameters(), lr=settings["lr"], fused=True)
    average = [p.detach().clone() for p in model.parameters()] if settings["ema"] else []
    fabric.barrier()        # the first process holds the lock by now
    step = checkpoints.load(path, run, model, optimizer, average) if path else 0
    fabric.barrier()        # and writes only when all have read
    if step == steps:
        return
    if hasattr(model, "initialise") and not model.initialised:
        _seed(seed, INITIALISE)
        model.initialise(images[torch.randperm(len(images), device=images.device)[:1024]])
        average = [p.detach().clone() for p in model.parameters()] if settings["ema"] else []
    objective, optimizer = fabric.setup(Objective(model, loss, settings["fast"]), optimizer)
    saved, stop, unseen = time.monotonic(), False, []
    patience = 1 if kind == "cpu" else 100      # steps before the losses are looked at, for which a GPU has to wait
    with _signals() as caught, _bar(step, steps) as bar:
        while step < steps and not stop:
            chosen = _batch(seed, step, len(images), settings["batch"], images.device)[rank::processes]
            _seed(seed, STEP, step, *([rank] if processes > 1 else []))
            x, y = augment(images[chosen]) if augment else images[chosen], labels[chosen]
            if adversary:
                attacked = adversary(model, x, y).detach()
                x, y = (torch.cat([x, attacked]), torch.cat([y, y])) if settings["hybrid"] else (attacked, y)
            unseen.append(_update(fabric, objective, optimizer, average, x, y, step, settings))
            step += 1
            bar.update()
            stop = bool(caught) or time.monotonic() > deadline
            if processes > 1:       # all stop at the same step
                stop = bool(fabric.all_reduce(torch.tensor(float(stop), device=fabric.device), reduce_op="sum"))
            save = stop or time.monotonic() - saved >= save_seconds
            if save or len(unseen) == patience or step == steps:
                bar.set_postfix_str(f"loss {_finite(unseen, step):.3f}", refresh=False)
                unseen.clear()
            if save:
                if path and rank == 0 and step < steps:
                    checkpoints.save(path, run, step, model, optimizer, average)
                saved = time.monotonic()
        if step == steps:
            with torch.no_grad():
                for parameter, mean in zip(model.parameters(), average):
                    parameter.copy_(mean)
            if path and rank == 0:
                checkpoints.save(path, run, steps, model)
        fabric.barrier()        # nobody leaves, and so ends torchrun, while the first still writes
    if caught:
        signal.raise_signal(caught[0])
    if step < steps:
        where = f"the same call resumes from {path}" if path else "without a checkpoint nothing is kept"
        raise Interrupted(f"{'stopped' if processes > 1 else 'max_minutes reached'} at step {step} of {steps}; {where}")


def _update(fabric, objective, optimizer, average, x, y, step, settings) -> Tensor:
    """One step of Adam; the loss of the batch, nats, and with `clip` the norm of its gradient: (1,) or (2,)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings["steps"], settings["lr"])
    value = objective(x, y)
    seen = [value.detach()]
    fabric.backward(value)
    if settings["clip"]:
        seen.append(fabric.clip_gradients(objective, optimizer, max_norm=settings["clip"], error_if_nonfinite=False))
    optimizer.step()
    optimizer.zero_grad()
    if average:
        # average <- ema average + (1 - ema) weights
        torch._foreach_lerp_(average, [p.detach() for p in objective.parameters()], 1 - settings["ema"])
    return torch.stack(seen)


def _finite(unseen: list[Tensor], step: int) -> float:
    """The last loss of the `unseen` updates before `step`; FloatingPointError for the first that is no number."""
    seen = torch.stack(unseen).tolist()
    for at, (loss, *norm) in enumerate(seen, step - len(seen)):
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {at}; lower lr, or set clip")
        if not all(map(math.isfinite, norm)):
            raise FloatingPointError(f"gradient is {norm[0]} at step {at}; lower lr")
    return seen[-1][0]


@contextmanager
def _tf32(on: bool):
    """While `on`, products of float32 on a GPU round their operands to 10 bits of mantissa; then as before.

    By PyTorch's older switches, because fabric reads them and PyTorch refuses a mixture of the two kinds.
    """
    if not on:
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _place() -> tuple[int, int]:
    """(rank, number) of the processes that torchrun has started for this training; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# --- random state ----------------------------------------------------------------------------------

ORDER, STEP, INITIALISE, BUILD = range(4)  # uses of the seed, kept apart


def _state(*key: int) -> int:
    """A generator seed from a key such as (seed, STEP, step), well mixed."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _seed(*key: int) -> None:
    """Seed torch's global generators from a key."""
    torch.manual_seed(_state(*key))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int, device: torch.device) -> Tensor:
    """The order of the images in one epoch; on the device, for which a copy at every step would have to wait."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(_state(seed, ORDER, epoch))).to(device)


def _batch(seed: int, step: int, n: int, batch: int, device: torch.device) -> Tensor:
    """Indices of the images of one step; an epoch's last, incomplete batch is left out."""
    per_epoch = n // batch
    start = step % per_epoch * batch
    return _order(seed, step // per_epoch, n, device)[start:start + batch]


# --- what a run is ---------------------------------------------------------------------------------

def describe(model: nn.Module, loss: Loss, data: tuple[Tensor, ...], augment, adversary,
             settings: dict) -> dict:
    """All that the result of a run depends on but the code, as plain values."""
    fingerprint = hashlib.sha256()
    for tensor in data[:2]:
        fingerprint.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        fingerprint.update(tensor.detach().cpu().contiguous().numpy())
    architecture = {"class": _name(type(model)), **getattr(model, "config", {}),
                    "tensors": {name: list(t.shape) for name, t in model.state_dict().items()}}
    return {**settings, "model": architecture, "loss": _name(loss), "augment": augment and _name(augment),
            "adversary": adversary and _name(adversary), "data": fingerprint.hexdigest()}


def _name(thing):
    """A callable as plain values: its address in lib; elsewhere the digest of its source as well."""
    if isinstance(thing, partial):
        return {"function": _name(thing.func), "arguments": [list(thing.args), thing.keywords]}
    name = f"{thing.__module__}.{thing.__qualname__}"
    if thing.__module__.startswith("lib."):
        return name
    if "<lambda>" in name:
        raise ValueError(f"loss and augment must be named functions, which have an address, got {name}")
    return f"{name} {syntax(textwrap.dedent(inspect.getsource(thing)))}"


def _address(path: Path, run: dict, device: str, callables) -> Path:
    """The checkpoint: the file `path`, or in the folder `path` the digest of the run, its code and its arithmetic.

    Sums on the CPU are ordered by the number of threads; a kept model must not depend on who trained it first.
    """
    if path.suffix == ".safetensors":
        return path
    model, *functions = callables
    origins = [type(model), *(f.func if isinstance(f, partial) else f for f in functions if f)]
    modules = {"lib.train", *(o.__module__ for o in origins if o.__module__.startswith("lib."))}
    threads = torch.get_num_threads() if device == "cpu" else 0
    parts = {"run": run, "code": module_digests(modules),
             "arithmetic": [torch.__version__, device.partition(":")[0], threads]}
    return path / f"{digest(parts)}.safetensors"


def cache_folder() -> Path:
    """Where trained models lie: $REPRO_CACHE, by default `_build/models` of the project around."""
    above = (Path.cwd(), *Path.cwd().parents)
    project = next((folder for folder in above if (folder / "pyproject.toml").is_file()), Path.cwd())
    return Path(os.environ.get("REPRO_CACHE") or project / "_build" / "models").expanduser()


def trained(build: Callable[[], nn.Module], loss: Loss, data: tuple[Tensor, ...], *, steps: int,
            seed: int = 0, **settings) -> nn.Module:
    """What `train` makes of the model `build()`, kept in `cache_folder()` and found there again.

    `build` is called under `seed`; `settings` are those of `train`. The digest that names the file covers
    architecture, data, settings and the code in lib behind them; an interrupted training is resumed.
    """
    with torch.random.fork_rng():
        _seed(seed, BUILD)
        model = build()
    return train(model, loss, data, steps=steps, seed=seed, checkpoint=cache_folder(), **settings)


# --- arguments, signals, progress ------------------------------------------------------------------

def _check(settings: dict, device: str, images: int) -> None:
    """Raise ValueError for the first argument out of range."""
    for name, least in [("steps", 1), ("batch", 1), ("seed", 0)]:
        if not isinstance(settings[name], int) or settings[name] < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {settings[name]!r}")
    if settings["batch"] > images:
        raise ValueError(f"batch must be at most the number of images ({images}), got {settings['batch']}")
    if settings["batch"] % _place()[1]:
        raise ValueError(f"batch must be a multiple of the number of processes ({_place()[1]}), got {settings['batch']}")
    for name in ("lr", "clip"):
        if settings[name] is not None and not settings[name] > 0:
            raise ValueError(f"{name} must be > 0, got {settings[name]}")
    if settings["ema"] is not None and not 0 < settings["ema"] < 1:
        raise ValueError(f"ema must be in (0, 1), got {settings['ema']}")
    available = ["cpu", *(["mps"] if torch.backends.mps.is_available() else []),
                 *(["cuda"] if torch.cuda.is_available() else []),
                 *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if device not in available:
        raise ValueError(f"device must be one of {', '.join(available)} on this machine, got {device!r}")


def _keep_freed_memory() -> None:
    """Let glibc reuse the memory of activations, which it otherwise maps and unmaps at every step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library: nothing to gain
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 2**30)
    mallopt(m_trim_threshold, 2**31 - 1)


@contextmanager
def _signals():
    """Collect SIGINT and SIGTERM, so that no step is cut in half; in the main thread only."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.signal(number, lambda n, _: caught.append(n))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _bar(step: int, steps: int) -> tqdm:
    """Progress on stderr: on a terminal only, unless $REPRO_PROGRESS says always (1) or never (0)."""
    disable = {"0": True, "1": False}.get(os.environ.get("REPRO_PROGRESS", ""))
    return tqdm(total=steps, initial=step, desc="training", unit="step", disable=disable)

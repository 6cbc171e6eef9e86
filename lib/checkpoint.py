"""Checkpoints of training: one safetensors file, never half-written, one writer at a time."""

import json
import os
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lib.lock import Held, hold


def save(path: Path, run: dict, step: int, model: nn.Module, optimizer: torch.optim.Optimizer | None = None,
         average: list[Tensor] = ()) -> None:
    """Write weights, optimiser state, averaged weights, `step` and the description `run` to one file.

    Written aside, synced and renamed: the file is the old one or the new one, even if the process is killed.
    """
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    tensors |= {f"average.{i}": t for i, t in enumerate(average)}
    if optimizer is not None:
        state = optimizer.state_dict()["state"]
        tensors |= {f"optimiser.{i}.{name}": t for i, entries in state.items() for name, t in entries.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    save_file({k: t.detach().contiguous() for k, t in tensors.items()}, aside,
              {"step": str(step), "run": json.dumps(run, sort_keys=True)})
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def load(path: Path, run: dict, model: nn.Module, optimizer: torch.optim.Optimizer,
         average: list[Tensor]) -> int:
    """Restore what `save` wrote and return its step; 0, and nothing restored, if there is no file.

    Raises ValueError, in one line, for a damaged file and for one whose description differs from `run`. How many
    processes trained a finished model is no difference.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        step, found = int(header["step"]), json.loads(header["run"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} is damaged or no checkpoint ({error}); "
                         "delete it to train anew") from None
    wanted = json.loads(json.dumps(run))
    if step == run["steps"]:
        found.pop("processes", None)
        wanted.pop("processes", None)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(f"checkpoint {path} is of another run: {_difference(name, found, wanted)}; "
                             "nothing was changed, name another file or delete this one")
    model.load_state_dict({k[len("model."):]: t for k, t in tensors.items() if k.startswith("model.")})
    if step < run["steps"]:  # a finished file holds the weights only
        for i, mean in enumerate(average):
            mean.copy_(tensors[f"average.{i}"])
        _restore(optimizer, tensors)
    return step


def _difference(name: str, found: dict, wanted: dict) -> str:
    """Where two descriptions differ at `name`, as deep as both are dictionaries."""
    a, b = found.get(name), wanted.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
        inner = next(k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k))
        return f"{name} {_difference(inner, a, b)}"
    return f"{name} is {a!r} there and {b!r} here"


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the saved state back in each parameter's own memory layout: the fused optimiser needs it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, saved in tensors.items():
        if key.startswith("optimiser."):
            _, i, name = key.split(".")
            parameter = parameters[int(i)]
            like = saved.to(parameter.device) if name == "step" else torch.empty_like(parameter)
            optimizer.state[parameter][name] = like.copy_(saved)


@contextmanager
def locked(path: Path | None, deadline: float):
    """Hold the lock beside `path` while training writes it; another process waits until it is free.

    The lock is the operating system's and ends with its process, however that ends. `deadline`
    (time.monotonic) passed while waiting raises TimeoutError. No lock where `path` is None.
    """
    if path is None:
        yield
        return
    with ExitStack() as held:
        lock = path.with_name(path.name + ".lock")
        try:
            held.enter_context(hold(lock))
        except Held as other:
            print(f"{path.name} is being trained by process {other.holder}; waiting for it", file=sys.stderr)
            try:
                held.enter_context(hold(lock, max(0.0, min(deadline - time.monotonic(), 1e9))))
            except Held:
                raise TimeoutError(f"{path} is still being trained by process {other.holder}") from None
        yield

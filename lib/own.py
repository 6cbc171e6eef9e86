"""A reader's own classifier and images, brought before the book's attacks and detectors; each mistake told in one line."""
import importlib.util
import os
import sys
import traceback
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.claims import project_root
from lib.data import Data, load
from lib.models.protocol import SPACES, GenerativeClassifier
from lib.parameters import ParameterError

SLACK = 1e-4        # by how much an input may leave [0, 1] through rounding


class Own(GenerativeClassifier):
    """A module of the reader's as a generative classifier.

    A module that declares what its scores are (`space`, `normalised`, `random`, see `lib.models.protocol`) is taken at
    its word; one that declares nothing returns logits (n, C), which become log p(y|x) in the space "posterior".
    Raises ParameterError (a ValueError), in one line, for inputs and scores that break the protocol.
    """

    def __init__(self, module: nn.Module, data: Data) -> None:
        super().__init__()
        self.module, self.logits = module, not hasattr(module, "space")
        self.space = "posterior" if self.logits else module.space
        self.normalised, self.random = (bool(getattr(module, name, False)) for name in ("normalised", "random"))
        self.classes, self.shape, self.grey_levels = len(data.classes), data.shape, data.levels
        if self.space not in SPACES:
            raise ParameterError(f"space must be one of {', '.join(SPACES)}, got {self.space!r}")
        self.place = nn.Parameter(torch.zeros(()))      # callers ask the first parameter for the device

    def forward(self, x: Tensor) -> Tensor:
        """Scores (n, classes), nats, of images x (n, *shape) in [0, 1]."""
        if x.shape[1:] != self.shape:
            raise ParameterError(f"x must be images (n, *{self.shape}), got {tuple(x.shape)}")
        if not (x.amin() >= -SLACK and x.amax() <= 1 + SLACK):
            raise ParameterError(f"x must lie in [0, 1], got values from {x.amin():.4g} to {x.amax():.4g}")
        z = self.module(x)
        got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        if got != (len(x), self.classes):
            raise ParameterError(f"forward(x) must return scores of shape (images, classes) = ({len(x)}, {self.classes}), got {got}")
        if bad := int((~z.isfinite()).any(1).sum()):
            raise ParameterError(f"scores must be finite, got NaN or infinity for {bad} of {len(x)} images")
        return z.log_softmax(1) if self.logits else z


def locate(text: str) -> tuple[Path, str]:
    """(file, function) of "PATH.py:FUNCTION"; PATH counts from where the command was given, from the working folder,
    or from the project's notebooks. ParameterError if there is no such file."""
    path, _, function = str(text).rpartition(":")
    if not path.endswith(".py") or not function.isidentifier():
        raise ParameterError(f"model must be PATH.py:FUNCTION, such as my_model.py:build, got {text!r}")
    return _there(path, "model"), function


def _there(path: str, what: str) -> Path:
    """An existing path, looked for in the folders that a reader may mean."""
    folders = os.environ.get("REPRO_FROM", "."), ".", project_root() / "notebooks"
    tried = dict.fromkeys((Path(folder) / Path(path).expanduser()).resolve() for folder in folders)
    if not (found := [p for p in tried if p.exists()]):
        raise ParameterError(f"{what} must name something that exists, {path!r} does not; looked for {', '.join(map(str, tried))}")
    return found[0]


def load_data(name: str) -> Data:
    """`lib.data.load`, with the path of ``folder:PATH`` looked for as that of a model is."""
    return load(f"folder:{_there(name.removeprefix('folder:'), 'data')}" if name.startswith("folder:") else name)


def _calling(what: str, function, *arguments):
    """function(*arguments); an exception of the reader's code becomes a ParameterError that says what was called and where."""
    try:
        return function(*arguments)
    except ParameterError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ParameterError(f"{what} raised {type(error).__name__}: {' '.join(str(error).split()) or 'no message'} "
                         f"({Path(last.filename).name}, line {last.lineno})") from error


def load_model(text: str, data: Data, device: str = "cpu", seed: int = 0) -> Own:
    """The classifier that "PATH.py:FUNCTION" builds: FUNCTION(data) gets a `lib.data.Data` and returns a module, trained.

    The module's forward takes images (n, *data.shape) in [0, 1] and returns scores (n, classes), differentiable. It is
    put into eval mode and tried on validation images, black, white and noise before anything else happens.
    Raises ParameterError (a ValueError), in one line, where the file, the function, the module or its scores are not as expected.
    """
    file, name = locate(text)
    spec = importlib.util.spec_from_file_location(f"own_{file.stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    _calling(f"model file {file.name}", spec.loader.exec_module, module)
    if not callable(getattr(module, name, None)):
        known = [n for n, thing in vars(module).items() if getattr(thing, "__module__", "") == spec.name]
        raise ParameterError(f"model must name a function of {file.name} ({', '.join(known) or 'it has none'}), got {name!r}")
    torch.manual_seed(seed)
    built = _calling(f"{name}(data) of {file.name}", getattr(module, name), data)
    if not isinstance(built, nn.Module):
        raise ParameterError(f"{name}(data) of {file.name} must return a torch.nn.Module, got {type(built).__name__}")
    model = Own(built, data).to(device).eval()
    few, draw = data.validation.images[:8].to(device), torch.Generator().manual_seed(0)
    x = torch.cat([few, few[:1] * 0, few[:1] * 0 + 1, torch.rand(few.shape, generator=draw).to(device)])
    z, again = (_calling(f"forward(x) on images {tuple(x.shape)}", model, x.requires_grad_()) for _ in range(2))
    if not model.random and not torch.equal(z, again):
        raise ParameterError("forward(x) must answer the same images alike, or the module declare random = True")
    if not z.requires_grad or torch.autograd.grad(z.sum(), x, allow_unused=True)[0] is None:
        raise ParameterError("scores must be differentiable in the images: no gradient arrives, is there a detach or NumPy inside?")
    return model.requires_grad_(False)

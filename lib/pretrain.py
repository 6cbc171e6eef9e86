"""Train one model into the cache, where notebooks find it: alone, or on several GPUs under torchrun.

    torchrun --nproc-per-node 4 -m lib.pretrain zoo.conditional_flow kind=Reweight data=mnist device=cuda

A function of `lib.zoo`, `lib.zoo_density`, `lib.zoo_pixelcnn` or `lib.zoo_sdim`, and its arguments as NAME=VALUE. The same
command goes on from the last checkpoint; it takes as many processes as began it.
"""
import inspect
import sys

import yaml

from lib import zoo, zoo_density, zoo_pixelcnn, zoo_sdim
from lib.data import load
from lib.parameters import ParameterError

MODULES = (zoo, zoo_density, zoo_pixelcnn, zoo_sdim)
MODELS = {f"{m.__name__.removeprefix('lib.')}.{name}": function for m in MODULES for name, function in vars(m).items()
          if inspect.isfunction(function) and function.__module__ == m.__name__ and {"data", "device"} <= {*inspect.signature(function).parameters}
          and function is not zoo.fit}


def pretrain(name: str, given: dict[str, str]) -> None:
    """Train the model `name` with arguments `given` as text; ParameterError, in one line, for what cannot be called so."""
    if name not in MODELS:
        raise ParameterError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    parameters = inspect.signature(MODELS[name]).parameters
    if unknown := [key for key in given if key not in parameters]:
        raise ParameterError(f"argument must be one of {', '.join(parameters)}, got {unknown[0]!r}")
    if missing := [key for key, p in parameters.items() if p.default is p.empty and key not in given]:
        raise ParameterError(f"{missing[0]} must be given, as {missing[0]}=VALUE")
    arguments = {key: load(text) if key == "data" else yaml.safe_load(text) for key, text in given.items()}
    MODELS[name](**arguments)


def main(argv: list[str] | None = None) -> int:
    """`python -m lib.pretrain MODEL NAME=VALUE …`; mistakes end in one line and a non-zero exit."""
    name, *pairs = (sys.argv[1:] if argv is None else argv) or [""]
    try:
        pretrain(name, dict(pair.split("=", 1) if "=" in pair else (pair, "") for pair in pairs))
    except (ParameterError, ValueError) as error:
        print(f"pretrain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

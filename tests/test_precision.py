"""What single and half precision cost a likelihood, in bits/dim: why `lib.train` runs in float32 unless told otherwise."""
import copy

import torch

from lib.models.glow import ConditionalGlow

SHAPE = (1, 32, 32)


def errors(seed):
    """Largest error over 16 images of log p(x|y), bits/dim, in float32 and with bf16 autocast, against float64."""
    torch.manual_seed(seed)
    model = ConditionalGlow(SHAPE, 10, levels=3, depth=4, width=32).eval()
    x = torch.rand(16, *SHAPE)
    with torch.no_grad():
        model.initialise(x)
        for weight in model.parameters():       # as far from the identity as a trained flow
            weight.add_(0.05 * torch.randn_like(weight))
        noise, exact = model.draw_noise(x), copy.deepcopy(model).double()
        of = {"float64": exact.log_prob(x.double(), noise.double()), "float32": model.log_prob(x, noise)}
        with torch.autocast("cpu", torch.bfloat16):
            of["bf16"] = model.log_prob(x, noise)
    bits = {k: v.double() / (model.dimension * torch.log(torch.tensor(2.0, dtype=torch.float64))) for k, v in of.items()}
    return {k: (bits[k] - bits["float64"]).abs().amax().item() for k in ("float32", "bf16")}


def test_single_precision_is_enough_for_a_likelihood_and_half_is_not():
    """The tables compare models by 0.01 bits/dim and less."""
    found = [errors(seed) for seed in range(3)]
    assert max(f["float32"] for f in found) < 1e-4
    assert min(f["bf16"] for f in found) > 1e-3

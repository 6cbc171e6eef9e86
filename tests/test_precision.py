"""What less than double precision costs a likelihood, in bits/dim: why training is in float32 unless told otherwise."""
import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.models.glow import ConditionalGlow

SHAPE = (1, 32, 32)
PRODUCTS = {torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


def tf32(x):
    """float32 rounded to the nearest of 10 bits of mantissa, as a GPU does before it multiplies; sums stay in float32."""
    bits = x.view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class TF32(TorchDispatchMode):
    """The products of a GPU that may round to TF32, on any machine."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            last = 3 if func.overloadpacket is torch.ops.aten.addmm else 2
            args = (*args[:last - 2], *map(tf32, args[last - 2:last]), *args[last:])
        return func(*args, **kwargs or {})


def test_the_rounding_is_that_of_ten_bits():
    """1 + 2**-10 is kept, half of that step goes to the even neighbour, a little more goes up."""
    step = 2.0**-10
    given = torch.tensor([1 + step, 1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -3.0])
    assert tf32(given).tolist() == [1 + step, 1.0, 1 + 2 * step, 1 + step, -3.0]
    a, b = torch.rand(64, 64), torch.rand(64, 64)
    with TF32():
        product = a @ b
    assert torch.equal(product, tf32(a) @ tf32(b)) and not torch.equal(product, a @ b)


def errors(seed):
    """Largest error over 16 images of log p(x|y), bits/dim, in float32, in TF32 and with bf16 autocast, against float64."""
    torch.manual_seed(seed)
    model = ConditionalGlow(SHAPE, 10, levels=3, depth=4, width=32).eval()
    x = torch.rand(16, *SHAPE)
    with torch.no_grad():
        model.initialise(x)
        for weight in model.parameters():       # as far from the identity as a trained flow
            weight.add_(0.05 * torch.randn_like(weight))
        noise, exact = model.draw_noise(x), copy.deepcopy(model).double()
        of = {"float64": exact.log_prob(x.double(), noise.double()), "float32": model.log_prob(x, noise)}
        with TF32():
            of["tf32"] = model.log_prob(x, noise)
        with torch.autocast("cpu", torch.bfloat16):
            of["bf16"] = model.log_prob(x, noise)
    bits = {k: v.double() / (model.dimension * torch.log(torch.tensor(2.0, dtype=torch.float64))) for k, v in of.items()}
    return {k: (bits[k] - bits["float64"]).abs().amax().item() for k in ("float32", "tf32", "bf16")}


def test_single_precision_is_enough_for_a_likelihood_and_less_is_not():
    """The tables compare models by 0.01 bits/dim and less; TF32 may train, where a batch is noisier by far."""
    found = [errors(seed) for seed in range(3)]
    assert max(f["float32"] for f in found) < 1e-4
    assert 1e-4 < min(f["tf32"] for f in found) and max(f["tf32"] for f in found) < 0.005
    assert min(f["bf16"] for f in found) > 0.01

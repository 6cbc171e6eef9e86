"""The fast step: compiled, captured on a GPU, in TF32 there; the same training but for rounding."""
import copy
from functools import partial

import pytest
import torch

from lib import train as training
from lib.models import losses
from lib.models.density import FlowDensity, nll
from lib.models.glow import ConditionalGlow
from lib.models.objectives import label_weighted
from lib.models.pixelcnn import ConditionalPixelCNN, weighted
from lib.models.sdim import SDIM, Twin, sdim_loss, twin_loss
from lib.models.variants import FlowGAN, RobustGlow, SmoothedGlow, flow_gan
from lib.train import Interrupted, train, trained

SMALL = dict(grey_levels=17, levels=2, depth=2, width=4)
GLOW = partial(ConditionalGlow, (1, 8, 8), 3, **SMALL)
RUN = dict(steps=6, batch=8, lr=1e-2, seed=3, clip=10.0, ema=0.9)
PAIRS = {
    "base": (GLOW, losses.base), "reweight": (GLOW, losses.reweight), "split": (partial(GLOW, prior="split"), losses.split),
    "weighted": (GLOW, partial(label_weighted, weight=2.0)),
    "heavy tails": (partial(RobustGlow, (1, 8, 8), 3, tails="mixture", **SMALL), losses.reweight),
    "smoothed": (partial(SmoothedGlow, (1, 8, 8), 3, smoothing=0.1, **SMALL), losses.reweight),
    "flow-GAN": (partial(FlowGAN, (1, 8, 8), 3, critic_width=4, **SMALL), flow_gan),
    "density": (partial(FlowDensity, (1, 8, 8), **SMALL), nll),
    "density, lu": (partial(FlowDensity, (1, 8, 8), lu=True, **SMALL), nll),
    "realnvp": (partial(FlowDensity, (1, 8, 8), family="realnvp", **SMALL), nll),
    "pixelcnn": (partial(ConditionalPixelCNN, (1, 8, 8), 3, grey_levels=17, depth=2, width=4), partial(weighted, alpha=1.0)),
    "sdim": (partial(SDIM, (1, 8, 8), 3, 17, filters=(4, 4, 8, 8), critic=8), sdim_loss),
    "twin": (partial(Twin, (1, 8, 8), 3, 17, filters=(4, 4, 8, 8)), twin_loss),
}


def data(n=40):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(17, (n, 1, 8, 8), generator=generator) / 16, torch.randint(3, (n,), generator=generator)


def built(build, seed=0):
    torch.manual_seed(seed)
    return build()


def weights(model):
    return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize("name", PAIRS)
def test_every_loss_is_one_graph_with_the_value_and_gradient_of_the_plain_one(name):
    """A break in the graph could not be captured; the backend without a compiler sees the same graphs, in seconds."""
    build, loss = PAIRS[name]
    model, (x, y) = built(build), data()
    if hasattr(model, "initialise"):
        model.initialise(x)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    found = []
    for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)):
        torch.manual_seed(1)
        own = copy.deepcopy(model)      # spectral norms remember the call before
        value = f(own, x[:8], y[:8])
        gradient = torch.autograd.grad(value, [*own.parameters()], allow_unused=True)
        found.append([value, *(g for g in gradient if g is not None)])
    plain, compiled = found
    assert len(plain) == len(compiled) > 2
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def fast():
    torch._dynamo.utils.counters.clear()
    model = train(built(GLOW), losses.reweight, data(), fast=True, **RUN)
    return model, dict(torch._dynamo.utils.counters["stats"])


def test_the_fast_training_is_the_plain_one_but_for_rounding(fast):
    """Six steps move the weights by some 0.03; the noise drawn is the same, so what is left is the order of sums."""
    plain = train(built(GLOW), losses.reweight, data(), **RUN)
    moved = (weights(plain) - weights(train(built(GLOW), losses.reweight, data(), **RUN | {"steps": 1}))).abs().max()
    assert (weights(fast[0]) - weights(plain)).abs().max() < moved / 100
    assert fast[1]["unique_graphs"] == 1        # six steps, compiled once


def test_a_fast_run_goes_on_to_the_bit(fast, tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(Interrupted):
        train(built(GLOW), losses.reweight, data(), checkpoint=path, max_minutes=0, fast=True, **RUN)
    resumed = train(built(GLOW, 9), losses.reweight, data(), checkpoint=path, fast=True, **RUN)
    assert torch.equal(weights(resumed), weights(fast[0]))


def test_a_fast_model_has_its_own_address(monkeypatch, tmp_path):
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda loss, **_: loss)
    for on in (False, True, True):
        trained(GLOW, losses.reweight, data(), fast=on, **RUN)
    assert len([*tmp_path.glob("*.safetensors")]) == 2


def test_more_trainings_than_pytorch_keeps_compiled(monkeypatch):
    """Its limit of eight versions of a function, by shape or architecture, counts from each training anew."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda loss, dynamic, options: compiler(loss, dynamic=dynamic, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for width in range(1, 11):
            train(built(partial(GLOW, width=width)), losses.base, data(), steps=1, batch=8, fast=True)


@pytest.mark.parametrize("fails", [False, True])
def test_rounding_is_put_back(fails):
    def read():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert read() == ("highest", False)      # by lib.models: likelihoods are evaluated in all of float32
    try:
        with training._tf32(True):
            assert read() == ("high", True)
            assert not fails or 1 / 0
    except ZeroDivisionError:
        pass
    assert read() == ("highest", False)


def test_losses_looked_at_late_still_name_the_first_bad_step():
    unseen = [torch.tensor(row) for row in ([1.0, 2.0], [float("nan"), 3.0], [float("nan"), float("nan")])]
    assert training._finite(unseen[:1], 5) == 1.0
    with pytest.raises(FloatingPointError, match="loss is nan at step 8; lower lr"):
        training._finite(unseen, 10)
    with pytest.raises(FloatingPointError, match="gradient is inf at step 9; lower lr"):
        training._finite([unseen[0], torch.tensor([1.0, float("inf")])], 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_captures_the_step_and_ends_near_the_plain_run():
    torch._dynamo.utils.counters.clear()
    fast = train(built(GLOW), losses.reweight, data(), device="cuda", fast=True, **RUN)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_recorded_non_static_inputs"] > 0
    plain = train(built(GLOW), losses.reweight, data(), device="cuda", **RUN)
    assert (weights(fast) - weights(plain)).abs().max() < 0.01

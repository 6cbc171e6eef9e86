"""One measurement in a fresh process: `python glow_worker.py WHO TASK` prints time and memory as JSON.

Both flows are Glow with LEVELS x DEPTH steps and WIDTH hidden channels, every latent conditioned on the
class. Ours turns a 1x32x32 image into 2x32x32 by padding with noise, which it draws in every call; normflows
is built on the same tensors (see `peer`) and is handed them ready-made, which favours it a little.
WHO is "ours" or "split" (the same flow under the two priors), normflows "default", "tuned" (channels-last,
fused Adam) or "once" (tuned, its classes scored from one encoding), or "convolutions" (those of our flow).
"""
import json
import sys
from statistics import median
from time import perf_counter, process_time

import normflows as nf
import torch
from torch.nn import functional as F

from lib import train
from lib.models import losses
from lib.models.glow import ConditionalGlow

SHAPE, CLASSES, LEVELS, DEPTH, WIDTH, BATCH, THREADS = (1, 32, 32), 10, 3, 4, 64, 64, 2


def ours(prior="gaussian"):
    """The model of the book, initialised on noise."""
    model = ConditionalGlow(SHAPE, CLASSES, levels=LEVELS, depth=DEPTH, width=WIDTH, prior=prior)
    model.initialise(torch.rand(BATCH, *SHAPE))
    return model


def peer(shapes):
    """normflows' Glow on the tensors of ours: `shapes` as MultiScaleFlow lists them, first level first.

    Its lists run from latents to image: a level unsqueezes what the merge gave it, all but the top one.
    """
    top = shapes[::-1]
    flows = [[nf.flows.Squeeze()] * (i > 0) + [nf.flows.GlowBlock(c, WIDTH) for _ in range(DEPTH)]
             for i, (c, _, _) in enumerate(top)]
    priors = [nf.distributions.ClassCondDiagGaussian(s, CLASSES) for s in (top[0], *top[:-1])]
    return nf.MultiscaleFlow(priors, flows, [nf.flows.Merge() for _ in top[1:]])


def once(model, z):
    """log p(x|y) of every class by normflows from one encoding, as its users can write it themselves."""
    latents, log_det = model.inverse_and_log_det(z)
    labels = [torch.full((len(z),), k) for k in range(CLASSES)]
    prior = [sum(q.log_prob(part, y) for q, part in zip(model.q0, latents)) for y in labels]
    return torch.stack(prior, 1) + log_det[:, None]


def calls(who):
    """(model, input, nll(x, y), log_prob(x, y), scores(x)) of a contestant."""
    x = torch.rand(BATCH, *SHAPE)
    if who == "ours":
        model = ours()
        return (model, x, lambda x, y: losses.base(model, x, y),
                lambda x, y: model.log_likelihoods(x).gather(1, y[:, None])[:, 0], model)
    if who == "split":
        model = ours("split")

        def log_prob(x, y):
            z, log_det = model.encode(x)
            return model.prior.log_prob(z, y) + log_det
        return model, x, lambda x, y: losses.split(model, x, y), log_prob, model
    shapes = ours().flow.shapes
    model, x = peer(shapes), torch.rand(BATCH, *shapes[0])
    if who != "default":
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():       # its actnorms initialise themselves on the first batch
        model.log_prob(x, torch.zeros(BATCH, dtype=torch.long))
    labels = [torch.full((BATCH,), k) for k in range(CLASSES)]

    def scores(x):
        return once(model, x) if who == "once" else torch.stack([model.log_prob(x, y) for y in labels], 1)
    return model, x, model.forward_kld, model.log_prob, scores


def contestant(who, task):
    """The function to time."""
    model, x, nll, log_prob, scores = calls(who)
    y = torch.arange(BATCH) % CLASSES
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5, fused=who != "default")

    def train_step():
        nll(x, y).backward()
        optimiser.step()
        optimiser.zero_grad()

    def pgd_step():
        nonlocal x
        x = x.requires_grad_()
        gradient, = torch.autograd.grad(F.cross_entropy(scores(x), y), x)
        x = (x.detach() + 1e-3 * gradient.sign()).clamp(0, 1)

    if task == "pgd":
        model.requires_grad_(False)
    return {"train": train_step, "pgd": pgd_step, "log_prob": torch.no_grad()(lambda: log_prob(x, y)),
            "classes": torch.no_grad()(lambda: scores(x))}[task]


def convolutions(task):
    """The convolutions of our flow alone, called as it calls them, each on a dense channels-last tensor."""
    def normal(*shape):
        return torch.randn(shape).contiguous(memory_format=torch.channels_last)

    jobs = []
    for c, h, w in ours().flow.shapes:
        for a, b, size in DEPTH * [(c, c, 1), (c // 2, WIDTH, 3), (WIDTH, WIDTH, 1), (WIDTH, c, 3)]:
            out = normal(BATCH, b, h, w)
            parameters = [normal(BATCH, a, h, w), normal(b, a, size, size), torch.randn(b)]
            for tensor in parameters[:1 if task == "pgd" else 3]:
                tensor.requires_grad_(task in ("train", "pgd"))
            jobs.append((parameters, size // 2, out))

    def step():
        for parameters, padding, out in jobs:
            y = F.conv2d(*parameters, padding=padding)
            if y.requires_grad:
                torch.autograd.grad(y, [p for p in parameters if p.requires_grad], out)
    return step


def memory(field):
    """A field of /proc/self/status in MiB: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))


def main(who, task, seconds=1.5):
    """Time `who` at `task`; normflows' memory settings come from the environment (see test_glow.py)."""
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    if who in ("ours", "split"):
        train._keep_freed_memory()
    before, times = memory("VmRSS"), []
    step = convolutions(task) if who == "convolutions" else contestant(who, task)
    for _ in range(3):
        step()
    stop, busy = perf_counter() + seconds, process_time()
    while len(times) < 5 or perf_counter() < stop:
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    # cores well below THREADS: something else was running, and the time says little
    cores = (process_time() - busy) / sum(times)
    print(json.dumps({"ms": 1000 * median(times), "mib": memory("VmHWM") - before, "cores": cores}))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Training: resumed equals uninterrupted, files are whole or absent, each run has its address."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lib import checkpoint as checkpoints
from lib import train as training
from lib.models import losses
from lib.models.glow import ConditionalGlow
from lib.train import Interrupted, random_crop, random_flip, train, trained

STEPS = 8
BUILD = partial(ConditionalGlow, (1, 4, 4), 3, grey_levels=17, levels=2, depth=1, width=4)
RUN = dict(steps=STEPS, batch=8, lr=1e-2, seed=3, augment=partial(random_crop, padding=1), ema=0.9, clip=10.0)


def data(n=30):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(17, (n, 1, 4, 4), generator=generator) / 16
    return images, torch.randint(3, (n,), generator=generator)


def build(seed=0):
    torch.manual_seed(seed)
    return BUILD()


def same(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def fresh(path):
    """A model as a new process has it; once there is a checkpoint its initial weights must not matter."""
    return build(99 if path.exists() else 0)


@pytest.fixture(scope="module")
def uninterrupted():
    return train(build(), losses.reweight, data(), **RUN)


class Stop(Exception):
    """Stands for a crash in the middle of training."""


def stopping_loss(after):
    """losses.reweight that raises Stop on call number `after`; the same name, so the same run."""
    calls, whole = [], losses.reweight

    def reweight(model, x, y):
        if len(calls) == after:
            raise Stop
        calls.append(1)
        return whole(model, x, y)

    reweight.__module__, reweight.__qualname__ = whole.__module__, whole.__qualname__
    return reweight


# --- the loop -------------------------------------------------------------------------------------

def test_training_lowers_the_loss():
    x, y = data()[0] * 0 + 0.5, data()[1]  # one image over and over: its density can grow
    model = build()
    before = losses.base(model, x, y)
    train(model, losses.base, (x, y), steps=60, batch=16, lr=1e-2)
    assert losses.base(model, x, y) < before - 1 and not model.training


def test_the_seed_decides_and_the_caller_s_generator_is_left_alone(uninterrupted):
    torch.manual_seed(11)
    state = torch.get_rng_state()
    model = build()
    torch.set_rng_state(state)
    again = train(model, losses.reweight, data(), **RUN)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(again, uninterrupted)
    assert not same(train(build(), losses.reweight, data(), **{**RUN, "seed": 4}), uninterrupted)


def test_every_epoch_shows_every_image_once():
    seen = torch.cat([training._batch(0, step, 32, 8, torch.device("cpu")) for step in range(8)]).reshape(2, 32)
    assert all(torch.equal(epoch.sort().values, torch.arange(32)) for epoch in seen)
    assert not torch.equal(*seen)


def test_average_of_weights_is_the_exponential_one():
    """One weight, loss w: Adam moves it by lr each step, so the averaged weight has a closed form."""
    class Point(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

    model = train(Point(), falling, data(), steps=3, lr=0.1, batch=1, ema=0.5)
    w = [-0.1, -0.2, -0.3]  # the gradient is 1, so Adam moves by lr
    expected = 0.5 * w[2] + 0.25 * w[1] + 0.125 * w[0]
    assert model.w.item() == pytest.approx(expected, abs=1e-6)


def falling(model, x, y):
    """Loss with gradient 1."""
    return model.w * 1.0


def diverging(model, x, y):
    """Loss that is no number."""
    return model(x).sum() * float("nan")


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0; lower lr, or set clip"):
        train(build(), diverging, data(), steps=2, batch=8)


def exploding(model, x, y):
    """A finite loss whose gradient is none: sqrt at zero."""
    return (model(x) * 0).sum().abs().sqrt()


def test_a_gradient_that_is_not_finite_stops_a_clipped_run():
    with pytest.raises(FloatingPointError, match=r"gradient is nan at step 0; lower lr"):
        train(build(), exploding, data(), steps=2, batch=8, clip=1.0)


class Seen(torch.nn.Module):
    """A model that keeps the batches it is asked about."""

    def __init__(self):
        super().__init__()
        self.weight, self.batches = torch.nn.Parameter(torch.zeros(())), []

    def forward(self, x, y):
        self.batches.append((x, y))
        return (x.mean((1, 2, 3)) * self.weight).mean()


def seen(model, x, y):
    return model(x, y)


def brighter(model, x, y):
    """An adversary that needs no gradient."""
    return x + 1


@pytest.mark.parametrize("hybrid", [False, True])
def test_adversarial_batches_hold_what_the_adversary_finds(hybrid):
    plain, other = Seen(), Seen()
    train(plain, seen, data(), steps=3, batch=8, seed=1)
    train(other, seen, data(), steps=3, batch=8, seed=1, adversary=brighter, hybrid=hybrid)
    for (x, y), (images, labels) in zip(plain.batches, other.batches, strict=True):
        assert torch.equal(images, torch.cat([x, x + 1]) if hybrid else x + 1)
        assert torch.equal(labels, torch.cat([y, y]) if hybrid else y)


def climbing(model, x, y):
    """One step of gradient ascent on -log p(x), the model as it stands."""
    x = x.clone().requires_grad_()
    gradient, = torch.autograd.grad(-model.log_prob(x).sum(), x)
    return (x.detach() + 0.1 * gradient.sign()).clamp(0, 1)


def test_an_adversary_meets_the_model_of_its_step_and_resumes(tmp_path):
    run = {**RUN, "adversary": climbing, "hybrid": True}
    whole = train(build(), losses.reweight, data(), **run)
    assert not same(whole, train(build(), losses.reweight, data(), **RUN))
    path = tmp_path / "m.safetensors"
    with pytest.raises(Stop):
        train(build(), stopping_loss(5), data(), checkpoint=path, save_seconds=0, **run)
    assert same(train(fresh(path), losses.reweight, data(), checkpoint=path, **run), whole)


def test_augmentations():
    x = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(200, 1, 1, 1)
    torch.manual_seed(0)
    crops, flips = random_crop(x, 1), random_flip(x)
    padded = torch.nn.functional.pad(x[:1], (1, 1, 1, 1), mode="replicate")[0, 0]

    def values(several):
        return {tuple(image.flatten().tolist()) for image in several}

    assert values(crops) == values(padded[i:i + 4, j:j + 4] for i in range(3) for j in range(3))
    assert values(flips) == values([x[0], x[0].flip(-1)])


# --- interruption and resumption ------------------------------------------------------------------

@given(st.lists(st.integers(0, STEPS - 1), min_size=1, max_size=3))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resumed_equals_uninterrupted(uninterrupted, tmp_path_factory, stops):
    """Crashes after any number of steps change no bit."""
    path = tmp_path_factory.mktemp("resume") / "m.safetensors"
    for after in stops:
        try:
            train(fresh(path), stopping_loss(after), data(), checkpoint=path, save_seconds=0, **RUN)
        except Stop:
            pass
    assert same(train(fresh(path), losses.reweight, data(), checkpoint=path, **RUN), uninterrupted)


CHILD = """
    import sys, time
    sys.path.insert(0, {tests!r})
    import test_train as t
    from lib.models import losses
    whole = losses.reweight
    def slow(model, x, y):
        time.sleep({pause})
        return whole(model, x, y)
    slow.__module__, slow.__qualname__ = whole.__module__, whole.__qualname__
    print("ready", flush=True)
    t.train(t.build(), slow, t.data(), checkpoint={path!r}, save_seconds=0, **t.RUN)
    print("done", flush=True)
"""


def child(path, pause):
    """Train in another process, `pause` seconds longer a step; it prints ready before it starts."""
    code = textwrap.dedent(CHILD.format(tests=os.path.dirname(__file__), path=str(path), pause=pause))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=environment)
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


def step_of(path):
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def wait_for(path, step, process):
    while step_of(path) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_killed_process_resumes(uninterrupted, tmp_path):
    path = tmp_path / "m.safetensors"
    process = child(path, 0.1)
    wait_for(path, 2, process)
    process.kill()
    output, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and "done" not in output, errors
    assert 2 <= step_of(path) < STEPS
    assert same(train(fresh(path), losses.reweight, data(), checkpoint=path, **RUN), uninterrupted)


@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signal_ends_the_step_saves_and_is_delivered(uninterrupted, tmp_path, number, raised):
    path, whole, calls = tmp_path / "m.safetensors", losses.reweight, []

    def reweight(model, x, y):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(number)
        return whole(model, x, y)

    reweight.__module__, reweight.__qualname__ = whole.__module__, whole.__qualname__
    # a shell may have started the tests in the background, where SIGINT is ignored
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)),
              signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    try:
        with pytest.raises(raised):
            train(build(), reweight, data(), checkpoint=path, **RUN)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert step_of(path) == len(calls) == 3
    assert same(train(fresh(path), losses.reweight, data(), checkpoint=path, **RUN), uninterrupted)


def test_time_limit_saves_and_says_so(uninterrupted, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(Interrupted, match=r"reached at step 1 of 8; the same call resumes from .*m.safet"):
        train(build(), losses.reweight, data(), checkpoint=path, max_minutes=0, **RUN)
    assert step_of(path) == 1
    assert same(train(build(1), losses.reweight, data(), checkpoint=path, **RUN), uninterrupted)
    with pytest.raises(Interrupted, match="without a checkpoint nothing is kept"):
        train(build(), losses.reweight, data(), max_minutes=0, **RUN)


def test_finished_file_is_loaded_and_holds_only_weights(uninterrupted, tmp_path):
    path = tmp_path / "m.safetensors"
    train(build(), losses.reweight, data(), checkpoint=path, **RUN)
    with safe_open(path, "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"model"}
    loaded = train(build(1), stopping_loss(0), data(), checkpoint=path, **RUN)
    assert same(loaded, uninterrupted) and loaded.initialised and not loaded.training


# --- files ----------------------------------------------------------------------------------------

def test_half_written_file_is_never_loaded(uninterrupted, tmp_path):
    path = tmp_path / "m.safetensors"
    (tmp_path / "m.safetensors.part").write_bytes(b"half of a file")
    assert same(train(build(), losses.reweight, data(), checkpoint=path, **RUN), uninterrupted)
    half = path.read_bytes()[:-100]
    path.write_bytes(half)
    with pytest.raises(ValueError, match="m.safetensors is damaged or no checkpoint"):
        train(build(), losses.reweight, data(), checkpoint=path, **RUN)
    assert path.read_bytes() == half


def full_disk(tensors, aside, metadata):
    aside.write_bytes(b"half")
    raise OSError("no space left")


def crash(*_):
    raise OSError("power cut")


@pytest.mark.parametrize("target, failure", [
    ("save_file", full_disk), ("os.fsync", crash), ("os.replace", crash)])
def test_failure_while_writing_keeps_the_old_file(tmp_path, monkeypatch, target, failure):
    path = tmp_path / "m.safetensors"
    model = build()
    checkpoints.save(path, {"steps": 8}, 1, model)
    old = path.read_bytes()
    monkeypatch.setattr(f"lib.checkpoint.{target}", failure)
    with pytest.raises(OSError):
        checkpoints.save(path, {"steps": 8}, 2, model)
    assert path.read_bytes() == old


@pytest.mark.parametrize("change, message", [
    (dict(build=partial(BUILD, width=8)), "model tensors .*"),
    (dict(build=partial(BUILD, grey_levels=16)), "model grey_levels is 17 there and 16 here"),
    (dict(build=partial(BUILD, prior="split")), "model prior is 'gaussian' there and 'split' here"),
    (dict(lr=0.5), "lr is 0.01 there and 0.5 here"), (dict(steps=9), "steps is 8 there and 9 here"),
    (dict(loss=losses.base), "loss is 'lib.models.losses.reweight' there and 'lib.models.losses.base' here"),
    (dict(data=data(31)), "data is"), (dict(augment=None), "augment is .* and None here"),
    (dict(adversary=brighter), "adversary is None there"),
])
def test_checkpoint_of_another_run_is_refused_and_kept(tmp_path, change, message):
    path = tmp_path / "m.safetensors"
    with pytest.raises(Interrupted):
        train(build(), losses.reweight, data(), checkpoint=path, max_minutes=0, **RUN)
    old = path.read_bytes()
    other = {"build": BUILD, "loss": losses.reweight, "data": data(), **RUN, **change}
    model, loss, images = other.pop("build")(), other.pop("loss"), other.pop("data")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"is of another run: .*{message}.*nothing was changed") as error:
        train(model, loss, images, checkpoint=path, **other)
    assert "\n" not in str(error.value) and path.read_bytes() == old
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())


def test_two_processes_on_one_file(uninterrupted, tmp_path, capfd):
    """The second waits, says for whom, and then finds the finished model instead of training."""
    path = tmp_path / "m.safetensors"
    process = child(path, 0.2)
    wait_for(path, 1, process)
    second = train(build(1), stopping_loss(0), data(), checkpoint=path, **RUN)
    assert "done" in process.communicate(timeout=60)[0]
    assert same(second, uninterrupted)
    assert f"m.safetensors is being trained by process {process.pid}; waiting" in capfd.readouterr().err


def test_waiting_ends_with_the_time_limit(tmp_path):
    path, done = tmp_path / "m.safetensors", threading.Event()
    with checkpoints.locked(path, time.monotonic()):
        thread_error = []

        def second():
            try:
                train(build(), losses.reweight, data(), checkpoint=path, max_minutes=0.001, **RUN)
            except TimeoutError as error:
                thread_error.append(str(error))
            done.set()

        threading.Thread(target=second).start()
        assert done.wait(30)
    assert f"still being trained by process {os.getpid()}" in thread_error[0]


# --- addresses ------------------------------------------------------------------------------------

def test_trained_models_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "models"))
    first = trained(BUILD, losses.base, data(), steps=2, batch=8)
    torch.manual_seed(123)
    assert same(trained(BUILD, losses.base, data(), steps=2, batch=8), first)
    files = list((tmp_path / "models").glob("*.safetensors"))
    assert len(files) == 1
    for change in (dict(seed=1), dict(lr=0.1), dict(augment=random_flip), dict(ema=0.5),
                   dict(adversary=brighter), dict(adversary=brighter, hybrid=True)):
        trained(BUILD, losses.base, data(), steps=2, batch=8, **change)
    trained(BUILD, losses.reweight, data(), steps=2, batch=8)
    trained(partial(BUILD, prior="split"), losses.base, data(), steps=2, batch=8)
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 9


def test_another_number_of_threads_is_another_address(tmp_path):
    """Sums over threads round differently, so a kept model of two threads is not that of one."""
    callables, threads = (build(), losses.base), torch.get_num_threads()
    try:
        found = {}
        for n in (1, 2):
            torch.set_num_threads(n)
            found[n] = [training._address(tmp_path, {}, device, callables) for device in ("cpu", "cuda")]
    finally:
        torch.set_num_threads(threads)
    assert found[1][0] != found[2][0] and found[1][1] == found[2][1] != found[1][0]


def test_an_edit_of_the_model_s_code_makes_a_new_address(tmp_path, monkeypatch):
    digests = {"lib.models.glow": "a"}
    monkeypatch.setattr(training, "module_digests", lambda modules: digests | {"asked": sorted(modules)})
    callables = (build(), losses.base, partial(random_crop, padding=1))
    before = training._address(tmp_path, {}, "cpu", callables)
    assert training._address(tmp_path, {}, "cpu", callables) == before
    digests["lib.models.glow"] = "b"
    assert training._address(tmp_path, {}, "cpu", callables) != before


def test_functions_outside_lib_count_by_their_code():
    assert training._name(losses.base) == "lib.models.losses.base"
    assert training._name(falling) != training._name(diverging)
    with pytest.raises(ValueError, match="must be named functions"):
        training._name(lambda x: x)
    assert training._name(partial(random_crop, padding=1)) != training._name(partial(random_crop, padding=2))


@pytest.mark.parametrize("change, message", [
    (dict(steps=0), "steps must be an integer >= 1, got 0"),
    (dict(batch=0), "batch must be an integer >= 1, got 0"),
    (dict(batch=31), r"batch must be at most the number of images \(30\), got 31"),
    (dict(lr=0.0), "lr must be > 0, got 0.0"), (dict(seed=-1), "seed must be an integer >= 0, got -1"),
    (dict(ema=1.0), r"ema must be in \(0, 1\), got 1.0"), (dict(clip=-1.0), "clip must be > 0, got -1.0"),
    (dict(hybrid=True), "hybrid must be False without an adversary, got True"),
    (dict(device="tpu"), "device must be one of cpu.* got 'tpu'"),
])
def test_bad_arguments_get_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message):
        train(build(), losses.base, data(), **{**RUN, **change})


def test_training_needs_none_of_the_runner_s_packages():
    code = ("import sys, lib.train, lib.models.glow, lib.models.losses\n"
            "assert not {'papermill', 'dask', 'distributed', 'foolbox', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)

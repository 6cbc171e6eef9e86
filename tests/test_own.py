"""A reader's own model and images: what is accepted, and the one line that each mistake gets."""
import importlib.util

import pytest
import torch
from PIL import Image

from lib import own
from lib.attacks.attack import attack
from lib.attacks.ddn import ddn
from lib.attacks.goals import escape
from lib.claims import project_root
from lib.data import load
from lib.detect import joint_scores
from lib.oddness import oddness

EXAMPLE = project_root() / "notebooks" / "your_model_example.py"
DIGITS = load("digits")
HEAD = "import torch\nfrom torch import nn\n"
LINEAR = "def build(data):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"


def scores(body, before=""):
    """A model file whose module's forward is `body`."""
    return (f"{HEAD}\n\nclass Model(nn.Module):\n    {before or 'pass'}\n\n    def forward(self, x):\n        {body}\n\n\n"
            "def build(data):\n    return Model()\n")


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Write a model file into the working folder; its name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return f"{name}:build"

    return write


def test_logits_become_log_posteriors(put):
    torch.manual_seed(3)
    model = own.load_model(put(HEAD + LINEAR), DIGITS)
    x = DIGITS.test.images[:5]
    z = joint_scores(model, x)
    assert model.space == "posterior" and not model.normalised and not model.training
    assert torch.allclose(z.exp().sum(1), torch.ones(5)) and torch.allclose(z, model.module(x).log_softmax(1))
    assert torch.allclose(oddness(model, z), -z.amax(1))
    with pytest.raises(ValueError, match="score needs a normalised model"):
        model.score(x)


def test_a_declared_model_is_taken_at_its_word(put):
    text = scores("return -(x.flatten(1)[:, :1] - torch.arange(10)).square()", 'space, normalised = "pixels", True')
    model = own.load_model(put(text), DIGITS)
    x = DIGITS.test.images[:5]
    z = joint_scores(model, x)
    assert (model.space, model.normalised, model.random) == ("pixels", True, False)
    assert torch.allclose(z, model.module(x)) and torch.allclose(oddness(model, z), -model.score(x))
    assert (model.classes, model.shape, model.grey_levels) == (10, (1, 8, 8), 17)


def test_it_can_be_attacked(put):
    model = own.load_model(put(HEAD + LINEAR), DIGITS, seed=1)
    x = DIGITS.test.images[:5]
    found = attack(ddn, escape(model, model(x).argmax(1)), x, steps=40)
    assert found.success.all() and (model(found.x).argmax(1) != model(x).argmax(1)).all()


@pytest.mark.parametrize("text, told", [
    ("nosuch.py:build", "model must name something that exists, 'nosuch.py' does not; looked for"),
    ("mine.py", "model must be PATH.py:FUNCTION, such as my_model.py:build, got 'mine.py'"),
    ("mine.txt:build", "model must be PATH.py:FUNCTION"), ("mine.py:not a name", "model must be PATH.py:FUNCTION"),
    ("mine.py:make", r"model must name a function of mine.py \(build\), got 'make'")])
def test_a_wrong_name_gets_one_line(put, text, told):
    put(HEAD + LINEAR)
    with pytest.raises(ValueError, match=told) as error:
        own.load_model(text, DIGITS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, told", [
    ("x = (", "model file mine.py raised SyntaxError"),
    ("import no_such_package", "model file mine.py raised ModuleNotFoundError: No module named 'no_such_package'"),
    ("def build(data):\n    raise RuntimeError('no\\nweights')", r"build\(data\) of mine.py raised RuntimeError: no weights \(mine.py, line 2\)"),
    ("def build():\n    return 1", r"build\(data\) of mine.py raised TypeError"),
    ("def build(data):\n    return 1", r"build\(data\) of mine.py must return a torch.nn.Module, got int"),
    (scores("return x.flatten(1)[:, :3]"), r"must return scores of shape \(images, classes\) = \(18, 10\), got \(18, 3\)"),
    (scores("return x.sum()"), r"must return scores of shape .* got \(\)"),
    (scores("return [x]"), r"must return scores of shape .* got list"),
    (scores("return x @ x.new_zeros(3, 10)"), r"forward\(x\) on images \(18, 1, 8, 8\) raised RuntimeError: .*multiplied"),
    (scores("return (x.flatten(1)[:, :10] - 0.5).log()"), "scores must be finite, got NaN or infinity for .* of 18 images"),
    (scores("return x.flatten(1)[:, :10].detach()"), "scores must be differentiable in the images"),
    (scores("return x.flatten(1)[:, :10] + torch.rand(10)"), "must answer the same images alike, or the module declare random = True"),
    (scores("return x.flatten(1)[:, :10]", 'space = "pixel"'), "space must be one of pixels, features, .* got 'pixel'")])
def test_a_bad_model_gets_one_line(put, text, told):
    with pytest.raises(ValueError, match=told) as error:
        own.load_model(put(text), DIGITS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("x, told", [
    (torch.full((2, 1, 8, 8), -0.2), r"x must lie in \[0, 1\], got values from -0.2 to -0.2"),
    (torch.full((2, 1, 8, 8), 255.), r"x must lie in \[0, 1\], got values from 255 to 255"),
    (torch.full((2, 1, 8, 8), torch.nan), r"x must lie in \[0, 1\], got values from nan"),
    (torch.zeros(2, 3, 8, 8), r"x must be images \(n, \*\(1, 8, 8\)\), got \(2, 3, 8, 8\)")])
def test_a_bad_input_gets_one_line(put, x, told):
    model = own.load_model(put(HEAD + LINEAR), DIGITS)
    with pytest.raises(ValueError, match=told):
        model(x)


def test_paths_count_from_where_the_command_was_given(put, tmp_path, monkeypatch):
    put(HEAD + LINEAR)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for i in range(2):
                Image.new("L", (8, 8), 100 * i + (label == "b")).save(tmp_path / "images" / part / label / f"{i}.png")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="data must name something that exists, 'images' does not"):
        own.load_data("folder:images")
    monkeypatch.setenv("REPRO_FROM", str(tmp_path))
    assert own.locate("mine.py:build") == (tmp_path / "mine.py", "build")
    assert own.load_data("folder:images").classes == ("a", "b")
    assert own.locate("your_model_example.py:build")[0] == EXAMPLE
    assert own.load_data("digits").name == "digits"


def test_the_examples_classify_and_the_density_is_one():
    accuracy = {}
    for name in ("build", "logits"):
        model = own.load_model(f"your_model_example.py:{name}", DIGITS)
        accuracy[name] = (joint_scores(model, DIGITS.test.images).argmax(1) == DIGITS.test.labels).float().mean()
    assert min(accuracy.values()) > .85
    spec = importlib.util.spec_from_file_location("example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # on two pixels of very many grey levels, where u hardly counts, the density of v integrates to one over a wide square
    toy = example.KernelDensity(torch.rand(6, 1, 1, 2), torch.tensor([0, 1, 0, 1, 0, 0]), 2**20, .05)
    side = torch.linspace(-1, 2, 301)
    mass = toy(torch.cartesian_prod(side, side).view(-1, 1, 1, 2)).logsumexp(1).exp().sum() * .01**2
    assert mass.item() == pytest.approx(1, abs=1e-3)

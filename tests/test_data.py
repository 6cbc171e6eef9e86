"""The data sets: shapes, grid, disjoint splits, downloads that fail, folders that are wrong."""

import itertools
import struct
import urllib.request
from urllib.error import URLError

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from lib import bundled as bundled_data
from lib import data, download
from lib.data import catalogue, load

BUNDLED = ("digits", "photos", "bg-digits", "bg-digits-0", "bg-digits-1", "bg-digits-5")
PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def bundled():
    return {name: load(name) for name in BUNDLED}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache folder."""
    def refuse(*args, **kwargs):
        raise URLError("no network in this test")
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setenv("REPRO_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache"


def codes(split, levels):
    return (split.images.double() * (levels - 1)).round()


@pytest.mark.parametrize("name", BUNDLED)
def test_images_lie_on_the_grid_of_grey_levels(bundled, name):
    d = bundled[name]
    row = next(r for r in catalogue() if r["name"] == name)
    assert row["images"] == tuple(len(getattr(d, p).images) for p in PARTS)
    assert (row["size"], row["levels"], row["classes"]) == (d.shape, d.levels, len(d.classes))
    for split in (*(getattr(d, p) for p in PARTS), *d.foreign.values()):
        assert split.images.dtype == torch.float32 and split.labels.dtype == torch.int64
        assert split.images.shape[1:] == d.shape and split.images.is_contiguous()
        assert len(split.images) == len(split.labels) == len(split.blocks)
        assert split.images.min() >= 0 and split.images.max() <= 1
        assert torch.equal((codes(split, d.levels).float() / (d.levels - 1)), split.images)
    for p in PARTS:
        assert getattr(d, p).labels.unique().tolist() == list(range(len(d.classes)))


@pytest.mark.parametrize("name", BUNDLED)
def test_no_image_is_in_two_splits(bundled, name):
    d = bundled[name]
    seen = {}
    for part, split in [*((p, getattr(d, p)) for p in PARTS), *d.foreign.items()]:
        for image in codes(split, d.levels).byte().numpy():
            assert seen.setdefault(image.tobytes(), part) == part


def test_digits_are_all_there_and_split_by_writer(bundled):
    from sklearn.datasets import load_digits
    images = load_digits().images
    d = bundled["digits"]
    assert sum(len(getattr(d, p).images) for p in PARTS) == len(images) == 1797
    assert np.array_equal(d.train.images[:, 0].numpy() * 16, images[:1157])
    # A new run of the writers' label sequence starts where training ends.
    labels = load_digits().target
    assert np.array_equal(labels[1157:1187], np.tile(np.arange(10), 3))
    assert d.test.images[2, 0].numpy().tolist() == (images[1160] / 16).tolist()  # 1159 is validation


def test_photo_patches_come_from_their_blocks(bundled):
    """Each patch is found in the 64-pixel square of the photograph that its block id names."""
    d, photographs = bundled["photos"], bundled_data._photographs()
    for part in PARTS:
        split = getattr(d, part)
        images = codes(split, 256).byte().numpy()
        for image, label, block in list(zip(images, split.labels, split.blocks))[::7]:
            photograph = photographs[d.classes[label]]
            k, (height, width, _) = int(block) - 48 * int(label), photograph.shape
            top, left = (height - 384) // 2 + 64 * (k // 8), (width - 512) // 2 + 64 * (k % 8)
            square = photograph[top:top + 64, left:left + 64].transpose(2, 0, 1)
            places = [square[:, i:i + 16, j:j + 16] for i in range(0, 64, 16) for j in range(0, 64, 16)]
            assert any(np.array_equal(image, place) for place in places)
    blocks = [set(getattr(d, p).blocks.tolist()) for p in PARTS]
    assert [len(b) for b in blocks] == [240, 48, 96] and len(set.union(*blocks)) == 8 * 48


def test_first_test_images_are_a_fair_sample(bundled):
    photos, digits = bundled["photos"].test, bundled["digits"].test
    assert torch.bincount(photos.labels[:96]).min() >= 11
    assert len(photos.blocks[:96].unique()) >= 94
    assert torch.bincount(digits.labels[:100]).min() >= 6


def test_foreign_photographs_are_no_class(bundled):
    d = bundled["photos"]
    assert set(d.foreign) == {"chelsea", "retina"} and not set(d.foreign) & set(d.classes)
    assert [len(d.foreign[k].images) for k in ("chelsea", "retina")] == [448, 768]
    assert all((s.labels == -1).all() for s in d.foreign.values())
    # `retina` is halved by averaging, then (705 - 384) // 2 = 160 rows and 96 columns are cut off.
    square = skimage.data.retina()[320:322, 192:194].astype(float).mean((0, 1))
    assert np.abs(d.foreign["retina"].images[0, :, 0, 0].numpy() * 255 - square).max() <= 0.5001
    # `retina` is the smooth one: neighbouring pixels differ less than in the photographs of the classes.
    step = {k: (x[..., 1:] - x[..., :-1]).abs().mean().item()
            for k, x in {"retina": d.foreign["retina"].images, "classes": d.test.images}.items()}
    assert step["retina"] < step["classes"] / 2


def test_bg_digits_put_the_digit_in_front(bundled):
    digits = bundled["digits"]
    rough = {}
    for name in ("bg-digits-5", "bg-digits-1", "bg-digits-0"):
        d = bundled[name]
        for part in PARTS:
            front, both = getattr(digits, part), getattr(d, part)
            assert torch.equal(front.labels, both.labels) and (both.images >= front.images).all()
            assert (both.images > front.images).float().mean() > 0.3
            assert set(both.blocks.tolist()) <= set(getattr(bundled["photos"], part).blocks.tolist())
        paper = digits.train.images == 0
        step = (d.train.images[..., 1:] - d.train.images[..., :-1]).abs()
        rough[name] = step[paper[..., 1:] & paper[..., :-1]].mean().item()
    assert rough["bg-digits-5"] < rough["bg-digits-1"] < rough["bg-digits-0"]
    assert bundled["bg-digits"].fingerprint == bundled["bg-digits-0"].fingerprint


def test_seed_moves_backgrounds_only(bundled):
    other = load("bg-digits", seed=1)
    assert load("bg-digits", seed=1).fingerprint == other.fingerprint != bundled["bg-digits"].fingerprint
    assert torch.equal(other.test.labels, bundled["bg-digits"].test.labels)
    assert load("photos", seed=1).fingerprint == bundled["photos"].fingerprint


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load("bg-digits", seed=5)
    assert torch.equal(before, torch.get_rng_state())


def test_fingerprint_sees_every_part(bundled):
    from dataclasses import replace
    d = bundled["digits"]
    image, label = d.test.images.clone(), d.validation.labels.clone()
    image[-1, 0, 0, 0] += 1 / 16
    label[-1] += 1
    others = [replace(d, test=d.test._replace(images=image)), replace(d, classes=d.classes[::-1]),
              replace(d, validation=d.validation._replace(labels=label)), replace(d, foreign={"a": d.test}),
              replace(d, train=d.train._replace(blocks=d.train.blocks // 2))]
    assert len({d.fingerprint, *(o.fingerprint for o in others)}) == 6
    assert replace(d, name="other").fingerprint == d.fingerprint


@pytest.mark.parametrize("seed", [-1, 0.5, "0"])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="seed must be an integer >= 0"):
        load("digits", seed=seed)


@pytest.mark.parametrize("name", ["imagenet", "", "Digits", "bg-digits-2", 7])
def test_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError) as error:
        load(name)
    message = str(error.value)
    assert repr(name) in message and "folder:PATH" in message and "\n" not in message
    assert all(row["name"] in message for row in catalogue())


# --- downloads ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", data.DOWNLOADS)
def test_without_a_network_the_error_says_what_to_put_where(offline, name):
    with pytest.raises(FileNotFoundError) as error:
        load(name)
    message, spec = str(error.value), data.DOWNLOADS[name]
    assert name in message and str(offline / spec.folder) in message and "\n" not in message
    assert all(file in message for file in spec.files)


def test_a_corrupt_download_is_not_accepted(offline):
    offline.mkdir()
    (offline / "cifar-10-python.tar.gz").write_bytes(b"not the archive")
    with pytest.raises(FileNotFoundError, match="cifar10"):
        load("cifar10")


def put_cifar10(folder, side=32):
    """Ten classes of two training and two test images, unpacked."""
    rng = np.random.default_rng(0)
    for part, name in itertools.product(("train", "test"), "abcdefghij"):
        (folder / "cifar10" / part / name).mkdir(parents=True, exist_ok=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / "cifar10" / part / name / f"{i}.png")


def put_mnist(folder):
    """30 training and 5 test images as MNIST downloads them; {"train": codes, "t10k": codes}."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (n, 28, 28), np.uint8) for part, n in (("train", 30), ("t10k", 5))}
    for part, x in images.items():  # the IDX format: magic number, sizes, bytes
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *x.shape) + x.tobytes())
        labels = bytes(i % 5 for i in range(len(x)))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, len(x)) + labels)
    return images


def test_images_that_lie_unpacked_stand_for_the_download(offline):
    put_cifar10(offline)
    d = load("cifar10")
    assert (d.name, d.shape, d.classes, d.levels) == ("cifar10", (3, 32, 32), tuple("abcdefghij"), 256)
    assert [len(part.images) for part in (d.train, d.validation, d.test)] == [10, 10, 20]
    row, = (r for r in catalogue() if r["name"] == "cifar10")
    assert row["where"] == str(offline / "cifar10")
    put_cifar10(offline, side=16)
    with pytest.raises(ValueError, match=r"data 'cifar10' must be 10 classes of images \(3, 32, 32\), found 10 of \(3, 16, 16\)"):
        load("cifar10")


def test_mnist_is_padded_and_its_last_tenth_is_validation(offline):
    images = put_mnist(offline)
    d = load("mnist")
    assert [len(getattr(d, p).images) for p in PARTS] == [27, 3, 5] and len(d.classes) == 10
    assert d.shape == (1, 32, 32) and d.levels == 256
    assert np.array_equal(d.validation.images[:, 0, 2:30, 2:30].numpy() * 255, images["train"][27:])
    assert d.train.images.count_nonzero() == d.train.images[..., 2:30, 2:30].count_nonzero()
    assert d.test.labels.tolist() == [0, 1, 2, 3, 4]
    assert next(r for r in catalogue() if r["name"] == "mnist")["where"] == str(offline / "MNIST" / "raw")


def test_bg_mnist_puts_cifar10_behind_mnist(offline):
    put_mnist(offline)
    put_cifar10(offline)
    mnist, rough = load("mnist"), []
    for name in ("bg-mnist-5", "bg-mnist-1", "bg-mnist-0"):
        d = load(name)
        for part in PARTS:
            front, both = getattr(mnist, part), getattr(d, part)
            assert torch.equal(front.labels, both.labels) and (both.images >= front.images - 1e-6).all()
            assert both.images.count_nonzero() == both.images[..., 2:30, 2:30].count_nonzero()
        # each of the ten backgrounds stands behind two or three of the 27 digits
        assert set(torch.bincount(d.train.blocks, minlength=10).tolist()) == {2, 3}
        black = mnist.train.images[..., 2:30, 2:30] < 0.05
        behind = d.train.images[..., 2:30, 2:30]
        rough.append((behind[..., 1:] - behind[..., :-1]).abs()[black[..., 1:] & black[..., :-1]].mean().item())
        assert d.levels == 256 and d.fingerprint == load(name).fingerprint != load(name, seed=1).fingerprint
    assert rough[0] < rough[1] < rough[2]


@pytest.mark.parametrize("name, source", [("cifar10", "CIFAR10"), ("svhn", "SVHN")])
def test_channels_come_first(offline, monkeypatch, name, source):
    from torchvision import datasets
    rgb = np.random.default_rng(0).integers(0, 256, (20, 3, 32, 32), np.uint8)

    class Stub:
        def __init__(self, root, download, **choice):
            assert download and set(choice) == {"split" if source == "SVHN" else "train"}
            self.data = rgb if source == "SVHN" else rgb.transpose(0, 2, 3, 1)
            self.labels = self.targets = list(range(10)) * 2
            self.classes = list("abcdefghij")

        def __len__(self):
            return len(self.data)

    monkeypatch.setattr(datasets, source, Stub)
    d = load(name)
    assert np.array_equal((d.train.images * 255).round().byte().numpy(), rgb[:18])
    assert len(d.validation.images) == 2 and d.validation.labels.tolist() == [8, 9]


@pytest.mark.parametrize("name", data.SCENES)
def test_scenes_that_cannot_be_had_say_why_and_where_to_put_them(offline, name, monkeypatch):
    from torchvision import datasets

    def refuse(*args, **kwargs):
        raise RuntimeError("quota\nexceeded")
    monkeypatch.setattr(datasets, "CelebA", refuse)
    with pytest.raises(FileNotFoundError, match="could not be had") as error:
        load(name)
    message = str(error.value)
    assert name in message and str(offline / data.SCENES[name][1]) in message and "\n" not in message


@pytest.mark.parametrize("name, source", [("celeba", "CelebA"), ("lsun", "LSUN")])
def test_scenes_are_the_middle_square_of_one_class(offline, monkeypatch, name, source):
    from torchvision import datasets
    (offline / data.SCENES[name][1]).mkdir(parents=True)
    wide = Image.new("RGB", (256, 128), "blue")
    wide.paste((255, 0, 0), (64, 0, 192, 128))

    class Stub(list):
        def __init__(self, root, **choice):
            super().__init__([(wide, 0)] * 9)

    monkeypatch.setattr(datasets, source, Stub)
    with pytest.raises(ValueError, match=f"data '{name}' needs at least 22400 images, found 9"):
        load(name)
    monkeypatch.setattr(download, "COUNTS", (4, 3, 2))
    d = load(name)
    assert [len(getattr(d, p).images) for p in PARTS] == [4, 3, 2] and d.shape == (3, 64, 64)
    assert d.classes == (name,) and not d.test.labels.any()
    assert (d.test.images[:, 0] == 1).all() and not d.test.images[:, 1:].any()     # red only: no blue margin


def test_catalogue_downloads_nothing(offline):
    rows = catalogue()
    assert not offline.exists()
    assert all("needs download" in r["where"] and str(offline) in r["where"]
               for r in rows if r["name"] in data.DOWNLOADS)


# --- folders ------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """Two classes of 12 training and 3 test images, (3, 4, 6)."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("test", 3)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
                image.save(tmp_path / part / name / f"{i:02}.png")
    return tmp_path


def test_folder_loads(folder):
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (folder / "train" / ".hidden").mkdir()
    d = load(f"folder:{folder}")
    assert [len(getattr(d, p).images) for p in PARTS] == [22, 2, 6]
    assert d.shape == (3, 4, 6) and d.levels == 256 and d.classes == ("cat", "dog")
    assert d.test.labels.tolist() == [0, 1, 0, 1, 0, 1]
    last = np.asarray(Image.open(folder / "train" / "dog" / "11.png")).transpose(2, 0, 1)
    assert np.array_equal((d.validation.images[1] * 255).round().byte().numpy(), last)


def _grey(folder):
    for path in folder.rglob("*.png"):
        Image.open(path).convert("L").save(path)


def test_folder_of_grey_images(folder):
    _grey(folder)
    assert load(f"folder:{folder}").shape == (1, 4, 6)


def _drop(path):
    for sub in sorted(path.rglob("*"), reverse=True):
        sub.rmdir() if sub.is_dir() else sub.unlink()
    path.rmdir()


def _save(path, size, mode="RGB"):
    Image.new(mode, size).save(path)


DAMAGE = {
    "missing part": (lambda f: _drop(f / "test"), "data folder not found: {f}/test"),
    "empty part": (lambda f: [_drop(f / "train" / c) for c in ("cat", "dog")],
                   "data folder is empty.*{f}/train"),
    "empty class": (lambda f: (_drop(f / "test" / "dog"), (f / "test" / "dog").mkdir()),
                    "holds no images: {f}/test/dog"),
    "broken": (lambda f: (f / "train" / "dog" / "05.png").write_bytes(b"\x89PNG no"),
               "broken image: {f}/train/dog/05.png"),
    "truncated": (lambda f: (f / "test" / "dog" / "02.png").write_bytes(
        (f / "test" / "dog" / "02.png").read_bytes()[:60]), "broken image: {f}/test/dog/02.png"),
    "mixed sizes": (lambda f: _save(f / "test" / "cat" / "01.png", (8, 8)),
                    "one size and mode: {f}/train/cat/00.png is .3, 4, 6., {f}/test/cat/01.png is .3, 8, 8."),
    "mixed modes": (lambda f: _save(f / "train" / "cat" / "03.png", (6, 4), "L"),
                    "one size and mode: {f}/train/cat/00.png .* {f}/train/cat/03.png is .1, 4, 6."),
    "transparent": (lambda f: _save(f / "train" / "cat" / "03.png", (6, 4), "RGBA"),
                    "got mode RGBA: {f}/train/cat/03.png"),
    "one class": (lambda f: [_drop(f / p / "dog") for p in ("train", "test")],
                  "two classes, found only 'cat'"),
    "classes differ": (lambda f: (f / "test" / "dog").rename(f / "test" / "bird"),
                       "same classes, 'bird' is in one only"),
    "one image": (lambda f: [(f / "train" / "dog" / f"{i:02}.png").unlink() for i in range(1, 12)],
                  "at least 2 images.*: {f}/train/dog"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_folder_damage_is_named_in_one_line(folder, damage):
    hurt, message = DAMAGE[damage]
    hurt(folder)
    with pytest.raises(ValueError, match=message.format(f=folder)) as error:
        load(f"folder:{folder}")
    assert "\n" not in str(error.value)

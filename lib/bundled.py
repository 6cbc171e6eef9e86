"""Data sets made of what ships inside our dependencies: no network, no download."""
import numpy as np

from lib.dataset import Data, Split, split_of

BLOCK, PATCH = 64, 16           # side of a photograph's block and of a patch, in pixels
ROWS, COLUMNS = 6, 8            # blocks taken from the middle of each photograph
FOREIGN = ("chelsea", "retina")


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8), 17 grey levels.

    The images are stored writer by writer: the labels repeat one sequence of about 130 digits. As in MNIST
    the held-out images come from other writers than the training images: the first 1,157 images (nine runs
    of the sequence) are training. Of the rest every third is validation, the others are test, so that a
    threshold calibrated on validation meets the same five runs at test time. Near-duplicates by one writer
    therefore do occur between validation and test, but not between training and test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    codes, labels = bunch.images[:, None].astype(np.uint8), bunch.target
    held_out = np.arange(1157, len(codes))
    parts = (np.arange(1157), held_out[2::3], held_out[np.arange(len(held_out)) % 3 != 2])
    return Data("digits", *(split_of(codes[p], 17, labels[p]) for p in parts), tuple("0123456789"), 17)


def _photographs() -> dict[str, np.ndarray]:
    """The ten colour photographs (h, w, 3), uint8, that lie inside scikit-image and scikit-learn.

    All at full size, where 16 pixels show texture, but for `retina`, 1,411 pixels wide: at full size 41 % of
    its 16x16 patches are flat (standard deviation below 2 grey levels), halved 25 %.
    `motorcycle_right` is not used: it shows what `motorcycle_left` shows, so its patches are near-duplicates.
    """
    from skimage import data
    from sklearn.datasets import load_sample_image

    retina = data.retina()[:1410, :1410].reshape(705, 2, 705, 2, 3).mean((1, 3)).round().astype(np.uint8)
    return {
        "astronaut": data.astronaut(), "china": load_sample_image("china.jpg"), "coffee": data.coffee(),
        "flower": load_sample_image("flower.jpg"), "hubble": data.hubble_deep_field(),
        "ihc": data.immunohistochemistry(), "motorcycle": data.stereo_motorcycle()[0],
        "rocket": data.rocket(), "chelsea": data.chelsea(), "retina": retina,
    }


def _patches(photograph: np.ndarray) -> np.ndarray:
    """Patches (blocks, 16, 3, 16, 16) of the blocks in the middle of a photograph (h, w, 3)."""
    height, width, _ = photograph.shape
    rows, columns = min(ROWS, height // BLOCK), min(COLUMNS, width // BLOCK)
    top, left = (height - rows * BLOCK) // 2, (width - columns * BLOCK) // 2
    middle = photograph[top:top + rows * BLOCK, left:left + columns * BLOCK]
    k = BLOCK // PATCH
    grid = middle.reshape(rows, k, PATCH, columns, k, PATCH, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return grid.reshape(rows * columns, k * k, 3, PATCH, PATCH)


def photos() -> Data:
    """Colour patches (3, 16, 16) of eight photographs, 256 grey levels; the photograph is the class.

    The middle 384 x 512 pixels of each photograph are cut into 6 x 8 blocks of 64 pixels, each block into 16
    patches; a block belongs to one split whole: in every row of eight, five blocks are training, one is
    validation, two are test. That makes 768 patches a class. A patch that occurs more than once is left out
    (the black corner of `astronaut`, white spots in `ihc`), or train and test would share it.
    The order runs over classes first, then blocks, then places in a block: the first 96 test images are one
    from each of 96 blocks, but for patches left out. `foreign` holds two photographs no model sees:
    `chelsea`, a photograph like the others, and `retina`, a smooth one (likelihoods often favour those).
    """
    photographs = _photographs()
    classes = tuple(name for name in photographs if name not in FOREIGN)
    patches = np.stack([_patches(photographs[name]) for name in classes])  # (8, 48, 16, 3, 16, 16)
    block = np.arange(ROWS * COLUMNS)
    lane = (block % COLUMNS + 3 * (block // COLUMNS)) % COLUMNS            # each lane once in every row
    flat = patches.reshape(-1, 3 * PATCH * PATCH)
    _, inverse, counts = np.unique(flat, axis=0, return_inverse=True, return_counts=True)
    single = (counts[inverse.reshape(-1)] == 1).reshape(patches.shape[:3])

    def part(lanes) -> Split:
        axes = np.arange(16), block[np.isin(lane, lanes)], np.arange(len(classes))
        place, chosen, label = np.meshgrid(*axes, indexing="ij")
        keep = single[label, chosen, place]
        place, chosen, label = place[keep], chosen[keep], label[keep]
        return split_of(patches[label, chosen, place], 256, label, label * len(block) + chosen)

    def foreign(photograph) -> Split:
        cut = np.concatenate(_patches(photograph).swapaxes(0, 1))
        return split_of(cut, 256, np.full(len(cut), -1), np.arange(len(cut)) % (len(cut) // 16))

    return Data("photos", part([1, 3, 5, 6, 7]), part([2]), part([0, 4]), classes, 256,
                {name: foreign(photographs[name]) for name in FOREIGN})

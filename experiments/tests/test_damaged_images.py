"""Damaged pictures, columns and classes are one sentence each."""

import numpy as np
import pytest
from pictures import NAMES, datasets, draw, make, numbered, png, save
from sparseout_experiments.data import images
from sparseout_experiments.data.hub import DataError

pytestmark = pytest.mark.usefixtures("hub_cache")


def broken_sizes(folder):
    make(folder, numbered(12), numbered(3, size=(4, 4)))


def broken_columns(folder):
    make(folder, numbered(12), numbered(3), feature=datasets.Value("float32"))


def broken_depth(folder):
    make(folder, np.zeros((12, 4, 4), np.uint16), np.zeros((2, 4, 4), np.uint16))


def broken_classes(folder):
    make(folder, numbered(12), numbered(3))
    save(folder, "test", [png(array) for array in numbered(2)], {"label": [0, None]}, {"label": NAMES})


def broken_pictures(folder):
    make(folder, numbered(12), numbered(3))
    whole = png(numbered(1)[0])["bytes"]
    save(folder, "test", [{"bytes": whole[:-40], "path": None}], {"label": [0]}, {"label": NAMES})


def missing_pictures(folder):
    make(folder, numbered(12), numbered(3))
    save(folder, "test", [None], {"label": [0]}, {"label": NAMES})


def no_class(folder, kind="float32", values=(0, 1)):
    for split in ("train", "test"):
        labels = {"label": [values[n % 2] for n in range(12)]}
        save(folder, split, [png(array) for array in numbered(12)], labels, {"label": datasets.Value(kind)})


def empty_split(folder):
    (folder / "train" / "a").mkdir(parents=True)
    (folder / "train" / "a" / "0.png").write_bytes(png(numbered(1)[0])["bytes"])
    (folder / "test").mkdir()


def two_classes(folder):
    draw(folder, dict.fromkeys(("train/a", "train/b", "test/a", "test/b"), 6))


def empty_class(folder):
    two_classes(folder)
    (folder / "train" / ".cache").mkdir()  # of no class
    (folder / "train" / "c").mkdir()
    (folder / "train" / "c" / ".DS_Store").touch()


def link_to_an_empty_class(folder):
    two_classes(folder)
    (folder / "elsewhere").mkdir()
    (folder / "test" / "c").symlink_to(folder / "elsewhere")


def link_to_nothing(folder):
    two_classes(folder)
    (folder / "test" / "b" / "6.png").symlink_to(folder / "gone.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_class, "write it as integers or texts"),
        (lambda folder: no_class(folder, "int64", (4, 4)), "has pictures of one class only"),
        (empty_split, "The folder .*test' is empty: put the files of its split there"),
        (empty_class, "The folder .*train/c' is empty: put the files of its class there, or remove it"),
        (link_to_an_empty_class, "The folder .*test/c' is empty"),
        (link_to_nothing, "test/b/6.png' is a link to a file that is not there: bring it back, or remove the link"),
        (broken_sizes, "should be of one size, but there are 4 x 4 and 4 x 5: resize them"),
        (broken_columns, "one column of classes .*, but has the columns picture, label: write it as"),
        (broken_depth, "more than 8 bits a channel .*: convert the pictures to 8 bits first"),
        (broken_classes, "The split test of .* has pictures without a class"),
        (broken_pictures, "Picture 0 of the split test of .* cannot be read .*: replace it or leave it out"),
        (missing_pictures, "Picture 0 of the split test of .* cannot be read"),
    ],
)
def test_damaged_data_are_one_sentence(tmp_path, spoil, words):
    spoil(tmp_path)
    with pytest.raises(DataError, match=words) as error:
        images.load(str(tmp_path))
    assert "\n" not in str(error.value)

"""Pictures: from where, which of them, and in which colours."""

import numpy as np
import pytest
import torch
from pictures import datasets, draw, make, numbered, png, save
from PIL import Image
from sparseout_experiments.config import resolve
from sparseout_experiments.data import images, shuffled_digits
from sparseout_experiments.data.hub import DataError
from sparseout_experiments.tasks import DistributedContext, build
from sparseout_experiments.training.rng import Rng

pytestmark = pytest.mark.usefixtures("hub_cache")


def numbers(part):
    return part.pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_come_back_exactly_each_with_its_class(tmp_path, channels):
    train, test = numbered(20, channels=channels), numbered(6, channels=channels, start=100)
    data = images.load(make(tmp_path, train, test))
    assert data.classes == 3
    assert data.train.pixels.shape == (18, channels, 5, 4)
    assert data.train.pixels.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert sorted(numbers(data.train) + numbers(data.valid)) == list(range(20))
    assert numbers(data.test) == list(range(100, 106))
    for part, first, pixels in ((data.train, 0, train), (data.valid, 0, train), (data.test, 100, test)):
        for picture, label, number in zip(part.pixels, part.labels, numbers(part), strict=True):
            original = torch.from_numpy(pixels[number - first]).view(5, 4, channels)
            assert torch.equal(picture.permute(1, 2, 0), original)
            assert label == (number - first) % 2


def test_a_smaller_part_lies_within_a_larger_one(tmp_path):
    source = make(tmp_path, numbered(40), numbered(10, start=100))
    whole = images.load(source, valid_size=8)
    small, smaller = (images.load(source, valid_size=8, train_size=n, test_size=n // 2) for n in (12, 6))
    assert numbers(small.train) == numbers(whole.train)[:12]
    assert numbers(smaller.train) == numbers(whole.train)[:6]
    assert set(numbers(smaller.test)) < set(numbers(small.test)) < set(numbers(whole.test))
    assert numbers(small.valid) == numbers(smaller.valid) == numbers(whole.valid)
    assert not set(numbers(whole.valid)) & set(numbers(whole.train))
    for part in (whole.train, small.test):
        assert numbers(part) != sorted(numbers(part))


def test_the_split_is_decided_by_its_seed_alone(tmp_path):
    source = make(tmp_path, numbered(40), numbered(10, start=100))
    first = numbers(images.load(source).valid)
    torch.manual_seed(99)
    assert numbers(images.load(source).valid) == first
    assert numbers(images.load(source, split_seed=1).valid) != first


def test_digits_are_those_of_the_other_experiments():
    data = images.load("digits")
    rows = shuffled_digits()[0].flatten(1)
    assert len(rows.unique(dim=0)) == 1797  # no digit twice: none is trained and tested on
    assert torch.equal(data.test.pixels.flatten(1), (rows[:450] * 255).round().byte())
    assert [len(part.labels) for part in data[:3]] == [1213, 134, 450]
    together = torch.cat([data.train.pixels, data.valid.pixels]).flatten(1).sort(0).values
    assert torch.equal(together, (rows[450:] * 255).round().byte().sort(0).values)
    assert data.classes == 10
    # The classes stand beside their pictures: the nearest mean of a class is right about nine times in ten.
    means = torch.stack([data.train.pixels[data.train.labels == digit].float().mean(0) for digit in range(10)])
    nearest = torch.cdist(data.test.pixels.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.8


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_size": 1214}, "expected `train_size` to be from 1 to 1213, which the data allow, but got 1214"),
        ({"valid_size": 0}, "expected `valid_size` to be from 1 to 1346, which the data allow, but got 0"),
        ({"test_size": 451}, "expected `test_size` to be from 1 to 450, which the data allow, but got 451"),
    ],
)
def test_sizes_that_the_data_do_not_allow(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        images.load("digits", **options)


def test_names_stand_for_ids_of_the_hub_unless_a_folder_is_there(tmp_path, monkeypatch):
    asked = []

    def load(source):
        asked.append(source)
        raise DataError("none")

    monkeypatch.setattr(images.hub, "load", load)
    monkeypatch.chdir(tmp_path)
    for source in ("mnist", "cifar10", "cifar100", "somebody/else"):
        with pytest.raises(DataError):
            images.load(source)
    (tmp_path / "mnist").mkdir()
    with pytest.raises(DataError):
        images.load("mnist")
    assert asked == ["ylecun/mnist", "uoft-cs/cifar10", "uoft-cs/cifar100", "somebody/else", "mnist"]


def test_of_two_columns_of_classes_the_fine_one_is_taken(tmp_path):
    both = {"fine_label": datasets.ClassLabel(num_classes=100), "coarse_label": datasets.ClassLabel(num_classes=20)}
    for split in ("train", "test"):
        columns = {"coarse_label": [1] * 12, "fine_label": [42] * 12}
        save(tmp_path, split, [png(array) for array in numbered(12)], columns, both)
    data = images.load(str(tmp_path))
    assert data.classes == 100
    assert set(data.test.labels.tolist()) == {42}


def test_integers_named_label_are_classes(tmp_path):
    data = images.load(make(tmp_path, numbered(12), numbered(4), feature=datasets.Value("int64")))
    assert data.classes == 2
    assert data.test.labels.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("names", [("cat", "dog"), ("train", "val", "cat"), ("test", "dev", "eval"), ("Test", "a b")])
@pytest.mark.parametrize("splits", [("train", "test"), ("Train", "TEST"), ("set[1]/training", "set[1]/testing")])
def test_a_folder_of_pictures_for_each_class(tmp_path, names, splits):
    each = dict(zip(splits, (10, 4), strict=True))
    data = images.load(draw(tmp_path, {f"{split}/{name}": n for split, n in each.items() for name in names}))
    assert data.classes == len(names)
    assert len(data.train.labels) + len(data.valid.labels) == 10 * len(names)
    assert data.test.labels.bincount().tolist() == [4] * len(names)
    assert data.notes == ()


@pytest.mark.parametrize("place", ["train/cat/test", "train/cat/val", "train/test-cat", "train/cat/x"])
def test_names_of_files_are_no_splits(tmp_path, place):
    draw(tmp_path, {"train/cat": 5, "train/dog": 5, "test/cat": 2, "test/dog": 2})
    for number, array in enumerate(numbered(3)):
        Image.fromarray(array).save((tmp_path / place).parent / f"test_{number}.png")
    data = images.load(str(tmp_path), labelled=False)
    assert len(data.train.labels) + len(data.valid.labels) == 13
    assert len(data.test.labels) == 4


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Dev"])
def test_a_validation_split_is_used(tmp_path, name):
    source = draw(
        tmp_path, {f"{split}/{label}": n for split, n in (("train", 8), (name, 3), ("test", 2)) for label in "ab"}
    )
    data = images.load(source)
    assert [len(part.labels) for part in data[:3]] == [16, 6, 4]
    assert data.valid.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(images.load(source, valid_size=2, train_size=5).valid.labels) == 2
    with pytest.raises(ValueError, match="`valid_size` to be from 1 to 6"):
        images.load(source, valid_size=7)


@pytest.mark.parametrize("values", [(1, 2, 3), (0, 7, 100), (5, 3, 4), ("eel", "cat", "dog")])
def test_integers_and_texts_are_classes_whatever_they_are(tmp_path, values):
    kind = "string" if isinstance(values[0], str) else "int64"
    for split, n in (("train", 30), ("test", 6)):
        labels = [values[i % 3] for i in range(n)]
        pictures = [png(array) for array in numbered(n)]
        save(tmp_path, split, pictures, {"label": labels}, {"label": datasets.Value(kind)})
    data = images.load(str(tmp_path), train_size=2)
    assert data.classes == 3
    rank = [sorted(values).index(value) for value in values]
    assert data.test.labels.tolist() == rank * 2
    assert data.train.labels.tolist() == [rank[number % 3] for number in numbers(data.train)]


def test_classes_that_a_split_lacks_are_named(tmp_path):
    data = images.load(draw(tmp_path, {"train/cat": 9, "train/dog": 9, "test/cat": 2, "test/eel": 2}))
    assert data.classes == 3
    assert data.notes == (
        "the train split has no pictures of the class 'eel', which cannot be learnt",
        "the test split has no pictures of the class 'dog', which does not count in test results",
    )


def test_files_that_number_their_classes_differently_are_refused(tmp_path):
    make(tmp_path, numbered(12), numbered(4))
    other = datasets.ClassLabel(names=["dog", "cat", "eel"])
    save(tmp_path, "test", [png(array) for array in numbered(2)], {"label": [0, 1]}, {"label": other})
    with pytest.raises(DataError, match="have other classes in 'label'"):
        images.load(str(tmp_path))


def test_of_few_pictures_one_is_held_out(tmp_path):
    assert len(images.load(make(tmp_path, numbered(4), numbered(1))).valid.labels) == 1


def test_pictures_without_classes_serve_where_none_are_needed(tmp_path):
    source = draw(tmp_path, {"train": 10, "test": 3})
    assert len(images.load(source, labelled=False).test.labels) == 3
    with pytest.raises(DataError, match="put pictures in a folder for each class"):
        images.load(source)


@pytest.mark.parametrize(("channels", "colour"), [(1, False), (3, True)])
def test_colour_is_told_by_pixels(channels, colour):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, channels, 3, 3), dtype=np.uint8))
    labels = torch.zeros(4).long()
    assert images.coloured(images.Part(pixels, labels)) is colour
    assert not images.coloured(images.Part(pixels[:, :1].expand(-1, 3, -1, -1), labels))


@pytest.mark.parametrize(("mode", "channels"), [("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3)])
def test_other_kinds_of_picture_become_grey_or_coloured(tmp_path, mode, channels):
    array = np.zeros((12, 4, 4, 3), np.uint8)
    array[:, 1] = 255
    data = images.load(make(tmp_path, array, array, mode))
    assert data.test.pixels.shape == (12, channels, 4, 4)
    assert torch.equal(data.test.pixels[0, -1, :, 0], torch.tensor([0, 255, 0, 0], dtype=torch.uint8))


def test_one_coloured_picture_makes_all_of_them_coloured(tmp_path):
    grey = numbered(12, channels=1)
    data = images.load(make(tmp_path, grey, numbered(3)))
    assert data.train.pixels.shape[1] == data.test.pixels.shape[1] == 3
    assert torch.equal(data.train.pixels[0, 2], torch.from_numpy(grey[numbers(data.train)[0]]))


@pytest.mark.parametrize(
    ("channels", "given", "mirrored"), [(1, None, False), (3, None, True), (1, True, True), (3, False, False)]
)
def test_training_mirrors_what_has_a_colour_unless_told(tmp_path, monkeypatch, channels, given, mirrored):
    """The digits of a folder are no other than those of a name."""
    source = make(tmp_path, numbered(12, (8, 8), channels), numbered(4, (8, 8), channels))
    flipped = []
    monkeypatch.setattr(images, "augment", lambda pixels, *_, flip, **__: flipped.append(flip) or pixels)
    given = {} if given is None else {"flip": given}
    config = resolve("image", {"data": source, "depth": 10, "width": 1, "batch": 4, "device": "cpu", **given})
    task = build(config, Rng(0), DistributedContext(torch.device("cpu")))
    task.loss(task.objective, task.plan()[0])
    assert flipped == [mirrored]
    said = (
        "training pictures are "
        + ("coloured, and mirrored half of the time: --no-flip" if mirrored else "grey, and not mirrored: --flip")
        + " changes that"
    )
    assert task.notes == (() if given else (said,))


@pytest.mark.parametrize("size", [(1, 1), (40, 4)])
def test_pictures_that_are_low_or_narrow_are_moved_by_less(tmp_path, size):
    source = make(tmp_path, numbered(12, size), numbered(4, size))
    config = resolve("image", {"data": source, "depth": 10, "width": 1, "batch": 4, "device": "cpu"})
    task = build(config, Rng(0), DistributedContext(torch.device("cpu")))
    assert task.loss(task.objective, task.plan()[0]).isfinite()


def test_links_to_the_folders_of_classes_are_followed(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "linked" / split).mkdir(parents=True)
        for name in "ab":
            folder = tmp_path / "real" / split / name
            folder.mkdir(parents=True)
            for n, array in enumerate(numbered(6)):
                (folder / f"{n}.png").write_bytes(png(array)["bytes"])
            (tmp_path / "linked" / split / name).symlink_to(folder)
    found = images.load(str(tmp_path / "linked"))
    assert (len(found.train.labels), len(found.test.labels), found.classes) == (11, 12, 2)

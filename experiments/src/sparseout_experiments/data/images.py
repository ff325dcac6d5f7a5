"""Pictures to classify, as tensors of bytes that stay on the device, and what is done to them there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparseout._utils.validation import expected
from sparseout_experiments.data import hub
from sparseout_experiments.data.hub import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features

HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
LABELS = ("fine_label", "label")  # which column to take where several could be the label; CIFAR-100 has two


class Part(NamedTuple):
    """Pictures (n, channels, height, width) of uint8 and their classes (n,) of int64."""

    pixels: Tensor
    labels: Tensor


class Images(NamedTuple):
    """Pictures to train on, to choose by and to measure on; and how many classes there are."""

    train: Part
    valid: Part
    test: Part
    classes: int


def load(
    source: str,
    *,
    train_size: int | None = None,
    valid_size: int | None = None,
    test_size: int | None = None,
    split_seed: int = 0,
) -> Images:
    """The pictures of `source`, with a random part of the training pictures held out for validation.

    Args:
        source: `digits` (those of scikit-learn, 8 x 8, of which 450 are for testing: the same as in `data.digits`),
            `mnist`, `cifar10` or `cifar100`; a folder that exists; or an id of the Hugging Face hub.
        train_size: keep the first so many of the shuffled rest, so that a smaller part lies within a larger one.
        valid_size: how many to hold out; by default a tenth of the training pictures. They do not depend on
            `train_size`.
        test_size: keep so many of the test pictures, chosen at random; by default all, in their order.
        split_seed: decides what is held out and what is kept.
    """
    if source == "digits":
        rest, test = _digits()
        kept, held_out = _held_out(len(rest.labels), train_size, valid_size, split_seed)
        chosen = _some(len(test.labels), test_size, split_seed)
        return Images(_take(rest, kept), _take(rest, held_out), _take(test, chosen), 10)
    parts = hub.load(source if Path(source).is_dir() else HUB.get(source, source))
    picture, label = _columns(parts["train"].features, source)
    kept, held_out = _held_out(len(parts["train"]), train_size, valid_size, split_seed)
    wanted = [("train", kept), ("train", held_out), ("test", _some(len(parts["test"]), test_size, split_seed))]
    # Only what was chosen is decoded; whether there is colour is decided for all of it together.
    pixels = _stacked([_decoded(parts[split], picture, rows, source) for split, rows in wanted], source)
    labels = [_labels(parts[split], label, rows, source) for split, rows in wanted]
    train, valid, test = (Part(*pair) for pair in zip(pixels, labels, strict=True))
    named = getattr(parts["train"].features[label], "num_classes", None)
    classes = int(max(part.max() for part in labels)) + 1 if named is None else named
    return Images(train, valid, test, classes)


def statistics(part: Part) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (channels,), with pixels counted from 0 to 1.

    From the counts of the 256 values, in fp64: exact for any number of pictures. A channel that never changes has the
    deviation 1, so that `normalise` makes it 0.
    """
    values = torch.arange(256, dtype=torch.float64, device=part.pixels.device) / 255
    channels = part.pixels.transpose(0, 1).flatten(1)
    counts = torch.stack([torch.bincount(channel.int(), minlength=256) for channel in channels])
    weights = counts.double() / counts.sum(1, keepdim=True)
    mean = weights @ values
    deviation = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
    constant = (counts > 0).sum(1) == 1
    return mean.float(), torch.where(constant, 1.0, deviation).float()


def normalise(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Bytes (n, channels, height, width) as fp32, with `mean` taken off and `std` divided out, on their device."""
    mean, std = (each.to(pixels.device)[:, None, None] for each in (mean, std))
    return (pixels.float() / 255 - mean) / std


def augment(pixels: Tensor, generator: torch.Generator, *, pad: int, flip: bool) -> Tensor:
    """Each picture moved by up to `pad` pixels either way, and mirrored left to right half of the time if `flip`.

    What moves in from outside is a reflection of the picture, as in Zagoruyko & Komodakis (2016), section 3. The
    random numbers are drawn on the CPU, equally many whatever `pad` and `flip` are: every device sees the same.

    Args:
        pixels: (n, channels, height, width), on any device.
        generator: of the CPU.
        pad: at least 0, less than height and width.
        flip: for pictures whose mirror image is of the same class; not for digits.
    """
    n, channels, height, width = pixels.shape
    if not 0 <= pad < min(height, width):
        raise ValueError(expected("pad", f"from 0 to {min(height, width) - 1}", pad))
    moves = torch.randint(2 * pad + 1, (2, n), generator=generator) - pad
    mirrored = torch.randint(2, (n,), generator=generator).bool() & flip
    rows = _reflected(moves[0, :, None] + torch.arange(height), height)
    columns = _reflected(moves[1, :, None] + torch.arange(width), width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    # One place in the memory of a picture for each of its pixels, the same for all of its channels.
    places = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).to(pixels.device)
    return pixels.flatten(2).gather(2, places.expand(-1, channels, -1)).view(pixels.shape)


def _reflected(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)


def _digits() -> tuple[Part, Part]:
    from sklearn.datasets import load_digits  # a second to import: not before it is needed

    found = load_digits()
    everything = Part(torch.tensor(found.images * 255 / 16).round().byte()[:, None], torch.tensor(found.target).long())
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))  # as in `data.digits`
    return _take(everything, order[450:]), _take(everything, order[:450])


def _take(part: Part, rows: Tensor) -> Part:
    return Part(part.pixels[rows], part.labels[rows])


def _held_out(n: int, train_size: int | None, valid_size: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """The rows to train on and to validate on."""
    valid = _size("valid_size", valid_size, n // 10, n - 1)
    train = _size("train_size", train_size, n - valid, n - valid)
    order = _shuffled(n, seed)
    return order[valid : valid + train], order[:valid]


def _some(n: int, size: int | None, seed: int) -> Tensor:
    size = _size("test_size", size, n, n)
    return torch.arange(n) if size == n else _shuffled(n, seed)[:size]


def _size(name: str, size: int | None, default: int, largest: int) -> int:
    chosen = default if size is None else size
    if not 1 <= chosen <= largest:
        raise ValueError(expected(name, f"from 1 to {largest}, which the data allow", chosen))
    return chosen


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _columns(features: Features, source: str) -> tuple[str, str]:
    """The names of the columns with the pictures and with their classes."""
    from datasets import ClassLabel, Image, Value

    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    numbers = [n for n, feature in features.items() if isinstance(feature, Value) and "int" in str(feature.dtype)]
    labels = classes if len(classes) == 1 else [n for n in LABELS if n in classes or (not classes and n in numbers)][:1]
    if len(pictures) != 1 or len(labels) != 1:
        wanted = "one column of pictures and one of classes (a ClassLabel, or integers named 'label')"
        raise DataError(f"{source!r} should have {wanted}, but has the columns {', '.join(features)}: choose another")
    return pictures[0], labels[0]


def _decoded(split: Dataset, column: str, rows: Tensor, source: str) -> list[Any]:
    """Pictures as arrays, (height, width) where they are grey and (height, width, 3) where they are not."""
    from datasets import Image

    feature = Image()
    encoded = split.select_columns([column]).cast_column(column, Image(decode=False)).select(rows.tolist())
    arrays = []
    for row, item in zip(rows.tolist(), encoded[:][column], strict=True):
        try:
            arrays.append(_array(feature.decode_example(item)))
        except Exception as error:  # decoders raise what they like
            where = f"Picture {row} of the split {split.split!s} of {source!r}"
            raise DataError(f"{where} cannot be read ({error or 'it is missing'}): get the data again") from error
    return arrays


def _array(picture: Any) -> Any:
    import numpy as np

    if picture.mode[0] in "IF":  # more than eight bits
        raise ValueError(f"its mode is {picture.mode}, not of 8 bits")
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("L" if picture.mode in ("1", "LA") else "RGB")
    return np.asarray(picture)


def _stacked(parts: list[list[Any]], source: str) -> list[Tensor]:
    """A tensor (n, channels, height, width) for each part, with one channel if all pictures are grey, else three."""
    import numpy as np

    sizes = sorted({array.shape[:2] for arrays in parts for array in arrays})
    if len(sizes) > 1:
        seen = " and ".join(f"{width} x {height}" for height, width in sizes[:2])
        raise DataError(f"The pictures of {source!r} should be of one size, but there are {seen}: resize them first")
    channels = 3 if any(array.ndim == 3 for arrays in parts for array in arrays) else 1
    stacked = []
    for arrays in parts:
        pixels = np.empty((len(arrays), channels, *sizes[0]), np.uint8)
        for place, array in zip(pixels, arrays, strict=True):
            place[:] = array if array.ndim == 2 else array.transpose(2, 0, 1)
        stacked.append(torch.from_numpy(pixels))
    return stacked


def _labels(split: Dataset, column: str, rows: Tensor, source: str) -> Tensor:
    every = split[column][:]
    labels = [every[row] for row in rows.tolist()]
    if any(label is None or label < 0 for label in labels):
        where = f"The split {split.split!s} of {source!r}"
        raise DataError(f"{where} has pictures without a class: take data with a class >= 0 for every picture")
    return torch.tensor(labels)

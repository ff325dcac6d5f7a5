"""Pictures to classify, as tensors of bytes that stay on the device, and what is done to them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sparseout_experiments.data import hub, shuffled_digits
from sparseout_experiments.data.hub import DataError
from sparseout_experiments.message import expected

if TYPE_CHECKING:
    from datasets import Dataset, Features

HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_SHOWN = 3  # names in a sentence
LABELS = ("fine_label", "label")  # which column to take where several could be the label; CIFAR-100 has two


class Part(NamedTuple):
    """Pictures (n, channels, height, width) of uint8 and their classes (n,) of int64."""

    pixels: Tensor
    labels: Tensor

    def rows(self, index: Tensor | slice) -> Part:
        return Part(self.pixels[index], self.labels[index])


class Images(NamedTuple):
    """Pictures to train on, to choose by and to measure on; how many classes there are; and what is odd about them."""

    train: Part
    valid: Part
    test: Part
    classes: int
    notes: tuple[str, ...] = ()


def load(
    source: str,
    *,
    train_size: int | None = None,
    valid_size: int | None = None,
    test_size: int | None = None,
    split_seed: int = 0,
    labelled: bool = True,
) -> Images:
    """The pictures of `source`. Without a split for validation, a random part of the training pictures is held out.

    Classes are numbered from 0 in the order of their names, or of the integers that the data have for them, whichever
    these are. Classes that some splits lack are named in `notes`.

    Args:
        source: `digits` (those of scikit-learn, 8 x 8, of which 450 are for testing),
            `mnist`, `cifar10` or `cifar100`; a folder that exists; or an id of the Hugging Face hub.
        train_size: keep the first so many of the shuffled rest, so that a smaller part lies within a larger one.
        valid_size: how many to hold out; by default the validation split, or a tenth of the training pictures. They
            do not depend on `train_size`.
        test_size: keep so many of the test pictures, chosen at random; by default all, in their order.
        split_seed: decides what is held out and what is kept.
        labelled: whether classes are needed; without, every picture has the class 0.

    Raises:
        DataError: for data that are missing or damaged.
        ValueError: for a size that the data do not have.
    """
    if source == "digits":
        pixels, labels = shuffled_digits()
        digits = Part((pixels * 255).round().byte()[:, None], labels)
        both = {"train": digits.rows(slice(450, None)), "test": digits.rows(slice(450))}
        lengths = {split: len(part.labels) for split, part in both.items()}
        chosen = _chosen(lengths, train_size, valid_size, test_size, split_seed)
        train, valid, test = (both[split].rows(rows) for split, rows in chosen)
        return Images(train, valid, test, 10)
    parts = hub.load(source if Path(source).is_dir() else HUB.get(source, source))
    picture, label = _columns(parts["train"].features, source, labelled)
    chosen = _chosen({split: len(part) for split, part in parts.items()}, train_size, valid_size, test_size, split_seed)
    # Only what was chosen is decoded; whether there is colour is decided for all of it together.
    pictures = _stacked([_decoded(parts[split], picture, rows, source) for split, rows in chosen], source)
    if not label:
        train, valid, test = (Part(each, torch.zeros(len(each)).long()) for each in pictures)
        return Images(train, valid, test, 1)
    classes = {split: _labels(parts[split], label, source) for split, _ in chosen}
    names = getattr(parts["train"].features[label], "names", None)
    values = sorted(set[Any]().union(*classes.values())) if names is None else range(len(names))
    if len(values) < 2:
        raise DataError(f"{source!r} has pictures of one class only: add those of another")
    number = {value: index for index, value in enumerate(values)}
    numbers = (torch.tensor([number[classes[split][row]] for row in rows.tolist()]) for split, rows in chosen)
    train, valid, test = (Part(*pair) for pair in zip(pictures, numbers, strict=True))
    return Images(train, valid, test, len(values), _lacking(classes, names))


def coloured(part: Part) -> bool:
    """Whether any pixel has a colour; grey pictures may be stored with three channels."""
    first = part.pixels[:, :1]
    return bool((part.pixels != first).any())


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
    # Where in the memory of a picture each of its pixels lies, the same for all of its channels.
    index = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).to(pixels.device)
    return pixels.flatten(2).gather(2, index.expand(-1, channels, -1)).view(pixels.shape)


def _reflected(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index < size, index, 2 * (size - 1) - index)


def _chosen(
    lengths: Mapping[str, int], train_size: int | None, valid_size: int | None, test_size: int | None, seed: int
) -> list[tuple[str, Tensor]]:
    """Of which split, and which of its rows, are to train on, to validate on and to test on."""
    order = _shuffled(lengths["train"], seed)
    if "validation" in lengths:
        held_out = ("validation", _sample("valid_size", lengths["validation"], valid_size, seed))
    else:
        valid = _size("valid_size", valid_size, max(1, len(order) // 10), len(order) - 1)
        held_out, order = ("train", order[:valid]), order[valid:]
    train = order[: _size("train_size", train_size, len(order), len(order))]
    return [("train", train), held_out, ("test", _sample("test_size", lengths["test"], test_size, seed))]


def _sample(name: str, n: int, size: int | None, seed: int) -> Tensor:
    size = _size(name, size, n, n)
    return torch.arange(n) if size == n else _shuffled(n, seed)[:size]


def _size(name: str, size: int | None, default: int, largest: int) -> int:
    chosen = default if size is None else size
    if not 1 <= chosen <= largest:
        raise ValueError(expected(name, f"from 1 to {largest}, which the data allow", chosen))
    return chosen


def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _columns(features: Features, source: str, labelled: bool) -> tuple[str, str]:
    """The names of the columns with the pictures and with their classes; the latter is empty where none is needed."""
    from datasets import ClassLabel, Image, Value

    pictures = [name for name, feature in features.items() if isinstance(feature, Image)]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    kinds = ("int", "string", "bool")
    values = [n for n, f in features.items() if isinstance(f, Value) and any(kind in f.dtype for kind in kinds)]
    labels = classes if len(classes) == 1 else [n for n in LABELS if n in classes or (not classes and n in values)][:1]
    columns = f"but has the columns {', '.join(features)}"
    if len(pictures) != 1:
        raise DataError(f"{source!r} should have one column of pictures, {columns}: choose another")
    if not labelled:
        return pictures[0], ""
    if len(labels) != 1:
        column = "one column of classes (a ClassLabel, or integers or texts named 'label')"
        folders = "put pictures in a folder for each class, of which there are two at least, all as deep"
        column_of = "write it as integers or texts" if "label" in features else "name that column 'label'"
        how = column_of if len(features) > 1 else folders
        raise DataError(f"{source!r} should have {column}, {columns}: {how}")
    return pictures[0], labels[0]


def _decoded(split: Dataset, column: str, rows: Tensor, source: str) -> list[Any]:
    """Pictures as arrays, (height, width) where they are grey and (height, width, 3) where they are not."""
    import numpy as np
    from datasets import Image

    feature = Image()
    encoded = split.select_columns([column]).cast_column(column, Image(decode=False)).select(rows.tolist())
    arrays = []
    for row, item in zip(rows.tolist(), encoded[:][column], strict=True):
        file = "" if item is None or not item["path"] else f" ({item['path']})"
        where = f"Picture {row}{file} of the split {split.split!s} of {source!r}"
        try:
            if item is None:
                raise ValueError("it is missing")
            picture = feature.decode_example(item)
        except Exception as error:  # decoders raise what they like
            raise DataError(f"{where} cannot be read ({error}): replace it or leave it out") from error
        if picture.mode[0] in "IF":
            raise DataError(
                f"{where} has more than 8 bits a channel (mode {picture.mode}): convert the pictures to 8 bits first, "
                "for example with `magick mogrify -depth 8`"
            )
        if picture.mode not in ("L", "RGB"):
            picture = picture.convert("L" if picture.mode in ("1", "LA", "La") else "RGB")
        arrays.append(np.asarray(picture))
    return arrays


def _stacked(parts: list[list[Any]], source: str) -> list[Tensor]:
    """A tensor (n, channels, height, width) for each part, with one channel if all pictures are grey, else three."""
    import numpy as np

    sizes = sorted({array.shape[:2] for arrays in parts for array in arrays})
    if len(sizes) > 1:
        two = " and ".join(f"{width} x {height}" for height, width in sizes[:2])
        raise DataError(f"The pictures of {source!r} should be of one size, but there are {two}: resize them first")
    channels = 3 if any(array.ndim == 3 for arrays in parts for array in arrays) else 1
    stacked = []
    for arrays in parts:
        pixels = np.empty((len(arrays), channels, *sizes[0]), np.uint8)
        for picture, array in zip(pixels, arrays, strict=True):
            picture[:] = array if array.ndim == 2 else array.transpose(2, 0, 1)
        stacked.append(torch.from_numpy(pixels))
    return stacked


def _labels(split: Dataset, column: str, source: str) -> list[Any]:
    """The classes of all pictures of a split."""
    labels: list[Any] = split[column][:]
    if any(label in (None, "") or (isinstance(label, int) and label < 0) for label in labels):
        where = f"The split {split.split!s} of {source!r}"
        how = "put pictures in a folder for each class, of which there are two at least, or number classes from 0"
        raise DataError(f"{where} has pictures without a class: {how}")
    return labels


def _lacking(labels: Mapping[str, Sequence[Any]], names: Sequence[str] | None) -> tuple[str, ...]:
    """A sentence for each split that lacks classes which another one has."""
    classes = {split: set(values) for split, values in labels.items()}
    in_any = set[Any]().union(*classes.values())
    notes = []
    for split, present in classes.items():
        if absent := sorted(in_any - present):
            shown = [repr(names[value] if names else value) for value in absent[:_SHOWN]]
            more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
            s = "es" if len(absent) > 1 else ""
            what = "cannot be learnt" if split == "train" else f"does not count in {split} results"
            notes.append(f"the {split} split has no pictures of the class{s} {', '.join(shown)}{more}, which {what}")
    return tuple(notes)

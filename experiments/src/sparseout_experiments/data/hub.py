"""Data sets of the Hugging Face hub, or of a folder laid out like one, by the library `datasets`."""

from __future__ import annotations

import glob
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

LAYOUT = "train-*.parquet, test-*.parquet and validation-*.parquet"
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# what a split may be called, in capitals too
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class DataError(Exception):
    """Data that is missing or damaged: one sentence that says what to get and where to put it."""


def load(source: str, wanted: Sequence[str] = ("train", "test"), *, name: str | None = None) -> DatasetDict:
    """The data set `source`, with at least the splits `wanted`. What is prepared lies in the cache of `datasets`.

    Folders called `train`, `validation` and `test` are the splits, whatever the files and folders inside are called.

    Args:
        source: a folder that exists, or else an id of the hub, such as `ylecun/mnist`. The folder may hold whatever
            `datasets` recognises: parquet files named after their splits, pictures in a folder for each class, ...
        wanted: the splits that must be there; others come as well. `valid`, `val` and `dev` are `validation`.
        name: of one configuration of a data set of the hub that has several; not used for a folder.
    """
    import datasets  # a second to import: not before it is needed

    folder = Path(source).expanduser()
    local = source != "" and folder.is_dir()
    if not local and folder.is_file():
        name_folder = f"name a folder that holds the data as {LAYOUT}"
        how = "unpack it and name the folder" if folder.suffix.lower() in ARCHIVES else name_folder
        raise DataError(f"{source!r} is a file: {how}")
    if not local and _looks_like_a_path(source):
        raise DataError(f"{source!r} does not exist: name a folder that holds the data as {LAYOUT}")
    folders = split_folders(folder) if local else {}
    if local:
        _check_classes(folder)
    files = {split: _patterns(path) for split, path in folders.items()}
    if empty := [path for split, path in folders.items() if not files[split]]:
        raise DataError(f"The folder {str(empty[0])!r} is empty: put the files of its split there")
    try:
        with _quiet():
            splits = (
                datasets.load_dataset(str(folder.absolute()), data_files=files or None)
                if local
                else datasets.load_dataset(source, name)
            )
    except Exception as error:  # whatever the libraries below `datasets` raise: for the network, for each file format
        raise DataError(_sentence(source, folder if local else None, error)) from error
    for split in [split for split in splits if split not in SPLITS and _split_called(split)]:
        splits.setdefault(_split_called(split), splits.pop(split))
    if missing := [split for split in wanted if split not in splits]:
        lacks = f"{source!r} has no split named {missing[0]!r}, only {', '.join(splits)}"
        split, other = missing[0], "train" if missing[0] != "train" else "test"
        places = f"into the folder {str(folder / split)!r}, and the others into one such as {str(folder / other)!r}"
        added = f"add {split}-00000-of-00001.parquet to the others, or put the files for it {places}"
        how = added if local else "take another data set"
        raise DataError(f"{lacks}: {how}")
    return splits


def split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits, in `folder` or in the only folder that it holds. Raises DataError for two of one."""
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and path.name[0] not in "._"]
    folders: dict[str, Path] = {}
    for path in inside:
        split = _split_called(path.name)
        if split in folders:
            raise DataError(f"{str(folder)!r} holds both {folders[split].name!r} and {path.name!r}: keep one of them")
        if split:
            folders[split] = path
    return folders if folders or len(inside) != 1 else split_folders(inside[0])


def _patterns(folder: Path) -> list[str]:
    """Patterns for the files below a folder, also behind links to folders, which `**` does not follow.

    Raises DataError for what `datasets` would pass over: an empty folder in it, or a link to nothing.
    """
    top = folder.absolute()
    todo, roots = [top], set[Path]()
    for root in todo:
        for at, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name[0] != "."]
            if root == top:  # links behind links are not followed, as they may lead back
                todo += [Path(at, name) for name in folders if Path(at, name).is_symlink()]
            seen = [os.path.join(at, name) for name in names if name[0] != "."]
            if lost := [path for path in seen if not os.path.exists(path)]:
                raise DataError(f"{lost[0]!r} is a link to a file that is not there: bring it back, or remove the link")
            if seen:
                roots.add(root)
            elif not folders and Path(at) != top:
                raise DataError(f"The folder {at!r} is empty: put the files of its class there, or remove it")
    return [f"{glob.escape(str(path))}/**" for path in sorted(roots)]


def _check_classes(folder: Path) -> None:
    """Raise DataError where parquet files number their classes differently: `datasets` takes the names of the first."""
    import datasets
    import pyarrow.parquet  # type: ignore[import-untyped]

    first: dict[str, tuple[list[str], str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        try:
            features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(path))
        except Exception:  # a damaged file is reported when it is read
            continue
        for column, feature in features.items():
            if isinstance(feature, datasets.ClassLabel):
                names, where = first.setdefault(column, (feature.names, path.name))
                if names != feature.names:
                    files = f"{where} and {path.name} of {str(folder)!r}"
                    raise DataError(
                        f"{files} have other classes in {column!r}: write them with the same names in one order"
                    )


def _split_called(name: str) -> str:
    """The split that a name means, or an empty text."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), "")


def _looks_like_a_path(source: str) -> bool:
    """An id of the hub is a name, or an owner and a name."""
    return not source or source[0] in "./~" or source.count("/") > 1 or "\\" in source


def _sentence(source: str, folder: Path | None, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # `datasets` wraps what says more, such as which file is no parquet
        cause = cause.__cause__
    reason = next(iter(str(cause).splitlines()), "").rstrip(". ") or type(cause).__name__
    if folder is None:
        return (
            f"The data set {source!r} could not be had from the Hugging Face hub ({reason}): connect to the network, "
            f"or put its files, as {LAYOUT}, in a folder and name that instead"
        )
    if archives := [path.name for path in sorted(folder.rglob("*")) if path.suffix.lower() in ARCHIVES]:
        return f"The data in {source!r} could not be read ({reason}): unpack {archives[0]} there"
    return f"The data in {source!r} could not be read ({reason}): put whole files there, as {LAYOUT}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of `datasets` on the terminal: errors are in the sentence, progress is for the experiments to show.

    The user's settings come back afterwards.
    """
    import datasets

    shown, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an environment variable decides about the bars
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.CRITICAL)  # it reports every retry
    try:
        yield
    finally:
        client.setLevel(level)
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()

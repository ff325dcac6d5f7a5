"""Data sets of the Hugging Face hub, or of a folder laid out like one, by the library `datasets`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

LAYOUT = "train-*.parquet, test-*.parquet and validation-*.parquet"


class DataError(Exception):
    """Data that is missing or damaged: one sentence that says what to get and where to put it."""


def load(
    source: str, wanted: Sequence[str] = ("train", "test"), *, name: str | None = None, advice: str = ""
) -> DatasetDict:
    """The data set `source`, with at least the splits `wanted`. What is prepared lies in the cache of `datasets`.

    Args:
        source: a folder that exists, or else an id of the hub, such as `ylecun/mnist`. The folder may hold whatever
            `datasets` recognises: parquet files named after their splits, pictures in a folder for each class, ...
        wanted: the splits that must be there.
        name: of one configuration of a data set of the hub that has several; not used for a folder.
        advice: what else to tell a user who lacks the data; the end of a sentence.
    """
    import datasets  # a second to import: not before it is needed

    folder = Path(source).expanduser()
    local = source != "" and folder.is_dir()
    if not local and (folder.exists() or _looks_like_a_path(source)):
        what = "is a file" if folder.is_file() else "does not exist"
        raise DataError(f"{source!r} {what}: name a folder that holds the data as {LAYOUT}{advice}")
    try:
        with _quiet():
            found = datasets.load_dataset(str(folder)) if local else datasets.load_dataset(source, name)
    except Exception as error:  # whatever the libraries below `datasets` raise: for the network, for each file format
        raise DataError(_sentence(source, local, error) + advice) from error
    missing = [split for split in wanted if split not in found]
    if missing:
        raise DataError(
            f"{source!r} has no split named {missing[0]!r}, only {', '.join(found)}: "
            f"{'add its file, such as ' + missing[0] + '-00000-of-00001.parquet' if local else 'take another data set'}"
            f"{advice}"
        )
    return found


def _looks_like_a_path(source: str) -> bool:
    """An id of the hub is a name, or an owner and a name."""
    return not source or source[0] in "./~" or source.count("/") > 1 or "\\" in source


def _sentence(source: str, local: bool, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # `datasets` wraps what says more, such as which file is no parquet
        cause = cause.__cause__
    reason = next(iter(str(cause).splitlines()), "").rstrip(". ") or type(cause).__name__
    if local:
        return f"The data in {source!r} could not be read ({reason}): put whole files there, as {LAYOUT}"
    return (
        f"The data set {source!r} could not be had from the Hugging Face hub ({reason}): connect to the network, "
        f"or put its files, as {LAYOUT}, in a folder and name that instead"
    )


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
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()

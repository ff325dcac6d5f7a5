"""Files of results: JSON in which every entry of a list has a line of its own, so that a diff shows what changed."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import UndefinedError

from sparseout_experiments.message import expected
from sparseout_experiments.training import atomic_files, run_folder

_LOCAL = ("out", "resume", "track", "seed", "data", "checkpoint_minutes")  # of one machine, or of one run
Records = TypeVar("Records", list[Any], dict[str, Any])
Value = TypeVar("Value")


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole file, with a line for each entry of its dicts and lists; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = ",\n".join(f" {json.dumps(name)}: {_lines(run_folder.plain(value))}" for name, value in content.items())
    atomic_files.write(path, f"{{\n{entries}\n}}\n")


def _lines(value: Any) -> str:
    if isinstance(value, dict) and value:
        entries = (f"  {json.dumps(name)}: {_line(entry)}" for name, entry in value.items())
        return "{\n" + ",\n".join(entries) + "\n }"
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return "[\n" + ",\n".join(f"  {_line(entry)}" for entry in value) + "\n ]"
    return _line(value)


def _line(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def short(value: Any) -> Any:
    """Numbers with six digits, which are more than any table or figure shows."""
    if isinstance(value, dict):
        return {name: short(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(entry) for entry in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def thinned(series: Sequence[Any], points: int) -> list[Any]:
    """Evenly spaced entries of a series, at least so many if it has them, and the last one among them."""
    return list(series[::-1][:: max(1, len(series) // points)][::-1])


def load(path: Path, kind: str) -> dict[str, Any]:
    """Read a file. Raises ValueError for one that holds something else."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["kind"] != kind:
            raise KeyError
    except run_folder.UNREADABLE as error:
        raise ValueError(f"{path} does not hold results of {kind}") from error
    return content


@contextmanager
def shown(path: Path, kind: str, refused: type[ValueError] = ValueError) -> Iterator[None]:
    """A block that shows what a file, or those of a folder, hold: raises `refused` where that is not whole."""
    try:
        yield
    except (*run_folder.UNREADABLE, ArithmeticError, UndefinedError) as error:
        if isinstance(error, OSError):  # of what is written
            raise
        raise refused(f"{path} does not hold whole results of {kind} ({type(error).__name__})") from error


def check_options(path: Path, config: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError for a file of runs with other options than are wanted, but for where data lay and it ran."""
    for name in wanted.keys() & config.keys() - {"data", "device"}:
        if config[name] != wanted[name]:
            raise ValueError(f"{path} holds runs with {name} = {config[name]} where the study wants {wanted[name]}")


def present(records: Records, folder: Path, study: str) -> Records:
    """The results of a study, of which there are some. Raises ValueError where a folder has none."""
    if not records:
        raise ValueError(
            expected("--results", f"a folder with results of `sparseout reproduce {study}`", repr(str(folder)))
        )
    return records


def shared(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options on which all runs agree."""
    if not configs:
        return {}
    first, *rest = configs
    return {
        name: run_folder.plain(value)
        for name, value in first.items()
        if name not in _LOCAL and all(other.get(name) == value for other in rest)
    }


def distinct(values: Iterable[Value]) -> list[Value]:
    """Each value once, in the order in which they come."""
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())

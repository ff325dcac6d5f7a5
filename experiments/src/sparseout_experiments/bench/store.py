"""Files of rows, one a device, written whole after every case."""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import sparseout
from sparseout_experiments.bench.cases import PLANS, Case, cores
from sparseout_experiments.bench.measure import Row, measure
from sparseout_experiments.training import atomic_files
from sparseout_experiments.training.environment import processor, versions

KIND = "sparseout bench"


class NotRows(ValueError):
    """A file that is not ours, in one sentence."""


@dataclass
class Record:
    """One file: rows measured in one environment, and the cases that the last run set out to do."""

    environment: dict[str, Any]
    planned: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @property
    def missing(self) -> set[str]:
        """Planned cases with no row yet."""
        return set(self.planned) - {row["case"] for row in self.rows}

    @property
    def cases(self) -> int:
        return len({row["case"] for row in self.rows})

    @property
    def quick(self) -> bool:
        return bool(self.environment["quick"])

    @property
    def slug(self) -> str:
        name = re.sub("[^a-z0-9]+", "-", self.environment["device"]["name"].lower()).strip("-")
        return name + ("-quick" if self.quick else "")


def environment(device: str, quick: bool) -> dict[str, Any]:
    """All that rows must share to stand in one file."""
    backend, reason = sparseout.backend(device)
    processors = f"{processor()}, {cores()} core{'s' if cores() > 1 else ''}"
    return {
        "device": {"type": device, "name": torch.cuda.get_device_name() if device == "cuda" else processors},
        "versions": {
            **versions("torch", *(["triton"] if find_spec("triton") else [])),
            "sparseout": sparseout.__version__,
            "python": platform.python_version(),
        },
        "source": source(),
        "backend": {"name": backend, "reason": reason},
        "quick": quick,
    }


def source() -> str:
    """A fingerprint of the library's code, which changes more often than its version."""
    root = Path(sparseout.__file__).parent
    paths = sorted(path for pattern in ("*.py", "*.c") for path in root.rglob(pattern))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths))
    return digest.hexdigest()[:10]


def load(path: Path) -> Record:
    """A record from its file. Raises NotRows where the file is none."""
    try:
        record = json.loads(path.read_text())
        if record.pop("kind") != KIND:
            raise KeyError
        return Record(**record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotRows(f"{path} does not hold rows of {KIND}") from error


def save(record: Record, folder: Path) -> Path:
    """Write the whole file, beside the one that is there as long as that holds more; return its path."""
    path, partial = (folder / f"{record.slug}.{ending}" for ending in ("json", "partial"))
    content = json.dumps({"kind": KIND, **vars(record)}, indent=1, allow_nan=False)
    old = load(path) if path.exists() else Record({})
    finished_anew = old.environment == record.environment and not record.missing
    if record.cases >= old.cases or finished_anew:
        atomic_files.write(path, content + "\n")
        partial.unlink(missing_ok=True)
        return path
    atomic_files.write(partial, content + "\n")
    return partial


def resume(folder: Path, now: dict[str, Any], cases: Sequence[Case], every: Sequence[Case]) -> Record:
    """The record to go on with: what an unfinished run of the same cases left, or else one without their rows.

    Rows of other cases stay if they are among `every` case there is, unless they were measured in another environment.
    """
    keys = [case.key for case in cases]
    record = Record(now)
    left = [folder / f"{record.slug}.{ending}" for ending in ("partial", "json")]
    record = next((old for path in left if path.exists() and (old := load(path)).environment == now), record)
    if record.planned != keys or not record.missing:
        others = {case.key for case in every} - set(keys)
        record.rows = [row for row in record.rows if row["case"] in others]
        record.planned = keys
    return record


def run(record: Record, cases: Sequence[Case], folder: Path, on_progress: Callable[[Case, str, float], None]) -> None:
    """Measure what is missing; the file is whole after every case."""
    device = record.environment["device"]["type"]
    budget = PLANS[device, record.quick].budget
    for case in cases:
        if case.key in record.missing:
            record.rows += measure(case, device, budget, partial(on_progress, case))
            save(record, folder)


def grouped(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by the table in which they stand, and there by dtype where there is a table for each."""
    tables: dict[str, dict[str, list[Row]]] = {
        name: {} for name in ("operation", "busy", "layouts", "model", "alternatives")
    }
    for row in rows:
        table, dtype = row["section"], ""
        if table == "operation" and row["layout"] == "vector":
            table, dtype = "busy" if row.get("busy") else "operation", row["dtype"]
        elif table == "operation":
            table = "layouts"
        tables[table].setdefault(dtype, []).append(row)
    return tables

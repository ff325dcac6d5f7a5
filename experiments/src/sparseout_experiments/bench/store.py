"""Files of rows, one a device, written whole after every case."""

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import sparseout
from sparseout_experiments.bench.cases import PLANS, Case, cores
from sparseout_experiments.bench.measure import Row, measure
from sparseout_experiments.studies.engine import results
from sparseout_experiments.training import atomic_files
from sparseout_experiments.training.environment import processor, versions
from sparseout_experiments.training.run_folder import UNREADABLE

KIND = "sparseout bench"


class NotRows(ValueError):
    """A file that is not ours, in one sentence."""


@dataclass
class Record:
    """One file: rows measured in one environment."""

    environment: dict[str, Any]
    rows: list[Row]

    @property
    def cases(self) -> set[str]:
        return {row["case"] for row in self.rows}

    @property
    def quick(self) -> bool:
        return bool(self.environment["quick"])

    def path(self, folder: Path) -> Path:
        name = re.sub("[^a-z0-9]+", "-", self.environment["device"]["name"].lower()).strip("-")
        return folder / f"{name}{'-quick' if self.quick else ''}.json"


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
        content = results.load(path, KIND)
        record = Record(content["environment"], content["rows"])
        _ = record.quick, record.path(path.parent), record.cases  # without these it is none
    except UNREADABLE as error:
        raise NotRows(f"{path} does not hold rows of {KIND}") from error
    return record


def save(record: Record, folder: Path) -> None:
    """Write the whole file."""
    content = json.dumps({"kind": KIND, **vars(record)}, indent=1, allow_nan=False)
    atomic_files.write(record.path(folder), content + "\n")


def begun(folder: Path, now: dict[str, Any]) -> Record:
    """The record to go on with: that of the device in `folder`, or a new one.

    Raises NotRows where its rows were measured in another environment.
    """
    record = Record(now, [])
    path = record.path(folder)
    if not path.exists():
        return record
    if (there := load(path)).environment != now:
        raise NotRows(f"{path} has rows of another version or backend: move it away, or give another --out")
    return there


def run(record: Record, cases: Sequence[Case], folder: Path, on_progress: Callable[[Case, str, float], None]) -> None:
    """Measure what the record lacks; the file is whole after every case."""
    device = record.environment["device"]["type"]
    budget = PLANS[device, record.quick].budget
    for case in cases:
        if case.key not in record.cases:
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

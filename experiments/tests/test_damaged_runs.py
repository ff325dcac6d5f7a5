"""What a run has left and is something else, damaged, or of another run: a sentence; and what is not finite: a dash."""

import json
from pathlib import Path
from typing import Any

import pytest
from small import status_of
from sparseout_experiments.training import run_folder
from study_rows import trained

COUNTS = {"units": 8, "dead_units": 0, "rows": 32, "undefined_rows": 0}
AT_HALF = {"target": 0.5, "hoyer": None, "noise_least": None, "noise_most": None}


def ended(folder: Path, **changed: Any) -> None:
    """A run that has ended, with entries of its result replaced; a dict is merged into the one that is there."""
    trained("autoencoder", {"epochs": 2, "seed": 0}, folder)
    result = json.loads((folder / run_folder.RESULT).read_text())
    result["sparsity"]["code"] |= COUNTS
    for name, value in changed.items():
        merged = isinstance(value, dict) and value and isinstance(result.get(name), dict)
        result[name] = result[name] | value if merged else value
    (folder / run_folder.RESULT).write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"task": "image"}, "cannot be read ("),
        ({"task": "audio"}, "cannot be read ("),
        ({"metric": "error"}, "cannot be read ("),
        ({"test": {}}, "cannot be read ("),
        ({"config": {}}, "cannot be read ("),
        ({"environment": [1]}, "cannot be read ("),
        ({"control": AT_HALF}, "cannot be read ("),
        ({"control": AT_HALF | {"target": None, "q": 1.0}}, "cannot be read ("),
        ({"sparsity": {"code": COUNTS | dict.fromkeys(run_folder.MEASURES) | {"rows": 0}}}, "cannot be read ("),
        ({"sparsity": {"code": COUNTS | dict.fromkeys(run_folder.MEASURES) | {"units": 0}}}, "cannot be read ("),
        ({"config": {"q": 3.0}}, "is of a run with q = 3.0, not 1.5: put this run's own in its place, or start anoth"),
    ],
)
def test_the_result_of_something_else_is_not_shown(
    changed: dict[str, Any], says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, **changed)
    assert status_of("run", "--resume", "--out", str(tmp_path)) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"sparseout: {tmp_path / run_folder.RESULT} {says}")


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"test": {"mse": None}}, "mse - on test data"),
        ({"test": {"error_as_trained": None}}, "; - with batch norm as trained"),
        ({"control": AT_HALF | {"q": None}}, "where the target is 0.5, at q = -; means over the last tenth"),
    ],
)
def test_what_was_not_finite_is_a_dash(
    changed: dict[str, Any], shown: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path, **changed)
    assert status_of("run", "--resume", "--out", str(tmp_path)) == 0
    assert shown in capfd.readouterr().out


@pytest.mark.parametrize("name", [run_folder.RESULT, run_folder.METRICS, run_folder.CONFIG])
@pytest.mark.parametrize("command", [["run", "--resume", "--out"], ["report"]])
@pytest.mark.parametrize("damage", ["too deep", "a folder"])
def test_what_cannot_be_read_is_one_sentence(
    name: str, command: list[str], damage: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ended(tmp_path)
    if damage == "a folder":
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(("a = " if name == run_folder.CONFIG else "") + 100_000 * "[")
    status, err = status_of(*command, str(tmp_path)), capfd.readouterr().err
    ignored = name == run_folder.METRICS and (command[0] == "run" or damage == "too deep")  # as a line cut short is
    assert (status > 0, err.count("\n")) == ((False, 0) if ignored else (True, 1))
    assert ignored or err.startswith(f"sparseout: {'the files in ' * (name not in err)}{tmp_path}")

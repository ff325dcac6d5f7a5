"""Worker processes and signals."""

import os
import signal
from pathlib import Path
from typing import Any

from sparseout_experiments.studies.engine.pool import Job, Pool


def train(task: str, options: dict[str, Any], folder: Path) -> None:
    (folder / task).touch()


def test_ctrl_c_while_a_worker_begins_is_no_matter_of_its(tmp_path: Path) -> None:
    with Pool(1, train) as pool:
        pool.start(Job("task", {}, tmp_path))
        (worker,) = pool._workers.values()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGINT)
        outcome = pool.wait()
    assert (outcome.problem, outcome.lost) == (None, None)
    assert (tmp_path / "task").exists()

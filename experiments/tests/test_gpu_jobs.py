"""Jobs for a GPU: one at a time on a worker that has one, and a sentence where no worker has."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import LocalCluster
from sparseout_experiments.studies.engine.cluster import Cluster, ClusterError, Job


def spend_a_moment(task: str, options: dict[str, Any], folder: Path) -> None:
    begun = time.monotonic()
    time.sleep(0.3)
    folder.with_suffix(".txt").write_text(f"{begun} {time.monotonic()}")


@contextmanager
def cluster(**resources: int) -> Iterator[Cluster]:
    """On a scheduler with one worker, of two threads, that has these resources."""
    threads = torch.get_num_threads()
    options: dict[str, Any] = {"resources": resources, "dashboard_address": "127.0.0.1:0", "silence_logs": False}
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, **options) as there,
        Cluster(1, spend_a_moment, there.scheduler_address) as found,
    ):
        yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("device", "overlap"), [("cuda", False), ("cpu", True)])
def test_a_worker_with_a_gpu_takes_one_run_at_a_time(device: str, overlap: bool, tmp_path: Path) -> None:
    with cluster(GPU=1) as found:
        for name in ("a", "b"):
            found.start(Job("autoencoder", {"device": device}, tmp_path / name))
        for _ in range(2):
            assert found.wait().problem is None
    (first, ended), (second, _) = sorted([float(x) for x in p.read_text().split()] for p in tmp_path.glob("*.txt"))
    assert first < second
    assert (second < ended) is overlap


def test_without_a_worker_for_it_a_run_on_a_gpu_is_refused(tmp_path: Path) -> None:
    with (
        cluster() as found,
        pytest.raises(ClusterError, match="the resource GPU, as `--device` is cuda, but got 1 without"),
    ):
        found.start(Job("autoencoder", {"device": "cuda"}, tmp_path / "a"))

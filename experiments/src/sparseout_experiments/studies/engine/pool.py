"""Worker processes that train one run after another, each on one thread of torch."""

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

Train = Callable[[str, dict[str, Any], Path], None]


class Job(NamedTuple):
    """A task, its options, and the folder of the run."""

    task: str
    options: dict[str, Any]
    folder: Path


class Outcome(NamedTuple):
    """The end of a job."""

    job: Job
    problem: str | None  # an error that is not the failure of one run: the rest would meet it too
    lost: str | None  # how the process ended, where it did without an answer
    seconds: float


class Pool:
    """Workers as a with-block. Leaving it ends them; what they had in hand resumes from its checkpoints.

    Args:
        workers: how many processes.
        train: trains one run in its folder; a function that a new process can import.
    """

    def __init__(self, workers: int, train: Train) -> None:
        self._context = get_context("spawn")  # forked, torch's threads could hang
        self._train = train
        self._workers: dict[Connection, SpawnProcess] = {}
        self._busy: dict[Connection, tuple[Job, float]] = {}
        self._wanted = workers

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._workers.values():
            process.terminate()
        for link, process in self._workers.items():
            process.join()
            link.close()

    @property
    def free(self) -> bool:
        """Whether a job would start at once."""
        return len(self._busy) < self._wanted

    @property
    def busy(self) -> bool:
        """Whether an outcome is to come."""
        return bool(self._busy)

    def start(self, job: Job) -> None:
        """Give a job to a free worker, or to a new one."""
        link = next((link for link in self._workers if link not in self._busy), None) or self._hire()
        self._busy[link] = (job, time.monotonic())
        link.send(job)

    def wait(self) -> Outcome:
        """Wait for the next outcome."""
        link = next(link for link in wait(list(self._busy)) if isinstance(link, Connection))
        job, started = self._busy.pop(link)
        seconds = time.monotonic() - started
        try:
            return Outcome(job, link.recv(), None, seconds)
        except (EOFError, ConnectionError):  # the process is gone
            process = self._workers.pop(link)
            process.join()
            link.close()
            return Outcome(job, None, f"its process ended with status {process.exitcode}", seconds)

    def _hire(self) -> Connection:
        mine, its = self._context.Pipe()
        process = self._context.Process(target=_work, args=(its, self._train), daemon=True)
        # Inherited: Ctrl-C reaches every process of a terminal, and a worker may still be importing when it comes.
        resource_tracker.ensure_running()  # which would lift the block
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its.close()
        self._workers[mine] = process
        return mine


def _work(link: Connection, train: Train) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    while True:
        try:
            job: Job = link.recv()
        except EOFError:
            return
        problem = None
        try:
            train(*job)
        except Exception as error:
            problem = str(error) or type(error).__name__
        link.send(problem)


def _end_with_parent() -> None:
    """An orphan would go on writing into the folder of a run that its successor resumes."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)

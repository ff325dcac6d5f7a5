"""Code in the two processes of a group."""

import os
import subprocess
import sys
from pathlib import Path


def on_two_ranks(code: str, folder: Path, *flags: str) -> list[subprocess.CompletedProcess[str]]:
    """Run code whose arguments are its rank and the file of the group's store."""
    command = [sys.executable, *flags, "-c", code]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=240) for process in running]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(running, printed, strict=True)
    ]

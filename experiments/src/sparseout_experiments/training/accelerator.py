"""Accelerate, set up for one run and taken down again."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparseout_experiments.options import Config

if TYPE_CHECKING:
    from accelerate import Accelerator


def accelerator_for(config: Config, folder: Path) -> "Accelerator":
    """An Accelerator for the device, the precision and the tracker of a run. Raises ValueError."""
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers

    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected `device` to be cpu, since torch finds no CUDA device, but got 'cuda'")
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    if cpu and config.precision == "fp16":
        raise ValueError("expected `precision` to be fp32 or bf16 on a CPU, but got 'fp16'")
    installed = [str(name) for name in get_available_trackers()]
    if config.track is not None and config.track not in installed:
        names = ", ".join(installed) or "none"
        raise ValueError(f"expected `track` to be a tracker that is installed ({names}), but got {config.track!r}")
    mixed = "no" if config.precision == "fp32" else config.precision
    return Accelerator(cpu=cpu, mixed_precision=mixed, log_with=config.track, project_dir=folder)


def release(accelerator: "Accelerator") -> None:
    """Accelerate keeps its settings for the process; the next run may have others."""
    from accelerate.state import AcceleratorState

    if accelerator.num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)

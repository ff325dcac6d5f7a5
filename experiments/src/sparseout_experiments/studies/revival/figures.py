"""The figure: live units over the epochs of training, with revival and without."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sparseout_experiments.studies.engine.style import CYCLE
from sparseout_experiments.studies.revival.training import ARMS


def course(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """The part of the units that are live against the epoch, a panel a task, a line a run."""
    figure = Figure((9.2, 3.4), layout="constrained")
    panels = figure.subplots(1, len(frames), squeeze=False)[0]
    for panel, (title, frame) in zip(panels, frames.items(), strict=True):
        for colour, arm in zip(CYCLE, ARMS, strict=False):
            for index, values in enumerate(frame[frame["arm"] == arm]["course"]):
                epochs = np.arange(1, len(values) + 1)
                label = None if index else f"revived {arm}" if arm != "never" else arm
                panel.plot(epochs, 100 * np.array(values), color=colour, linewidth=0.9, label=label)
        panel.set(title=title, xlabel="epoch", ylabel="live units, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS))
    return figure

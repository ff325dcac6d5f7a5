"""Health checks of a run: losses that are not finite or diverge, and results that mislead."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

# A run has diverged when the mean loss of a window is so many times that of the best window before it.
WINDOW, DIVERGED = 50, 10.0
MOSTLY_DEAD = 0.5  # fraction of dead units in one module
UNDEFINED = 0.01  # fraction of rows in one module without a measure
NORM_GAP = 0.02  # between errors with the statistics of batch norm as trained and re-estimated without noise


class LossCheck:
    """The losses of a run, window by window."""

    def __init__(self, best: float = math.inf, window: Sequence[float] = ()) -> None:
        self.best = best  # the mean of the best window so far
        self._window = list(window)

    def state(self) -> dict[str, Any]:
        """The arguments that make one that goes on from here."""
        return {"best": self.best, "window": list(self._window)}

    def update(self, losses: list[float], first_step: int) -> str | None:
        """Take the losses of the steps from `first_step` on; return a sentence if the run must stop."""
        for step, loss in enumerate(losses, first_step):
            if not math.isfinite(loss):
                return f"the loss of step {step} is {loss}"
            self._window.append(loss)
            if len(self._window) == WINDOW:
                mean = sum(self._window) / WINDOW
                self._window.clear()
                if mean > DIVERGED * self.best:
                    return (
                        f"training diverged: the mean loss of the {WINDOW} steps up to step {step} is {mean:.4g}, "
                        f"{mean / self.best:.0f} times that of the best {WINDOW} steps before"
                    )
                self.best = min(self.best, mean)
        return None


def warnings(sparsity: Mapping[str, Mapping[str, float]], test: Mapping[str, float]) -> list[str]:
    """Cautions about a result whose numbers do not mean what they seem to."""
    sentences = []
    for module, measured in sparsity.items():
        dead = measured["dead_units"] / measured["units"]
        undefined = measured["undefined_rows"] / measured["rows"]
        if dead > MOSTLY_DEAD:
            over = f"{measured['rows']:,.0f} rows"
            sentences.append(
                f"{dead:.0%} of the units of {module} are dead over {over}: much of its sparsity is theirs"
            )
        if undefined > UNDEFINED:
            sentences.append(
                f"{undefined:.1%} of the rows of {module} are all zero and have no measure: its means leave them out"
            )
    if "error_as_trained" in test and abs(gap := test["error_as_trained"] - test["error"]) > NORM_GAP:
        sentences.append(
            f"the statistics of batch norm as trained, with noise, change the test error by {100 * gap:+.1f} points "
            "against those re-estimated without it"
        )
    return sentences

"""Steps: the one that a call of a module belongs to, and whether it is watched."""

from __future__ import annotations

MODES = ("train", "eval")


class StepCounter:
    """Counts the steps of training and of evaluation, of which the first and every `every`-th after it is watched.

    A step is one call of the model. Where only parts of it are called it lasts until the part that began it is called
    again. Each mode has steps of its own, and a part belongs to the mode that it is in itself: what is in evaluation
    mode inside a model that trains, as frozen layers are, begins or goes on with a step of evaluation.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.latest = MODES[0]  # the mode of the step begun last
        self.counts = {mode: [0, 0] for mode in MODES}  # watched, of how many
        self._open: dict[str, str | None] = {}  # by mode, the part that began its present step; None: the model did
        self._watched = dict.fromkeys(MODES, False)
        self._calls: list[bool] = []  # of the model, that are open, and whether they count

    def enter(self, training: bool, counts: bool = True) -> None:
        """Count a call of the model. Calls within a call are of the same step; some calls do not count."""
        if counts and not any(self._calls):
            self._open = {}
            self._begin(_mode(training), None)
        self._calls.append(counts)

    def leave(self) -> None:
        """End a call of the model, after an error too."""
        if self._calls:
            self._calls.pop()

    def part(self, name: str, training: bool) -> bool:
        """Count a call of a part. Returns whether it is in a watched step."""
        mode = _mode(training)
        if any(self._calls):
            if mode not in self._open:
                self._begin(mode, None)
        elif self._open.get(mode) in (None, name):
            self._begin(mode, name)
        return self._watched[mode]

    def watches(self, mode: str) -> bool:
        """Whether the step begun last is one of this mode, and watched."""
        return self.latest == mode and self._watched[mode]

    def number(self, training: bool) -> int:
        """The number of the present step of a mode, from 1."""
        return self.counts[_mode(training)][1]

    def reset(self, mode: str) -> None:
        """Count the steps of a mode from 0: the next is watched."""
        self.counts[mode] = [0, 0]

    def close(self) -> None:
        """Let the next call begin a step."""
        self._open, self._calls = {}, []

    def _begin(self, mode: str, opener: str | None) -> None:
        watched, total = self.counts[mode]
        self._watched[mode] = total % self.every == 0
        self.counts[mode] = [watched + self._watched[mode], total + 1]
        self._open[mode] = opener
        self.latest = mode


def _mode(training: bool) -> str:
    return MODES[0] if training else MODES[1]

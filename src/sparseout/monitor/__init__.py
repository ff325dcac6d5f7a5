"""Monitor of the activations of a model: how sparse they are, and which units are dead."""

# By this name models are pickled that were watched at the time, up to 0.1.
from sparseout._utils.hooks import DeadHook as _Unwatched  # noqa: F401
from sparseout.monitor._monitor import SparsityMonitor
from sparseout.monitor._report import SparsityReport
from sparseout.monitor._revive import RevivalReport, revive_

__all__ = ["RevivalReport", "SparsityMonitor", "SparsityReport", "revive_"]

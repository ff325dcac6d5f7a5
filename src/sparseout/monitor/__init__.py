"""What the activations of a model look like while it runs."""

from sparseout.monitor._monitor import SparsityMonitor
from sparseout.monitor._report import SparsityReport

__all__ = ["SparsityMonitor", "SparsityReport"]

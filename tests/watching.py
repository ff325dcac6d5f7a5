"""Small models to watch, and a look-up of the records of a report."""

from torch import nn

from sparseout import Sparseout

NAMES = ("hoyer", "gini", "density")


def dense(**noise):
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Sparseout(0.5, **noise), nn.Linear(8, 4), nn.Tanh())


def only(report, **wanted):
    """The one record that has these values."""
    (record,) = (r for r in report if all(r[key] == value for key, value in wanted.items()))
    return record


def windows(report):
    return report.steps["train"], report.steps["eval"]

"""Measures of sparsity: functions of a row, and their accumulation over a stream."""

from sparseout.measures._functions import MEASURES, density, gini, hoyer, kurtosis, sparsity, treves_rolls
from sparseout.measures._streaming import Streaming

__all__ = ["MEASURES", "Streaming", "density", "gini", "hoyer", "kurtosis", "sparsity", "treves_rolls"]

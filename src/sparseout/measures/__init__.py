"""Measures of sparsity: functions of a row, and their accumulation over a stream."""

from sparseout.measures._functions import MEASURES, Streaming, density, gini, hoyer, kurtosis, sparsity, treves_rolls

__all__ = ["MEASURES", "Streaming", "density", "gini", "hoyer", "kurtosis", "sparsity", "treves_rolls"]

"""Conversion of dropout layers into Sparseout layers and back, insertion, noise on and off, batch-norm statistics."""

from sparseout.convert._batch_norm import recalibrate_norm_
from sparseout.convert._dropout import convert_dropout_, revert_, set_q_
from sparseout.convert._insertion import insert_after_
from sparseout.convert._noise_switch import noise_
from sparseout.convert._report import ConversionReport

__all__ = ["ConversionReport", "convert_dropout_", "insert_after_", "noise_", "recalibrate_norm_", "revert_", "set_q_"]

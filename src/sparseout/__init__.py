"""The sparsity dial for PyTorch: Dropout with an exponent q that makes activations sparser or denser."""

from sparseout import baselines, inference, measures, theory
from sparseout._utils import old_names
from sparseout._utils.row_mask import row_mask
from sparseout.control import Knob, SparsityController, schedules
from sparseout.convert import (
    ConversionReport,
    convert_dropout_,
    insert_after_,
    noise_,
    recalibrate_norm_,
    revert_,
    set_q_,
)
from sparseout.functional import sparseout as sparseout  # not for a star import, where it would hide the package
from sparseout.kernels.backends import Backend, backend
from sparseout.layers import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d
from sparseout.monitor import RevivalReport, SparsityMonitor, SparsityReport, revive_

__all__ = [
    "Backend",
    "ConversionReport",
    "Knob",
    "RevivalReport",
    "Sparseout",
    "Sparseout1d",
    "Sparseout2d",
    "Sparseout3d",
    "SparsityController",
    "SparsityMonitor",
    "SparsityReport",
    "backend",
    "baselines",
    "convert_dropout_",
    "inference",
    "insert_after_",
    "measures",
    "noise_",
    "recalibrate_norm_",
    "revert_",
    "revive_",
    "row_mask",
    "schedules",
    "set_q_",
    "theory",
]
__version__ = "0.1.0"
old_names.register()

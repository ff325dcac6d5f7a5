"""The sparsity dial for PyTorch: Dropout with an exponent q that makes activations sparser or denser."""

from sparseout import measures
from sparseout.functional import sparseout
from sparseout.kernels.backends import Backend, backend
from sparseout.layers import Sparseout, Sparseout1d, Sparseout2d, Sparseout3d

__all__ = ["Backend", "Sparseout", "Sparseout1d", "Sparseout2d", "Sparseout3d", "backend", "measures", "sparseout"]
__version__ = "0.1.0"

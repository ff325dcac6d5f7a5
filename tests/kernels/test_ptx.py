"""The kernel compiles for GPUs that are not at hand, and as it is meant to: wide loads, no detour through memory."""

import pytest

from sparseout.kernels import reference  # noqa: F401

triton = pytest.importorskip("triton", reason="triton is not installed: its kernel was not compiled")

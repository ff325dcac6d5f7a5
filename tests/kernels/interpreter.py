"""The Triton kernel where it can run: natively on a GPU, else in Triton's interpreter."""

import importlib
import os
import sys
from contextlib import contextmanager
from unittest import mock

import torch

import sparseout  # noqa: F401  # its package must be there

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_MODULES = ("sparseout.kernels.triton_kernels", "sparseout.kernels.cuda")


@contextmanager
def launchers():
    """The module that launches the kernel, on `DEVICE`."""
    if DEVICE == "cuda":
        yield importlib.import_module(_MODULES[1])
        return
    before = {name: sys.modules.pop(name, None) for name in _MODULES}
    _forget()
    try:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            module = importlib.import_module(_MODULES[1])
        # The interpreter knows Triton's own reductions, and takes others element by element.
        larger, plus = module.kernels._larger, module.kernels._plus
        standard = importlib.import_module("triton.language.standard")
        # What a kernel calls finds the language replaced already; the interpreter would do so again at every call.
        interpreted = importlib.import_module("triton.runtime.interpreter").InterpretedFunction
        call = mock.patch.object(interpreted, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
        with call, mock.patch.multiple(standard, _elementwise_max=larger, _sum_combine=plus):
            yield module
    finally:
        _forget()
        sys.modules.update({name: module for name, module in before.items() if module is not None})


def _forget():
    for name in _MODULES:
        sys.modules.pop(name, None)
        vars(sys.modules["sparseout.kernels"]).pop(name.rpartition(".")[2], None)

"""Compiled code after a change that the compiler does not look for."""

import torch

from sparseout._utils.torch_internals import compiler_loaded


def reset_compiler() -> None:
    """Code compiled before a change of hooks would not see it."""
    if compiler_loaded():
        torch.compiler.reset()

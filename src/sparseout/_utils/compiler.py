"""Compiled code after a change that the compiler does not look for."""

import sys

import torch


def reset_compiler() -> None:
    """Code compiled before a change of hooks would not see it."""
    if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing the compiler takes seconds
        torch.compiler.reset()

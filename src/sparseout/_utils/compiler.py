"""Reset of compiled code after changes that the compiler does not detect."""

import torch

from sparseout._utils.torch_internals import compiler_loaded


def reset_compiler() -> None:
    """Discard compiled code, which would not see that hooks or classes have changed."""
    if compiler_loaded():
        torch.compiler.reset()

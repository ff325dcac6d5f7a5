"""Activations as of a ReLU, and value and gradient of a function of them."""

import torch

from sparseout import sparseout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def post_relu(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).relu().to(dtype)


def value_and_gradient(x, *args, upstream=None, **kwargs):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = sparseout(x, *args, **kwargs)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y) if upstream is None else upstream)
    return y.detach(), gradient

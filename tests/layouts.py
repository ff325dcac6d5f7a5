"""Tensors of one shape in every kind of memory."""

import torch


def layouts(*shape, dtype=torch.float32):
    """By name: dense in every order, strided, overlapping."""
    dims = range(len(shape))
    x = torch.randn(shape, dtype=dtype)
    yield "contiguous", x
    yield "reversed", x.permute(*reversed(dims)).contiguous().permute(*reversed(dims))
    if len(shape) in (4, 5):
        channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        yield "channels_last", x.contiguous(memory_format=channels_last)
    large = torch.randn([2 * size for size in shape], dtype=dtype)
    yield "every other", large[tuple(slice(None, None, 2) for _ in dims)]
    yield "a part", large[tuple(slice(size) for size in shape)]
    yield "expanded", x[:1].expand(shape)
    if len(shape) > 1:
        yield (
            "a part of a transposed",
            large.transpose(0, 1).contiguous().transpose(0, 1)[tuple(slice(1, 1 + size) for size in shape)],
        )
        yield "overlapping", torch.randn(sum(shape), dtype=dtype).as_strided(shape, [1] * len(shape))


def fresh(x):
    """A leaf of the same values and the same strides."""
    return x.detach().as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_()


def strides(x):
    """Those that say where elements lie."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]

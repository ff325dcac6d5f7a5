"""The only random code: a boolean mask, or the noise made of it, from (seed, shape, p).

The mask is False with probability `effective_p(p)` and a pure function of its arguments: the same on every device,
eager or compiled, with no generator to advance and no host sync. The bits are a hash of the seed and the position,
so that any block of them can be made, or made again, alone. Draws are integers, so that a small p is met in every
dtype: 16 bits an element, or 32 where p is within 1% of 0 or 1 and 16 would be coarse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def bits_and_threshold(p: float) -> tuple[int, int]:
    """The bits of a draw, and the threshold below which it drops an element, for 0 < p < 1."""
    bits = 16 if 0.01 <= p <= 0.99 else 32
    return bits, min(max(round(p * (1 << bits)), 1), (1 << bits) - 1)


def effective_p(p: float) -> float:
    """The probability that the draws realise, for 0 < p < 1: `p` rounded to 2^-16 or 2^-32, never 0 or 1.

    The noise is computed with this value, so that its mean is exactly 0.
    """
    bits, threshold = bits_and_threshold(p)
    return threshold / (1 << bits)


_P = TypeVar("_P", float, Tensor)


def variance(p: _P) -> _P:
    """The variance p / (1 - p) of the noise, which is also what xi is where the mask keeps."""
    return p / (1 - p)


def make(seed: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """The mask of the given `shape`, on the device of the 0-d int64 `seed`."""
    bits, threshold = bits_and_threshold(p)
    size = math.prod(shape)
    drawn = words(seed, -(-size * bits // 64))
    narrow = torch.int16 if bits == 16 else torch.int32
    # The lowest bits of a word come first. A view as `narrow` would do, but does not run under vmap in torch 2.8.
    draws = torch.stack([(drawn >> shift).to(narrow) for shift in range(0, 64, bits)], dim=-1)
    return (draws.flatten()[:size] >= signed(threshold, bits)).view(list(shape))


def signed(threshold: int, bits: int) -> int:
    """The threshold of draws that are read as signed integers."""
    return threshold - (1 << (bits - 1))


def words(seed: Tensor, count: int, first: int = 0) -> Tensor:
    """`count` random int64 words from number `first` on: the SplitMix64 stream whose state begins at the mixed seed.

    Source: Steele, Lea & Flood (2014), Fast splittable pseudorandom number generators, section 4.
    """
    index = torch.arange(first + 1, first + count + 1, device=seed.device)
    return _mix_(_mix_(seed + _int64(_GOLDEN)) + index.mul_(_int64(_GOLDEN)))


def _int64(word: int) -> int:
    word &= _WORD
    return word - 2**64 if word >= 2**63 else word


def _mix_(word: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit words in which every input bit moves every output bit."""
    for shift, factor in _ROUNDS:
        # >> on int64 copies the sign, and what it copied is cut off.
        word.bitwise_xor_((word >> shift).bitwise_and_((1 << (64 - shift)) - 1))
        if factor != 1:
            word.mul_(_int64(factor))
    return word


def runs(shape: Sequence[int], shared_dims: Sequence[int]) -> list[tuple[int, bool]]:
    """The sizes of the runs of neighbouring dims that are all shared, or none of them, outermost first."""
    result: list[tuple[int, bool]] = []
    for dim, size in enumerate(shape):
        shared = dim in shared_dims
        if result and result[-1][1] == shared:
            result[-1] = (result[-1][0] * size, shared)
        elif size != 1:
            result.append((size, shared))
    return result

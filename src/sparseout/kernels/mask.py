"""The only random code: a boolean mask, or the noise made of it, from (seed, shape, p).

The mask is False with probability `effective_p(p)` and a pure function of its arguments: the same on every device,
eager or compiled, with no generator to advance and no host sync. The bits are a hash of the seed and the position,
so that any block of them can be made, or made again, alone. Draws are integers, so that a small p is met in every
dtype: 16 bits an element, or 32 where p is within 1% of 0 or 1 and 16 would be coarse.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def bits_and_threshold(p: float) -> tuple[int, int]:
    """How many bits a draw has, and below which draw an element is dropped, for 0 < p < 1."""
    bits = 16 if 0.01 <= p <= 0.99 else 32
    return bits, min(max(round(p * (1 << bits)), 1), (1 << bits) - 1)


def effective_p(p: float) -> float:
    """The probability that the draws realise, for 0 < p < 1: `p` rounded to 2^-16 or 2^-32, never 0 or 1.

    The noise is computed with this value, so that its mean is exactly 0.
    """
    bits, threshold = bits_and_threshold(p)
    return threshold / (1 << bits)


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


def words(seed: Tensor, count: int) -> Tensor:
    """`count` random int64 words: the SplitMix64 stream whose state begins at the mixed seed.

    Source: Steele, Lea & Flood (2014), Fast splittable pseudorandom number generators, section 4.
    """
    index = torch.arange(1, count + 1, device=seed.device)
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


# The same noise on a CPU, where the host knows the seed.

MANY = 1 << 18  # elements that `noise` makes at most
_FEW = 512  # elements: up to here the number of calls is what they cost, and Python's own integers are quicker


def key(seed: int) -> int:
    """The state at which the stream of a `seed` begins."""
    return _mix(seed + _GOLDEN & _WORD, _WORD)


def noise(key: int, p: float, dtype: torch.dtype, start: int, count: int) -> Tensor:
    """The noise xi, p / (1 - p) or -1, of up to `MANY` elements from element `start` on, a multiple of 4."""
    bits, threshold = bits_and_threshold(p)
    kept = threshold / ((1 << bits) - threshold)
    state = key + start * bits // 64 * _GOLDEN & _WORD
    size = -(-count * bits // 64)
    if count <= _FEW and bits == 16 and dtype == torch.float32:
        return _few(state, count, threshold, kept)
    drawn = _mix_(_steps()[:size] + _int64(state)).view(torch.int16 if bits == 16 else torch.int32)[:count]
    # Compared straight into floats, several times quicker than by way of booleans: 1 where kept, 0 elsewhere.
    xi = torch.ge(drawn, signed(threshold, bits), out=torch.empty(count, dtype=dtype, device="cpu"))
    return torch.threshold_(xi.mul_(kept), 0.0, -1.0)


def _few(state: int, count: int, threshold: int, kept: float) -> Tensor:
    """The noise of a `count` of fp32. One integer holds all of it: in 128 bits each a word, and then its four xi."""
    size = -(-count // 4)
    below = (1 << 128 * size) - 1
    ones, steps, fours = (lanes & below for lanes in _lanes())
    words = _mix(ones * state + steps & ones * _WORD, ones * _WORD)
    drawn = 0
    for shift in (0, 16, 32, 48):
        drawn |= (words & ones * (0xFFFF << shift)) << shift
    # With its sign bit flipped a signed draw counts from 0, and a carry then says that it is not below the threshold.
    keep = (drawn ^ fours * 0x8000) + fours * (0x10000 - threshold) >> 16 & fours
    high, low = (int.from_bytes(struct.pack("<f", value), "little") for value in (-1.0, kept))
    xi = bytearray((fours * high - keep * (high - low)).to_bytes(16 * size, "little"))
    return torch.frombuffer(xi, dtype=torch.float32, count=count)


def _mix(word: int, lanes: int) -> int:
    """`_mix_` of one word, or of one in each of the `lanes`: twice as wide, so that its products have room."""
    for shift, factor in _ROUNDS:
        word = (word ^ word >> shift & lanes) * factor & lanes
    return word


@functools.cache
def _steps() -> Tensor:
    return torch.arange(1, MANY // 2 + 1, device="cpu") * _int64(_GOLDEN)


@functools.cache
def _lanes() -> tuple[int, int, int]:
    ones = sum(1 << 128 * lane for lane in range(_FEW // 4))
    steps = sum((lane + 1) * _GOLDEN % 2**64 << 128 * lane for lane in range(_FEW // 4))
    return ones, steps, ones * (1 | 1 << 32 | 1 << 64 | 1 << 96)

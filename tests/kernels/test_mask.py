"""The random code: rates and independence."""

import math
import os

import pytest
import torch

from sparseout.kernels import mask as masks

N = 400_000


def bits(seed, n=N):
    """n signs of +-1 from the 16-bit draws."""
    draws = masks.words(torch.tensor(seed), -(-n // 4)).view(torch.int16)[:n]
    return torch.where(draws >= 0, 1.0, -1.0)


def correlation(a, b):
    """In standard errors of independent signs."""
    return abs((a * b).mean().item()) * math.sqrt(len(a))


def test_every_bit_of_every_word_is_fair():
    words = masks.words(torch.tensor(3), N)
    for bit in range(64):
        ones = ((words >> bit) & 1).float().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(N)


def test_no_correlation_between_positions():
    signs = bits(12)
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 128, 256, 623, 624, 625, 1024, 4096):
        assert correlation(signs[:-lag], signs[lag:]) < 5


@pytest.mark.parametrize("seed", [0, 1, -1, 123456789, 2**62])
def test_no_correlation_between_seeds(seed):
    base = bits(seed)
    for other in (
        seed + 1,
        seed - 1,
        seed + 2**16,
        seed ^ 2**31,
        seed ^ 2**32,
        seed ^ (5 * 2**32),
        -seed - 1,
    ):
        assert not torch.equal(base, bits(other))
        assert correlation(base, bits(other)) < 5
        assert correlation(base[:-1], bits(other)[1:]) < 5


def test_no_correlation_between_calls():
    from sparseout import sparseout

    calls = [sparseout(torch.ones(N), 0.5, 1.0) - 1 for _ in range(6)]
    for i in range(6):
        for j in range(i):
            assert correlation(calls[i], calls[j]) < 5


@pytest.mark.parametrize("p", [1e-12, 1e-9, 0.001, 0.00999, 0.01, 1 / 3, 0.5, 0.99, 0.9901, 1 - 1e-12])
def test_effective_p_is_p_to_the_width_of_the_draw(p):
    effective = masks.effective_p(p)
    assert 0 < effective < 1
    assert abs(effective - p) <= (2**-17 if 0.01 <= p <= 0.99 else 2**-32)


@pytest.mark.parametrize("p", [0.001, 0.01, 0.3, 0.99, 0.9999])
def test_mask_is_false_at_the_effective_rate(p):
    n = 2_000_000
    mask = masks.make(torch.tensor(4), (2, n // 2), p)
    assert mask.shape == (2, n // 2)
    assert mask.dtype == torch.bool
    rate = masks.effective_p(p)
    assert abs((~mask).sum().item() - n * rate) < 5 * math.sqrt(n * rate * (1 - rate))


def test_thresholds_use_the_whole_range_of_draws(monkeypatch):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(masks, "words", lambda seed, count: every)
    for p in (0.01, 0.3, 0.5, 0.99):
        dropped = (~masks.make(torch.tensor(0), (2**16,), p)).sum().item()
        assert dropped / 2**16 == masks.effective_p(p)


def test_the_hash_is_splitmix64():
    # The generator of Steele, Lea & Flood in Python's integers, from the state that the seed is mixed into.
    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    # Its published first output from state 0.
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    for seed in (0, 1, -1, 2**62 + 3):
        state = mix((seed + 0x9E3779B97F4A7C15) % 2**64)
        expected = [mix((state + i * 0x9E3779B97F4A7C15) % 2**64) for i in range(1, 50)]
        assert [word % 2**64 for word in masks.words(torch.tensor(seed), 49).tolist()] == expected


@pytest.mark.parametrize("p", [0.001, 0.5])
def test_a_shorter_mask_is_a_prefix_of_a_longer_one(p):
    long = masks.make(torch.tensor(9), (1001,), p)
    assert torch.equal(masks.make(torch.tensor(9), (77,), p), long[:77])


AVAILABLE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.slow
@pytest.mark.skipif(AVAILABLE < 20, reason=f"a mask of 2^31 elements needs 20 GiB, and {AVAILABLE:.0f} are free")
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 5
    mask = masks.make(torch.tensor(1), (n,), 0.5)
    tail = mask[-1_000_000:].float().mean().item()
    assert mask.numel() == n
    assert abs(tail - 0.5) < 5 * 0.5 / 1000

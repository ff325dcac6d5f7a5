"""The random code: rates, independence, and the two sources of bits."""

import math

import pytest
import torch
from sparseout.kernels import mask as masks

N = 400_000
SOURCES = [masks._generated, masks._hashed]


def bits(source, seed, n=N):
    """n signs of +-1 from the 16-bit draws of a source."""
    draws = source(torch.tensor(seed), -(-n // 4)).view(torch.int16)[:n]
    return torch.where(draws >= 0, 1.0, -1.0)


def correlation(a, b):
    """In standard errors of independent signs."""
    return abs((a * b).mean().item()) * math.sqrt(len(a))


@pytest.mark.parametrize("source", SOURCES)
def test_every_bit_of_every_word_is_fair(source):
    words = source(torch.tensor(3), N)
    for bit in range(64):
        ones = ((words >> bit) & 1).float().mean().item()
        assert abs(ones - 0.5) < 5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("source", SOURCES)
def test_no_correlation_between_positions(source):
    signs = bits(source, 12)
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 128, 256, 623, 624, 625, 1024, 4096):
        assert correlation(signs[:-lag], signs[lag:]) < 5


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("seed", [0, 1, -1, 123456789, 2**62])
def test_no_correlation_between_seeds(source, seed):
    base = bits(source, seed)
    for other in (seed + 1, seed - 1, seed + 2**16, seed ^ 2**31, seed ^ 2**32, seed ^ (5 * 2**32), -seed - 1):
        assert not torch.equal(base, bits(source, other))
        assert correlation(base, bits(source, other)) < 5
        assert correlation(base[:-1], bits(source, other)[1:]) < 5


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


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("p", [0.001, 0.01, 0.3, 0.99, 0.9999])
def test_mask_is_false_at_the_effective_rate(source, p, monkeypatch):
    monkeypatch.setattr(masks, "_generated", source)
    n = 2_000_000
    mask = masks.make(torch.tensor(4), (2, n // 2), p)
    assert mask.shape == (2, n // 2)
    assert mask.dtype == torch.bool
    rate = masks.effective_p(p)
    assert abs((~mask).sum().item() - n * rate) < 5 * math.sqrt(n * rate * (1 - rate))


def test_thresholds_use_the_whole_range_of_draws(monkeypatch):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.int64)
    monkeypatch.setattr(masks, "_generated", lambda seed, count: every)
    for p in (0.01, 0.3, 0.5, 0.99):
        dropped = (~masks.make(torch.tensor(0), (2**16,), p)).sum().item()
        assert dropped / 2**16 == masks.effective_p(p)


def test_the_hash_is_splitmix64():
    # First outputs of the reference generator of Steele, Lea & Flood from state 0, as published widely.
    state = torch.tensor(0)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    words = masks._mix(torch.arange(1, 4) * masks._GOLDEN + state)
    assert [word % 2**64 for word in words.tolist()] == expected


@pytest.mark.parametrize("p", [0.001, 0.5])
def test_a_shorter_mask_is_a_prefix_of_a_longer_one(p):
    long = masks.make(torch.tensor(9), (1001,), p)
    assert torch.equal(masks.make(torch.tensor(9), (77,), p), long[:77])


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 5
    mask = masks.make(torch.tensor(1), (n,), 0.5)
    tail = mask[-1_000_000:].float().mean().item()
    assert mask.numel() == n
    assert abs(tail - 0.5) < 5 * 0.5 / 1000

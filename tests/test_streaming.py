"""Streams of measures: chunks, merges and sums equal the whole, on either axis."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive import FUNCTIONS, KINDS, ONES, fast, naive, sparse_data

from sparseout.measures import MEASURES, Streaming, hoyer

GINI = "expected `axis` to be 'population' for gini, but got 'lifetime'"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"measures": ("hoyer", "l1")}, ValueError, f"expected `measures` to be among {KINDS}, but got 'l1'"),
        ({"measures": "hoyer"}, TypeError, "expected `measures` to be a sequence of names, but got 'hoyer'"),
        ({"measures": 1}, TypeError, "expected `measures` to be a sequence of names, but got 1"),
        ({"relative": 1}, TypeError, "expected `relative` to be a bool, but got an int"),
        ({"axis": "time"}, ValueError, "expected `axis` to be 'population' or 'lifetime', but got 'time'"),
        ({"unit_dim": 1.0}, TypeError, "expected `unit_dim` to be an int, but got a float"),
        ({"measures": ("gini",), "axis": "lifetime"}, ValueError, GINI),
    ],
)
def test_bad_streams(options, error, text):
    with pytest.raises(error) as caught:
        Streaming(**options)
    assert str(caught.value) == text


def test_errors_leave_a_stream_as_it_was():
    stream, other, wide = Streaming(unit_dim=1), Streaming(eps=1.0), Streaming()
    stream.update(ONES)
    wide.update(torch.ones(2, 4))
    before = stream.state()
    attempts = [
        (stream.update, torch.ones(2, 4), ValueError, "expected `x` to be of 3 units, but got 4"),
        (stream.update, torch.ones(3), ValueError, "expected `unit_dim` to be in [-1, 0], but got 1"),
        (stream.update, [1.0], TypeError, "expected `x` to be a floating-point tensor, but got a list"),
        (stream.merge, wide, ValueError, "expected `other` to be of 3 units, but got 4"),
        (stream.merge, {}, TypeError, "expected `other` to be a Streaming, but got a dict"),
    ]
    for call, argument, error, text in attempts:
        with pytest.raises(error) as caught:
            call(argument)
        assert str(caught.value) == text
    with pytest.raises(ValueError, match=r"^expected `other` to be a Streaming of .*, but got one of "):
        stream.merge(other)
    keys = "['active', 'density', 'hoyer', 'ratio', 'rows', 'treves_rolls', 'undefined_rows']"
    with pytest.raises(ValueError, match="expected `state`") as caught:
        stream.load_state({"rows": torch.ones(())})
    assert str(caught.value) == f"expected `state` to be a dict of {keys}, but got one of ['rows']"
    assert stream.state().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in stream.state().items())


# ------------------------------------------------------------------------------------------ streams

ALL = tuple(MEASURES)


LIFETIME = tuple(name for name in MEASURES if name != "gini")


def whole(x, axis, eps=0.0, relative=False):
    """What a stream must give for `x`, (samples, units), from the functions on all of it at once."""
    dim = {"population": -1, "lifetime": 0}[axis]
    expected = {}
    for name, f in FUNCTIONS.items():
        if name == "gini" and axis == "lifetime":
            continue
        if not MEASURES[name].zero_defined:
            expected[name] = f(x, dim).nanmean().item()
    limit = eps * x.square().mean(-1, keepdim=True).sqrt() if relative else eps
    active = x.abs() > limit
    expected["density"] = active.double().mean().item()  # the same on both axes
    expected["sparsity"] = 1 - expected["density"]
    expected |= {
        "rows": len(x),
        "undefined_rows": int((x == 0).all(-1).sum()),
        "units": x.shape[1],
        "dead_units": int((~active.any(0)).sum()),
        "always_on_units": int(active.all(0).sum()),
    }
    if eps == 0 or axis == "lifetime":
        expected["hoyer_live"] = hoyer(x[:, active.any(0)], dim).nanmean().item()
    return expected


def numbers(stream):
    return {name: value.item() for name, value in stream.compute().items()}


def data_with_everything(dtype=torch.float64):
    x = sparse_data(41, 12, seed=3, zeros=0.6, dtype=dtype)
    x[:, [2, 7, 11]] = 0  # dead units
    x[:, 5] = x[:, 5].abs() + 0.5  # always on, but for the rows that come next
    x[[0, 13, 40]] = 0  # undefined rows
    x[:, 9] *= 0.01  # dead at eps = 0.1
    return x


def streams(x, **options):
    measures_ = LIFETIME if options.get("axis") == "lifetime" else ALL
    make = partial(Streaming, measures_, **options)
    one = make()
    one.update(x)
    chunked = make()
    for chunk in x.split([1, 5, 0, 20, 15]):
        chunked.update(chunk)
    parts = [make(), make(), make()]
    for part, chunk in zip(parts, x.split([7, 30, 4]), strict=True):
        part.update(chunk)
    merged = make()  # empty: merging takes over what the other has
    for part in parts:
        merged.merge(part)
    merged.merge(make())  # and merging nothing changes nothing
    summed = make()
    summed.load_state({key: sum(part.state()[key] for part in parts) for key in parts[0].state()})
    return {"one": one, "chunked": chunked, "merged": merged, "summed": summed}


@pytest.mark.parametrize(
    ("axis", "eps", "relative"),
    [
        ("population", 0.0, False),
        ("population", 0.1, False),
        ("population", 0.3, True),
        ("lifetime", 0.0, False),
        ("lifetime", 0.1, False),
        ("lifetime", 0.3, True),
    ],
)
def test_chunks_merges_and_sums_equal_the_whole(axis, eps, relative):
    x = data_with_everything()
    expected = whole(x, axis, eps, relative)
    assert (expected["dead_units"], expected["undefined_rows"]) == (3 + (eps > 0), 3)
    for kind, stream in streams(x, axis=axis, eps=eps, relative=relative).items():
        got = numbers(stream)
        assert got.keys() == expected.keys() | {"hoyer_live"}, kind
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-12), kind


@pytest.mark.parametrize("axis", ["population", "lifetime"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(axis, dtype):
    x = data_with_everything(dtype)
    expected = whole(x.double(), axis)
    for stream in streams(x, axis=axis).values():
        assert numbers(stream) == pytest.approx(expected, rel=1e-6)
        assert all(value.dtype == torch.float64 for value in stream.state().values())


@pytest.mark.parametrize("axis", ["population", "lifetime"])
@fast
@given(seed=st.integers(0, 2**20), zeros=st.floats(0, 0.95), cut=st.integers(0, 8), units=st.integers(2, 6))
def test_random_streams_equal_the_whole(axis, seed, zeros, cut, units):
    x = sparse_data(8, units, seed=seed, zeros=zeros)
    stream = Streaming(LIFETIME if axis == "lifetime" else ALL, axis=axis)
    for chunk in (x[:cut], x[cut:]):
        stream.update(chunk)
    expected = whole(x, axis)
    assert numbers(stream) == pytest.approx(expected, rel=1e-11, abs=1e-13, nan_ok=True)


def test_hoyer_live_sees_through_dead_units():
    x = sparse_data(50, 16, zeros=0.2)
    padded = torch.zeros(50, 64, dtype=torch.float64)
    padded[:, 1::4] = x
    stream = Streaming(("hoyer",))
    stream.update(padded)
    got = numbers(stream)
    assert got["hoyer_live"] == pytest.approx(np.mean([naive("hoyer", r) for r in x.numpy()]), rel=1e-12)
    assert got["hoyer"] == pytest.approx(np.mean([naive("hoyer", r) for r in padded.numpy()]), rel=1e-12)
    assert got["hoyer"] > got["hoyer_live"] + 0.3
    assert got["dead_units"] == 48


def test_hoyer_live_above_a_threshold():
    # Unit 2 is dead at eps = 0.1; what it holds stays in the norms, and n is 2.
    x = torch.tensor([[3.0, 4.0, 0.1], [1.0, 0.0, 0.05]], dtype=torch.float64)
    stream = Streaming(("hoyer",), eps=0.1)
    stream.update(x)
    ratio = np.mean([7.1 / math.sqrt(25.01), 1.05 / math.sqrt(1.0025)])
    expected = (math.sqrt(2) - ratio) / (math.sqrt(2) - 1)
    assert numbers(stream)["hoyer_live"] == pytest.approx(expected, rel=1e-12)
    # The lifetime axis leaves the unit out altogether, while its Hoyer is defined.
    lifetime = Streaming(("hoyer",), axis="lifetime", eps=0.1)
    lifetime.update(x)
    each = [naive("hoyer", column) for column in x.T.numpy()]
    assert numbers(lifetime)["hoyer"] == pytest.approx(np.mean(each), rel=1e-12)
    assert numbers(lifetime)["hoyer_live"] == pytest.approx(np.mean(each[:2]), rel=1e-12)


@pytest.mark.parametrize("live", [0, 1])
def test_hoyer_live_needs_two_live_units(live):
    x = torch.full((4, 3), 0.05)
    x[:, :live] = 2.0
    stream = Streaming(("hoyer",), eps=0.1)
    stream.update(x)
    got = numbers(stream)
    assert math.isnan(got["hoyer_live"])
    assert math.isfinite(got["hoyer"])
    assert got["dead_units"] == 3 - live


@pytest.mark.parametrize("axis", ["population", "lifetime"])
def test_leading_dimensions_and_unit_dim(axis):
    x = sparse_data(2, 3, 4, 5)
    flat = x.permute(0, 2, 3, 1).reshape(-1, 3)
    stream = Streaming(LIFETIME, axis=axis, unit_dim=1)
    stream.update(x.to(memory_format=torch.channels_last))
    last = Streaming(LIFETIME, axis=axis)
    for row in flat:
        last.update(row)  # a single sample, without a batch dimension
    expected = whole(flat, axis)
    expected.pop("gini", None)
    assert numbers(stream) == pytest.approx(expected, rel=1e-12)
    assert numbers(last) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("axis", ["population", "lifetime"])
def test_streams_at_extreme_scales(axis, scale):
    x = data_with_everything(torch.float32) * scale
    expected = whole(x.double() / scale, axis)
    for stream in streams(x, axis=axis).values():
        assert numbers(stream) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-75, 1e75])
def test_lifetime_sums_of_float64_at_the_ends_of_their_range(scale):
    x = data_with_everything()
    x[(x.abs() < 0.5) & (x != 0)] = 0.5
    stream = Streaming(LIFETIME, axis="lifetime")
    stream.update(x.clamp(-0.9, 0.9) * scale)
    assert numbers(stream) == pytest.approx(whole(x.clamp(-0.9, 0.9), "lifetime"), rel=1e-9)


@pytest.mark.parametrize("axis", ["population", "lifetime"])
def test_before_and_after_nothing(axis):
    stream = Streaming(LIFETIME, axis=axis)
    for units in (None, 5):
        if units:
            stream.update(torch.zeros(0, units))
        got = numbers(stream)
        zeros = {"rows": 0, "undefined_rows": 0, "units": units or 0, "dead_units": 0, "always_on_units": 0}
        assert {name: got.pop(name) for name in zeros} == zeros
        assert all(math.isnan(value) for value in got.values())
        assert got.keys() == {*LIFETIME, "hoyer_live"}
    stream.reset()
    assert stream.state() == {}
    stream.load_state({})
    stream.update(torch.zeros(3, 4))  # all dead: only the counts are defined
    got = numbers(stream)
    assert (got["undefined_rows"], got["dead_units"], got["sparsity"], got["density"]) == (3, 4, 1, 0)
    assert all(math.isnan(got[name]) for name in ("hoyer", "treves_rolls", "kurtosis", "hoyer_live"))


@pytest.mark.parametrize("unit_dim", [0, -2])
def test_inside_vmap_the_samples_of_all_examples_count(unit_dim):
    stream, x = Streaming(("hoyer",), unit_dim=unit_dim), torch.rand(5, 4, 3)
    torch.vmap(lambda rows: (stream.update(rows), rows)[1], in_dims=2)(x.permute(1, 2, 0))
    plain = Streaming(("hoyer",), unit_dim=1)
    plain.update(x)
    assert numbers(stream) == numbers(plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("axis", ["population", "lifetime"])
def test_broken_data_are_not_averaged_away(axis, bad):
    x = data_with_everything()
    x[20, 1] = bad
    stream = Streaming(LIFETIME, axis=axis)
    stream.update(x)
    got = numbers(stream)
    assert all(math.isnan(got[name]) for name in (*LIFETIME, "hoyer_live"))
    assert (got["rows"], got["undefined_rows"], got["units"], got["dead_units"]) == (41, 3, 12, 3)


@pytest.mark.parametrize("axis", ["population", "lifetime"])
def test_always_on_units(axis):
    x = torch.tensor([[1.0, 0.0, 0.3], [-2.0, 3.0, 0.3]])
    for eps, expected in ((0.0, 2), (0.3, 1), (2.0, 0)):
        stream = Streaming((), axis=axis, eps=eps)
        stream.update(x)
        assert numbers(stream)["always_on_units"] == expected


@pytest.mark.parametrize("axis", ["population", "lifetime"])
def test_nothing_is_read_on_the_host_and_nothing_is_kept(axis):
    # Tensors on "meta" hold no values: reading one, or branching on one, would raise.
    stream = Streaming(LIFETIME, axis=axis, eps=0.1)
    for _ in range(2):
        stream.update(torch.ones(5, 3, device="meta"))
    assert {value.device.type for value in stream.state().values()} == {"meta"}
    assert all(value.shape == () for value in stream.compute().values())
    stream.reset()
    x = torch.ones(5, 3, requires_grad=True)
    with torch.inference_mode():
        stream.update(x)
    stream.update(x)  # states made in inference mode can be added to outside it
    assert not any(value.requires_grad for value in stream.state().values())
    state = stream.state()
    state["rows"].zero_()  # a copy
    assert numbers(stream)["rows"] == 10

"""The equation as one Triton kernel, x to y or (grad, x) to grad * dy/dx: nothing else touches memory.

Two more kernels make beta for ``scale="matched"``.

The mask is the hash of `mask`, in registers: once for the four 16-bit draws of a word, since neighbours in a thread
share the word and the compiler sees it. Powers come from the hardware's approximate functions: chains of square roots
where 2q is a whole number, and 2^(e log2 u) elsewhere. A root is off by at most 2^-22 of itself and log2 by 2^-22
max(1, |log2 u|), hence u^e by about 2^-22 (1 + 0.7 |e| max(1, |log2 u|)) of itself. They know no denormals, and so
|x / scale_unit| < 2^-126 counts as 0 here, and in a unit above 2^126, of which they do not know the inverse, all x.
"""

import triton
import triton.language as tl

# Constants stand inside the functions: Triton compares globals with what it has compiled, at each launch.


@triton.jit
def _mix(word):
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB
    return word ^ (word >> 31)


@triton.jit
def _keep(seed_ptr, start, offsets, threshold, period, inner, block, row, BITS: tl.constexpr, STEP: tl.constexpr,
          WHOLE: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, MIDDLE: tl.constexpr,
          WIDE: tl.constexpr):  # fmt: skip
    """Whether the mask keeps each element. See `cuda.Sharing` for how an element finds its draw."""
    GOLDEN: tl.constexpr = 0x9E3779B97F4A7C15
    DRAWS: tl.constexpr = 64 // BITS
    element = (start + offsets).to(tl.uint64 if WIDE else tl.uint32)
    index = element // STEP
    if OUTER:
        index %= tl.full((), period, index.dtype)
    if INNER:
        index //= tl.full((), inner, index.dtype)
    if MIDDLE:
        width = tl.full((), row, index.dtype)
        index = index // tl.full((), block, index.dtype) * width + index % width
    draw = (element if WHOLE else index) % DRAWS
    count = (index if WHOLE else index // DRAWS).to(tl.uint64) + 1
    key = _mix(tl.load(seed_ptr).to(tl.uint64) + GOLDEN)
    word = _mix(key + count * GOLDEN)
    # A draw stands in the upper bits of 32. What is below them decides nothing, `threshold` having zeros there.
    if BITS == 32:
        drawn = (word >> (draw * 32).to(tl.uint64)).to(tl.int32)
    else:
        drawn = (word >> (draw // 2 * 32).to(tl.uint64)).to(tl.int32) << ((1 - draw % 2) * 16).to(tl.int32)
    return drawn >= threshold


@triton.jit
def _log2(a, NATIVE: tl.constexpr):
    if NATIVE:  # tl.log2 is a polynomial of 15 instructions
        result = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [a], tl.float32, is_pure=True, pack=1)
    else:
        result = tl.log2(a)
    return result


@triton.jit
def _power(a, e, QUARTERS: tl.constexpr, NATIVE: tl.constexpr):
    """The power a^e of a > 0, where e is QUARTERS / 4 if QUARTERS is from -4 to 8; and of a = 0 if e > 0."""
    if QUARTERS < -4:
        result = tl.exp2(e * _log2(a, NATIVE))
    elif QUARTERS == -4:
        result = 1 / a
    elif QUARTERS == -3:
        root = tl.rsqrt(a)
        result = root * tl.sqrt(root)
    elif QUARTERS == -2:
        result = tl.rsqrt(a)
    elif QUARTERS == -1:
        result = tl.sqrt(tl.rsqrt(a))
    elif QUARTERS == 0:
        result = tl.full(a.shape, 1.0, tl.float32)
    else:
        result = a if QUARTERS >= 4 else tl.full(a.shape, 1.0, tl.float32)
        if QUARTERS == 8:
            result *= a
        elif QUARTERS % 4 > 0:
            root = tl.sqrt(a)
            if QUARTERS % 4 >= 2:
                result *= root
            if QUARTERS % 2 == 1:
                result *= tl.sqrt(root)
    return result


@triton.jit
def _params(params_ptr, half, scale_unit, amplitude, LOADED: tl.constexpr):
    """Half of q, 1 / scale_unit, scale_unit and amplitude: the last LOADED of q and these stand in memory."""
    if LOADED == 3:
        half = tl.load(params_ptr) * 0.5
    if LOADED >= 2:
        scale_unit = tl.load(params_ptr + LOADED - 2)
        amplitude = tl.load(params_ptr + LOADED - 1)
        if LOADED == 3:
            amplitude = tl.where(half == 1, 1.0, amplitude)  # beta is 1 at q = 2, and not up to rounding
    return half, 1 / tl.maximum(scale_unit, 2.0**-126), scale_unit, amplitude


@triton.jit
def _load(ptr, offsets, left, FULL: tl.constexpr):
    values = tl.load(ptr + offsets) if FULL else tl.load(ptr + offsets, mask=offsets < left, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _tile(out_ptr, grad_ptr, x_ptr, seed_ptr, params_ptr, start, left, threshold, kept, half, scale_unit, amplitude,
          period, inner, block, row, LOADED: tl.constexpr, QUARTERS: tl.constexpr, ABOVE_2: tl.constexpr,
          SCALED: tl.constexpr, EXACT: tl.constexpr, LIMIT: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
          WHOLE: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, MIDDLE: tl.constexpr, WIDE: tl.constexpr,
          NATIVE: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    offsets = tl.arange(0, TILE)
    x = _load(x_ptr + start, offsets, left, FULL)
    keep = _keep(
        seed_ptr, start, offsets, threshold, period, inner, block, row, BITS, STEP, WHOLE, OUTER, INNER, MIDDLE, WIDE
    )
    half, inverse, scale_unit, amplitude = _params(params_ptr, half, scale_unit, amplitude, LOADED)
    u = tl.abs(x)
    if SCALED:
        u *= inverse
    zero = u < 2.0**-126
    xi = tl.where(keep, kept, -1.0)
    if grad_ptr is None:
        a = tl.abs(x)
        # Beyond q = 2 the term is x times a power, which overflows only where the product does.
        if LOADED == 3:
            power = tl.exp2(tl.where(half > 1, half - 1, half) * _log2(u, NATIVE))
            term = tl.where(zero, 0.0, power * amplitude * tl.where(half > 1, a, scale_unit))
            term = tl.where(half == 1, a, term)  # q = 2 is Dropout to the last bit, in any unit
        elif ABOVE_2:
            term = _power(tl.where(zero, 0.0, u), half - 1, QUARTERS - 4, NATIVE)
            term *= amplitude * a if SCALED else a
        else:
            term = _power(tl.where(zero, 0.0, u), half, QUARTERS, NATIVE)
            if QUARTERS == 0:
                term = tl.where(zero, 0.0, term)
            if SCALED:
                term *= scale_unit * amplitude
        sign = x.to(tl.int32, bitcast=True) & -(2**31)
        out = x + (term.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True) * xi
    else:
        slope = _power(u, half - 1, QUARTERS - 4, NATIVE)
        if LOADED == 3:
            slope = tl.where(zero, tl.where(half == 1, 1.0, 0.0), slope)
        elif QUARTERS < 4:
            slope = tl.where(zero, 0.0, slope)
        factor = half if EXACT else 1.0
        if SCALED:
            factor *= amplitude
        slope *= xi * factor
        if LIMIT > 0:
            slope = tl.clamp(slope, -LIMIT, LIMIT, tl.PropagateNan.ALL)
        grad = _load(grad_ptr + start, offsets, left, FULL)
        out = grad * (1 + slope)
    out = out.to(out_ptr.dtype.element_ty)
    if FULL:
        tl.store(out_ptr + start + offsets, out)
    else:
        tl.store(out_ptr + start + offsets, out, mask=offsets < left)


@triton.jit(
    do_not_specialize=["n", "threshold", "kept", "half", "scale_unit", "amplitude", "period", "inner", "block", "row"],
    do_not_specialize_on_alignment=["seed_ptr", "params_ptr"],
)
def sparseout(out_ptr, grad_ptr, x_ptr, seed_ptr, params_ptr, n, threshold, kept, half, scale_unit, amplitude, period,
              inner, block, row, LOADED: tl.constexpr, QUARTERS: tl.constexpr, ABOVE_2: tl.constexpr,
              SCALED: tl.constexpr, EXACT: tl.constexpr, LIMIT: tl.constexpr, BITS: tl.constexpr, STEP: tl.constexpr,
              WHOLE: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr, MIDDLE: tl.constexpr,
              WIDE: tl.constexpr, NATIVE: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Writes y of the `n` elements of x or, where there is a grad, grad times dy/dx."""
    start = tl.program_id(0).to(tl.int64) * TILE
    left = n - start
    if left >= TILE:  # without masks, which would keep loads from being as wide as a thread can take
        _tile(out_ptr, grad_ptr, x_ptr, seed_ptr, params_ptr, start, left, threshold, kept, half, scale_unit, amplitude,
              period, inner, block, row, LOADED, QUARTERS, ABOVE_2, SCALED, EXACT, LIMIT, BITS, STEP, WHOLE,
              OUTER, INNER, MIDDLE, WIDE, NATIVE, TILE, True)  # fmt: skip
    else:
        _tile(out_ptr, grad_ptr, x_ptr, seed_ptr, params_ptr, start, left, threshold, kept, half, scale_unit, amplitude,
              period, inner, block, row, LOADED, QUARTERS, ABOVE_2, SCALED, EXACT, LIMIT, BITS, STEP, WHOLE,
              OUTER, INNER, MIDDLE, WIDE, NATIVE, TILE, False)  # fmt: skip


# For scale="matched" sums of (|x| / unit)^2 and (|x| / unit)^q are taken in one read of x, in the unit of the largest
# |x| seen so far, so that nothing overflows. The unit of squares is a power of two; that of powers is the same where
# roots make them, and else the largest |x| itself, as its logarithm: |x| / unit could vanish where its power does not.


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _plus(a, b):
    return a + b


@triton.jit
def _inverse(peak):
    """The power of two that takes `peak` into [1, 4); a denormal peak may stay below, infinity and NaN stay."""
    bits = 0x7F000000 - (peak.to(tl.int32, bitcast=True) & 0x7F800000)
    return tl.maximum(bits, 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def _level(peak, QUARTERS: tl.constexpr, NATIVE: tl.constexpr):
    """log2 of the unit of powers; with QUARTERS >= 0 it is also that of squares."""
    if QUARTERS < 0:
        level = _log2(tl.maximum(peak, 2.0**-126), NATIVE)
    else:
        level = (127 - (_inverse(peak).to(tl.int32, bitcast=True) >> 23)).to(tl.float32)
    return level


@triton.jit
def _in_units_of(top, peak, square, moment, q, QUARTERS: tl.constexpr, NATIVE: tl.constexpr):
    """The sums in the units of a larger peak."""
    shift = _inverse(top).to(tl.int32, bitcast=True) - _inverse(peak).to(tl.int32, bitcast=True)
    ratio = tl.maximum(shift + 0x3F800000, 0).to(tl.float32, bitcast=True)
    factor = tl.exp2(q * (_level(peak, QUARTERS, NATIVE) - _level(top, QUARTERS, NATIVE)))
    return square * ratio * ratio, moment * factor


@triton.jit
def _add(peak, square, moment, x_ptr, left, q, QUARTERS: tl.constexpr, NATIVE: tl.constexpr, LOADS: tl.constexpr,
         THREADS: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """The maxima and sums with those of a tile added: a thread keeps its own, of what it has loaded."""
    column = tl.arange(0, THREADS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    offsets = tl.arange(0, LOADS)[:, None, None] * (THREADS * WIDTH) + column
    a = tl.abs(_load(x_ptr, offsets, left, FULL))
    top = tl.maximum(peak, tl.reduce(tl.reduce(a, 2, _larger), 0, _larger))
    square, moment = _in_units_of(top, peak, square, moment, q, QUARTERS, NATIVE)
    u = a * _inverse(top)[None, :, None]
    if QUARTERS < 0:
        q = tl.maximum(q, 2.0**-126)  # q = 0 too takes the logarithm of 0 to 0, and not to NaN
        power = tl.exp2(q * (_log2(a, NATIVE) - _level(top, QUARTERS, NATIVE)[None, :, None]))
    elif QUARTERS <= 4:
        power = _power(u, q, 2 * QUARTERS, NATIVE)
    else:
        power = u * u * _power(u, q - 2, 2 * QUARTERS - 8, NATIVE)
    if QUARTERS == 0:  # 0^0 counts as 0: sign(0) is 0
        power = tl.where(a < 2.0**-126, 0.0, power)
    square += tl.reduce(tl.reduce(u * u, 2, _plus), 0, _plus)
    moment += tl.reduce(tl.reduce(power, 2, _plus), 0, _plus)
    return top, square, moment


@triton.jit(do_not_specialize=["full_tiles", "remainder", "q"], do_not_specialize_on_alignment=["q_ptr"])
def matched_sums(sums_ptr, x_ptr, q_ptr, full_tiles, remainder, q, QUARTERS: tl.constexpr, NATIVE: tl.constexpr,
                 LOADS: tl.constexpr, THREADS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Writes max |x| and both sums of a part of x, which is `full_tiles` tiles and `remainder` elements."""
    TILE: tl.constexpr = LOADS * THREADS * WIDTH
    if q_ptr is not None:
        q = tl.load(q_ptr)
    part = tl.program_id(0)
    peak = tl.full((THREADS,), 0.0, tl.float32)
    square, moment = peak, peak
    for tile in range(part, full_tiles, tl.num_programs(0)):  # without masks, as in `sparseout`
        start = tl.cast(tile, tl.int64) * TILE
        peak, square, moment = _add(
            peak, square, moment, x_ptr + start, TILE, q, QUARTERS, NATIVE, LOADS, THREADS, WIDTH, True
        )
    if part == full_tiles % tl.num_programs(0):
        start = tl.cast(full_tiles, tl.int64) * TILE
        peak, square, moment = _add(
            peak, square, moment, x_ptr + start, remainder, q, QUARTERS, NATIVE, LOADS, THREADS, WIDTH, False
        )
    top = tl.reduce(peak, 0, _larger)
    square, moment = _in_units_of(top, peak, square, moment, q, QUARTERS, NATIVE)
    tl.store(sums_ptr + part, top)
    tl.store(sums_ptr + PARTS + part, tl.reduce(square, 0, _plus))
    tl.store(sums_ptr + 2 * PARTS + part, tl.reduce(moment, 0, _plus))


@triton.jit(do_not_specialize=["parts", "q"], do_not_specialize_on_alignment=["q_ptr"])
def matched(params_ptr, sums_ptr, q_ptr, parts, q, QUARTERS: tl.constexpr, NATIVE: tl.constexpr,
            PARTS: tl.constexpr):  # fmt: skip
    """Writes the scale_unit and the amplitude, as `NoiseParams.balanced` has them, from the sums of all parts."""
    if q_ptr is not None:
        q = tl.load(q_ptr)
    part = tl.arange(0, PARTS)
    peak = tl.load(sums_ptr + part, mask=part < parts, other=0.0)
    square = tl.load(sums_ptr + PARTS + part, mask=part < parts, other=0.0)
    moment = tl.load(sums_ptr + 2 * PARTS + part, mask=part < parts, other=0.0)
    top = tl.reduce(peak, 0, _larger)
    square, moment = _in_units_of(top, peak, square, moment, q, QUARTERS, NATIVE)
    square, moment = tl.reduce(square, 0, _plus), tl.reduce(moment, 0, _plus)
    usable = (top >= 2.0**-126) & (square < float("inf"))  # which no sum with an infinity or NaN in it is
    # In fp64, of few numbers: q times a logarithm may be large.
    wide = tl.cast(q, tl.float64)
    half = wide / 2
    exponent = (tl.log2(square.to(tl.float64)) - tl.log2(moment.to(tl.float64))) / 2
    exponent += _level(top, 0, NATIVE) - half * _level(top, QUARTERS, NATIVE)  # of beta
    fits = (wide < 4) & (tl.abs(exponent) < 125)
    amplitude = tl.exp2(tl.where(fits, exponent, exponent - (1 - half) * tl.log2(top.to(tl.float64))))
    plain = (wide == 2) | (usable == 0)  # at q = 2 beta is 1, and not up to rounding
    tl.store(params_ptr, tl.where(plain | fits, 1.0, top))
    tl.store(params_ptr + 1, tl.where(plain, 1.0, amplitude).to(tl.float32))

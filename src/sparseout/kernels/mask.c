/* The noise xi = m / (1 - p) - 1, as kernels/mask.py defines m. Part of cpu.c, which includes it once for each REAL and
   once without. A draw has 16 or 32 bits of a word of the SplitMix64 stream; draws are numbered in the order of memory,
   without the dims that share them. */

#ifdef REAL

/* xi of `count` draws from number `first` on, and of up to LANES - 1 more that nobody reads. */
INLINE void NAME(draw)(REAL *xi, const Plan *p, uint64_t key, int64_t first, int count) {
    union { uint64_t words[BLOCK / 2 + LANES]; int16_t narrow[2 * BLOCK + 4 * LANES]; int32_t wide[BLOCK + 2 * LANES]; } u;
    const int32_t threshold = p->threshold, log2_each = p->bits == 16 ? 2 : 1;
    const REAL kept = (REAL)p->kept;
    int skipped = (int)(first & ((1 << log2_each) - 1)), n = (count + LANES - 1) / LANES * LANES;
    uint64_t state = key + (uint64_t)(first >> log2_each) * GOLDEN;
    for (int i = 0; i <= (skipped + n - 1) >> log2_each; i += 8)
        for (int k = 0; k < 8; k++) u.words[i + k] = mix(state + (uint64_t)(i + k + 1) * GOLDEN);
    if (log2_each == 2) for (int i = 0; i < n; i++) xi[i] = u.narrow[skipped + i] >= threshold ? kept : -1;
    else for (int i = 0; i < n; i++) xi[i] = u.wide[skipped + i] >= threshold ? kept : -1;
}

/* xi of one draw, in which the compiler has no vectors to fill. */
INLINE REAL NAME(draw_one)(const Plan *p, uint64_t key, int64_t number) {
    union { uint64_t word; int16_t narrow[4]; int32_t wide[2]; } u;
    int64_t each = p->bits == 16 ? 4 : 2;
    u.word = mix(key + (uint64_t)(number / each + 1) * GOLDEN);
    int32_t draw = each == 4 ? u.narrow[number % each] : u.wide[number % each];
    return draw >= p->threshold ? (REAL)p->kept : -1;
}

/* xi of the n elements from `index` on, which moves behind them, and of up to LANES - 1 more that nobody reads. */
INLINE void NAME(noise)(REAL *xi, const Plan *p, uint64_t key, Index *index, int n) {
    int64_t *at = index->at, row = p->sizes[0];
    for (int i = 0; i < n;) {
        int64_t rows = p->runs < 2 || p->repeat > 1 || at[0] ? 0 : at[1] < i / row ? at[1] : i / row, first = 0;
        for (int run = 0; run < p->runs; run++) first += at[run] * p->steps[run];
        if (p->repeat > 1) {
            REAL once = NAME(draw_one)(p, key, first);
            int times = (int)(p->repeat - index->repeat < n - i ? p->repeat - index->repeat : n - i);
            for (int k = 0; k < times; k += LANES) for (int l = 0; l < LANES; l++) xi[i + k + l] = once;
            i += times; index->repeat += times;
            if (index->repeat == p->repeat) index->repeat = 0, at[0]++;
        } else if (rows) { /* before these lie rows with the same draws */
            if (rows > p->sizes[1] - at[1]) rows = p->sizes[1] - at[1];
            int count = (int)(rows * row < n - i ? rows * row : n - i);
            memcpy(xi + i, xi + i - rows * row, (size_t)count * sizeof(REAL));
            i += count; at[0] = count % row; at[1] += count / row;
        } else {
            int count = (int)(row - at[0] < n - i ? row - at[0] : n - i);
            NAME(draw)(xi + i, p, key, first, count);
            i += count; at[0] += count;
        }
        for (int run = 0; run < p->runs - 1; run++) if (at[run] == p->sizes[run]) at[run] = 0, at[run + 1]++;
    }
}

#else

typedef struct { int64_t at[64], repeat; } Index; /* of an element: along each run, and among those with its draw */

INLINE Index index_of(int64_t element, const Plan *p) {
    Index index = {.repeat = element % p->repeat};
    element /= p->repeat;
    for (int run = 0; run < p->runs; element /= p->sizes[run++]) index.at[run] = element % p->sizes[run];
    return index;
}

INLINE uint64_t mix(uint64_t z) { /* SplitMix64 */
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
#define GOLDEN 0x9E3779B97F4A7C15u

#endif

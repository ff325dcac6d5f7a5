/* The operation on a CPU. kernels/reference.py is its definition, kernels/mask.py that of the mask.

       y = x + beta sign(x) |x|^(q/2) xi            beta = amplitude scale_unit^(1 - q/2)
   dy/dx = 1 + beta |x|^(q/2 - 1) xi                the noise term times q/2 if "exact"

   x is read in blocks of 256 elements. Short loops, which the compiler turns into vector instructions, make the noise
   (mask.c) and then the rest, in buffers that stay in the first-level cache. An element always has the same position in
   its block, and all arithmetic is IEEE's: the number of threads does not change a bit.

   No headers of torch or Python: kernels/cpu.py calls this through ctypes. What follows the #else is compiled twice,
   for REAL = float (fp32, bf16, fp16) and REAL = double, by this file including itself. */

#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(ONE_TARGET)
/* Chosen when the library is loaded. Levels, to have FMA beside AVX2; Clang 14 takes them and matches none. */
#ifdef __clang__
#define TARGETS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define TARGETS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#else
#define TARGETS
#endif
#define INLINE static inline __attribute__((always_inline)) /* into each of the targets */

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT64 };
enum { VALUE, SLOPE, GRADIENT };
enum { BLOCK = 256, GRAIN = 128 /* blocks, below which a thread is not worth waking */, LANES = 16, PARTS = 256 };

typedef struct { /* what does not change from call to call; cpu.py has its twin */
    int32_t what, dtype, exact, bits, threshold, runs;
    double q, kept, limit;
    int64_t repeat; /* neighbours that share a draw, in the innermost dims */
    int64_t sizes[64], steps[64]; /* of the runs of dims around them that have their own draws, or share them, and from
                                     one draw to the next along each: 0 where they are shared; innermost first */
} Plan;

typedef struct { /* scale |x|^e: e and log2 scale each in two parts, of which the products with 12 bits are exact */
    double e, e_high, e_low, log2_high, log2_low, scale, at_zero, at_infinity;
    int quarters /* 4 e, or OTHER */, moderate /* no step overflows or vanishes where the result does not */;
} Power;
enum { OTHER = 99 };

typedef struct { double peak, square, moment; } Sums; /* max |x|, sum (|x| / peak)^2, sum (|x| / peak)^q */

typedef struct {
    const Plan *plan;
    void *out;
    const void *grad, *x;
    int64_t n, part; /* part: elements that one thread takes at least, whole blocks */
    uint64_t key;
    Power power;
    int is_sum; /* whether y is x + term, and that the power in the term; else y is x times its slope */
    Sums *sums;
} Call;

#include "arithmetic.c"
#include "mask.c"

/* The next block is fetched meanwhile: the hardware would begin to, anew in each block, when that is read. One tensor
   at a time, since a processor waits where too many lines are on their way. */
INLINE void fetch(const void *tensor, int64_t element, int size) {
    const char *from = (const char *)tensor + element * size;
    for (int line = 0; line < BLOCK * size; line += 64) __builtin_prefetch(from + line, 0, 2);
}

static Power power_of(double e, double log2_scale, double at_zero) {
    int near = fabs(log2_scale) <= 10;
    int quarters = e == 0 || (4 * e == floor(4 * e) && e >= -0.5 && near && (e <= 1 || (e <= 1.5 && log2_scale >= 0)));
    double scale = exp2(log2_scale), whole = rint(log2_scale);
    if (e > 0x1p33) e = 0x1p33; /* which takes every number but 1 to 0 or infinity already */
    double high = (double)as_float(as_bits((float)e) & 0xFFFFF000), at_infinity = e > 0 ? INFINITY : e < 0 ? 0 : scale;
    return (Power){.e = e, .e_high = high, .e_low = e - high, .log2_high = whole, .log2_low = log2_scale - whole,
                   .scale = scale, .at_zero = at_zero, .at_infinity = at_infinity,
                   .quarters = quarters ? (int)(4 * e) : OTHER, .moderate = quarters || (near && fabs(e) <= 0.875)};
}

#define JOIN(name, type) name##_##type
#define NAMED(name, type) JOIN(name, type)
#define NAME(name) NAMED(name, REAL)
#define REAL float
#define BITS uint32_t
#define ABS fabsf
#define TINY 0x1p-126f
#include "cpu.c"
#undef REAL
#undef BITS
#undef ABS
#undef TINY
#define REAL double
#define BITS uint64_t
#define ABS fabs
#define TINY 0x1p-1022
#include "cpu.c"
#undef REAL

static void range(int64_t begin, int64_t end, void *call) {
    const Call *c = call;
    int wide = c->plan->dtype == FLOAT64;
    int64_t first = begin * c->part, last = end * c->part < c->n ? end * c->part : c->n;
    Index index = index_of(first, c->plan);
    for (int64_t start = first, step = c->sums ? c->part : BLOCK; start < last; start += step) {
        int64_t n = last - start < step ? last - start : step;
        if (c->sums) (wide ? sums_double : sums_float)(c, start, n, c->sums + start / step);
        else (wide ? block_double : block_float)(c, &index, start, (int)n);
    }
}

#ifndef SOURCE
#define SOURCE "unknown"
#endif
const char *sparseout_source(void) { return SOURCE; } /* the fingerprint of this file, see cpu.py */

/* `torch_parallel_for` of torch's stable C interface: torch's own threads, as many as torch.set_num_threads says. */
static int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void *), void *);
void sparseout_set_parallel_for(void *function) { memcpy(&parallel_for, &function, sizeof function); }

static void run(Call *c) {
    if (c->n == 0) return;
    int64_t count = (c->n + c->part - 1) / c->part, grain = (GRAIN * BLOCK + c->part - 1) / c->part;
    if (count <= grain || !parallel_for || parallel_for(0, count, grain, range, c)) range(0, count, c);
}

/* Writes y, the slope dy/dx, or `grad` times it, as the plan says. All tensors are contiguous and have n elements. */
void sparseout_run(const Plan *plan, void *out, const void *grad, const void *x, int64_t n, int64_t seed,
                   double scale_unit, double amplitude) {
    double half = plan->q / 2, e = half - 1, factor = plan->exact && plan->what != VALUE ? half : 1;
    double log2_scale = plan->q == 2 ? 0 : log2(amplitude * factor) - e * log2(scale_unit); /* at q = 2 beta is 1 */
    if (factor == 0) e = 0; /* no noise in the slope, whatever it is a power of */
    /* As in ops.py y is x times the slope of "detached", but where that may overflow though y does not. */
    int wide = plan->dtype == FLOAT64, smallest = wide ? -1074 : -149, largest = wide ? 1024 : 128;
    double steepest = log2_scale + e * (e < 0 ? smallest : largest) + fmax(log2(plan->kept), 0);
    Call c = {.plan = plan, .out = out, .grad = grad, .x = x, .n = n, .part = BLOCK};
    c.key = mix((uint64_t)seed + GOLDEN);
    c.is_sum = plan->what == VALUE && steepest > largest - 2;
    c.power = c.is_sum ? power_of(half, log2_scale, 0) : power_of(e, log2_scale, plan->q == 2);
    /* Where a slope may reach the limit, `careful` looks at it; from e = 1 on `loop` always does. What are denormals in
       fp16 are normal floats. */
    int normal = wide ? -1022 : plan->dtype == FLOAT16 ? -24 : -126;
    double most = log2_scale + e * (e < 0 ? normal : e < 1 ? largest : 0) + fmax(log2(plan->kept), 0);
    if (plan->what != VALUE && most > log2(plan->limit) - 1) c.power.moderate = 0;
    run(&c);
}

#include "matched.c"
#include "columns.c"

#else /* for one REAL */

#include "mask.c"

INLINE const REAL *NAME(load)(REAL *buffer, const void *from, int64_t start, int n, int dtype) {
    const uint16_t *halves = (const uint16_t *)from + start;
    if (dtype == BFLOAT16) for (int i = 0; i < n; i++) buffer[i] = from_bfloat16(halves[i]);
    else if (dtype == FLOAT16) for (int i = 0; i < n; i++) buffer[i] = from_float16(halves[i]);
    else return (const REAL *)from + start;
    return buffer;
}

/* a^(how / 4) */
INLINE REAL NAME(quarters)(REAL a, int how, int careful) {
    REAL root = how & 1 ? NAME(root)(a, 1, careful) : how & 2 ? NAME(root)(a, 0, careful) : 1;
    REAL power = how == 1 || how == 5 ? root * root * root : root;
    return how > 4 ? power * a * a : how > 0 ? power * a : power;
}

INLINE BITS NAME(bits_of)(REAL a) { BITS bits; memcpy(&bits, &a, sizeof bits); return bits; }

/* Writes s = scale |x|^e or, if there is an xi, `factor` times the slope 1 + s xi. Returns whether x has denormals,
   infinities or NaN, for which it must be `careful`: as bits these are the least but 0 and the largest of |x|. The
   slope is limited after 1 is added, so that the compiler fuses sum and product with a limit and without. */
INLINE int NAME(loop)(REAL *restrict out, const REAL *x, const REAL *factor, const REAL *xi, REAL limit, int n,
                      const Power p, int how, int careful) {
    const REAL infinity = (REAL)INFINITY, scale = (REAL)p.scale, at_zero = (REAL)p.at_zero;
    const REAL top = 1 + limit, bottom = 1 - limit;
    const int limited = careful || (how > 3 && how != OTHER); /* see sparseout_run */
    BITS least = ~(BITS)0, most = 0;
    REAL s[BLOCK], low[BLOCK];
    if (how == OTHER) {
        for (int i = 0; i < n; i++) s[i] = NAME(split)(ABS(x[i]), &low[i], careful);
        for (int i = 0; i < n; i++) s[i] = NAME(log2)(s[i], low[i], &low[i], &p);
        for (int i = 0; i < n; i++) s[i] = NAME(exp2)(s[i], low[i], careful);
    } else for (int i = 0; i < n; i++) s[i] = scale * NAME(quarters)(ABS(x[i]), how, careful);
    for (int i = 0; i < n; i++) {
        REAL a = ABS(x[i]), power = s[i];
        BITS bits = NAME(bits_of)(a);
        most = bits > most ? bits : most;
        least = bits - 1 < least ? bits - 1 : least; /* that of 0 is the largest of all */
        if (careful) power = a < infinity ? power : a == a ? (REAL)p.at_infinity : a;
        power = a == 0 ? at_zero : power;
        if (xi) {
            REAL slope = 1 + power * xi[i];
            if (limited) slope = slope < bottom ? bottom : top < slope ? top : slope;
            out[i] = factor[i] * slope;
        } else out[i] = power;
    }
    return least < NAME(bits_of)(TINY) - 1 || most >= NAME(bits_of)(infinity);
}

/* The loop for this exponent. */
INLINE void NAME(powers)(REAL *out, const REAL *x, const REAL *factor, const REAL *xi, REAL limit, int n,
                         const Power *p) {
#define RUN(how, careful) NAME(loop)(out, x, factor, xi, limit, n, *p, how, careful)
#define CASE(how) case how: if (!p->moderate || RUN(how, 0)) RUN(how, 1); break;
    switch (p->quarters) {
        CASE(-2) CASE(-1) CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(OTHER)
    }
}

TARGETS static void NAME(raise)(REAL *s, const REAL *x, int n, const Power *p) {
    NAME(powers)(s, x, NULL, NULL, 0, n, p);
}

TARGETS static void NAME(block)(const Call *c, Index *index, int64_t start, int n) {
    const Plan *p = c->plan;
    REAL xi[BLOCK + LANES], x_wide[BLOCK], factor_wide[BLOCK], out_wide[BLOCK];
    const int size = p->dtype == FLOAT64 ? 8 : p->dtype == FLOAT32 ? 4 : 2;
    const REAL limit = p->what == VALUE ? (REAL)INFINITY : (REAL)p->limit;
    const REAL *x = NAME(load)(x_wide, c->x, start, n, p->dtype), *factor = x;
    REAL *out = size == 2 ? out_wide : (REAL *)c->out + start;
    fetch(c->x, start + BLOCK, size);
    NAME(noise)(xi, p, c->key, index, n);
    if (p->what == GRADIENT) {
        factor = NAME(load)(factor_wide, c->grad, start, n, p->dtype);
        fetch(c->grad, start + BLOCK, size);
    }
    if (p->what == SLOPE) { for (int i = 0; i < n; i++) factor_wide[i] = 1; factor = factor_wide; }
    if (c->is_sum) {
        REAL s[BLOCK];
        NAME(raise)(s, x, n, &c->power);
        for (int i = 0; i < n; i++) out[i] = x[i] + (x[i] < 0 ? -s[i] : s[i]) * xi[i];
    } else NAME(powers)(out, x, factor, xi, limit, n, &c->power);
    fetch(c->out, start + BLOCK, size);
    if (p->dtype == BFLOAT16) for (int i = 0; i < n; i++) ((uint16_t *)c->out)[start + i] = to_bfloat16((float)out[i]);
    if (p->dtype == FLOAT16) for (int i = 0; i < n; i++) ((uint16_t *)c->out)[start + i] = to_float16((float)out[i]);
}

#include "matched.c"
#include "columns.c"

#endif

/* The operation on a CPU. kernels/reference.py is its definition, kernels/mask.py that of the mask.

       y = x + beta sign(x) |x|^(q/2) xi            beta = amplitude scale_unit^(1 - q/2)
   dy/dx = 1 + beta |x|^(q/2 - 1) xi                the noise term times q/2 if "exact"

   x is read in blocks of 256 elements. Short loops, which the compiler turns into vector instructions, do one step
   each on buffers that stay in the first-level cache. An element always has the same position in its block, and all
   arithmetic is IEEE's: the number of threads does not change a bit.

   No headers of torch or Python: kernels/cpu.py calls this through ctypes. What follows the #else is compiled twice,
   for REAL = float (fp32, bf16, fp16) and REAL = double, by this file including itself. */

#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(ONE_TARGET)
/* Which of them is chosen when the library is loaded. */
#define TARGETS __attribute__((target_clones("arch=x86-64-v4", "arch=haswell", "default")))
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

typedef struct { double e, scale, log2_scale, at_zero; int quarters /* 4 e, or OTHER */, moderate; } Power;
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

typedef struct { /* a sparse linear layer, see columns.c */
    int32_t dtype;
    void *y;
    const void *x, *w, *bias;
    int64_t ins, outs, width, parts; /* width: outputs of a task, of which there are `parts` a row */
} Linear;
enum { WIDTH = 1024 };

INLINE uint64_t mix(uint64_t z) { /* SplitMix64 */
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
#define GOLDEN 0x9E3779B97F4A7C15u

INLINE float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
INLINE uint32_t as_bits(float f) { uint32_t bits; memcpy(&bits, &f, 4); return bits; }

INLINE float from_bfloat16(uint16_t h) { return as_float((uint32_t)h << 16); }
INLINE uint16_t to_bfloat16(float f) { /* to nearest even */
    uint32_t bits = as_bits(f);
    return (uint16_t)(f != f ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
INLINE float from_float16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, bits = (uint32_t)(h & 0x7FFF) << 13;
    float finite = as_float(bits) * 0x1p112f; /* the zeros of the exponents are 112 apart; denormals come out right */
    return as_float(sign | (bits >= 0x0F800000 ? bits | 0x7F800000 : as_bits(finite)));
}
INLINE uint16_t to_float16(float f) { /* to nearest even */
    uint32_t sign = as_bits(f) >> 16 & 0x8000, bits = as_bits(f) & 0x7FFFFFFF;
    uint32_t normal = (bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
    uint32_t denormal = as_bits(as_float(bits) + 0.5f) - as_bits(0.5f); /* the sum is rounded where a half ends */
    uint32_t huge = bits > 0x7F800000 ? 0x7E00 : 0x7C00;
    return (uint16_t)(sign | (bits >= 0x47800000 ? huge : bits < 0x38800000 ? denormal : normal));
}

/* 2^(e log2 a + log2_scale), with e and log2_scale in two parts. a is m 2^k, m from sqrt 1/2 to sqrt 2. What 12 bits of
   e and the 8 of k give is exact and kept apart from the rest, so that the result is off by few units of 2^-24 of
   itself. The polynomials are minimax fits, off by 2.6e-8 and 1.9e-9 of themselves. Not `careful`, it is for normal
   numbers and results; where both serve they give the same bits. */
INLINE float power_float(float a, float e_high, float e_low, float scale_high, float scale_low, int careful) {
    const float to_whole = 0x1.8p23f; /* added and subtracted it rounds to a whole number */
    int denormal = careful && a < 0x1p-126f;
    uint32_t bits = as_bits(denormal ? a * 0x1p24f : a) - 0x3F3504F3; /* of sqrt 1/2 */
    float k = (float)((int32_t)bits >> 23) - (denormal ? 24.0f : 0.0f);
    float s = as_float((bits & 0x007FFFFF) + 0x3F3504F3) - 1.0f;
    float log2_m = s * (1.4426950f + s * (-0.72134733f + s * (0.48091063f + s * (-0.36070368f + s * (0.28791624f
                 + s * (-0.23894481f + s * (0.21571563f + s * (-0.20726982f + s * 0.12583704f))))))));
    float high = e_high * k + scale_high, low = e_high * log2_m + (e_low * (k + log2_m) + scale_low);
    float sum = high + low;
    float n = (!careful ? sum : sum < -250.0f ? -250.0f : sum > 250.0f ? 250.0f : sum) + to_whole - to_whole;
    float r = (high - n) + low;
    if (careful) r = r < -1.0f ? -1.0f : r > 1.0f ? 1.0f : r; /* beyond are 0 and infinity */
    float power = 1.0f + r * (0.69314718f + r * (0.24022646f + r * (0.055503286f + r * (0.0096184891f
                + r * (0.0013399931f + r * 0.00015345812f)))));
    int32_t whole = (int32_t)n, half = careful ? whole >> 1 : 0; /* two factors, since 2^n may be no float */
    if (careful) power *= as_float((uint32_t)(half + 127) << 23);
    return power * as_float((uint32_t)(whole - half + 127) << 23);
}
INLINE double power_double(double a, double e_high, double e_low, double scale_high, double scale_low, int careful) {
    (void)careful;
    return exp2((e_high + e_low) * log2(a) + (scale_high + scale_low));
}

/* a^(-1/2) or a^(-1/4), at a third of the time of square roots and a quotient: halving or quartering the bits, which
   are nearly a logarithm, gives y to 4%, and the polynomial (1 - h)^(-1/2) or ^(-1/4) in the error h of its power the
   rest, to 2e-8. Denormals are multiplied by 2^24 first. */
INLINE float root_float(float a, int fourth, int careful) {
    int denormal = careful && a < 0x1p-126f;
    if (denormal) a *= 0x1p24f;
    float y = as_float(fourth ? 0x4F5810C0 - (as_bits(a) >> 2) : 0x5F373600 - (as_bits(a) >> 1));
    if (fourth) {
        float h = 1.0f - a * (y * y) * (y * y);
        y += y * (h * (0.25f + h * (0.15624469f + h * (0.11718275f + h * (0.096593072f + h * 0.082163589f)))));
    } else {
        float h = 1.0f - a * y * y;
        y += y * (h * (0.5f + h * (0.37499842f + h * (0.31249853f + h * (0.27477386f + h * 0.24733474f)))));
    }
    return denormal ? y * (fourth ? 0x1p6f : 0x1p12f) : y;
}
INLINE double root_double(double a, int fourth, int careful) {
    (void)careful;
    return 1 / sqrt(fourth ? sqrt(a) : a);
}

static Power power_of(double e, double log2_scale, double at_zero) {
    int moderate = fabs(log2_scale) <= 10; /* so that no step overflows or vanishes where the result does not */
    int quarters = 4 * e == floor(4 * e) && e >= -0.5 && moderate && (e <= 1 || (e <= 1.5 && log2_scale >= 0));
    Power power = {e, exp2(log2_scale), log2_scale, at_zero, OTHER, moderate && fabs(e) <= 0.875};
    if (e == 0 || quarters) power.quarters = (int)(4 * e), power.moderate = 1;
    if (e > 0x1p33) power.e = 0x1p33; /* which takes every number but 1 to 0 or infinity already */
    return power;
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

static void range(int64_t begin, int64_t end, void *call) {
    const Call *c = call;
    int wide = c->plan->dtype == FLOAT64;
    int64_t first = begin * c->part, last = end * c->part < c->n ? end * c->part : c->n;
    for (int64_t start = first, step = c->sums ? c->part : BLOCK; start < last; start += step) {
        int64_t n = last - start < step ? last - start : step;
        if (c->sums) (wide ? sums_double : sums_float)(c, start, n, c->sums + start / step);
        else (wide ? block_double : block_float)(c, start, (int)n);
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
    run(&c);
}

/* The scale_unit and amplitude with which the noise has the power of Dropout's: reference.matched. */
void sparseout_matched(const Plan *plan, const void *x, int64_t n, double *scale_unit, double *amplitude) {
    Sums sums[PARTS] = {{0, 0, 0}};
    int64_t part = (n + BLOCK * PARTS - 1) / (BLOCK * PARTS) * BLOCK; /* the same for any number of threads */
    Call c = {.plan = plan, .x = x, .n = n, .part = part, .sums = sums};
    double peak = 0, square = 0, moment = 0;
    *scale_unit = *amplitude = 1;
    if (n == 0 || plan->q == 2) return;
    run(&c);
    for (int i = 0; i < PARTS; i++) if (!(sums[i].peak <= peak)) peak = sums[i].peak + 0 * peak; /* NaN stays */
    if (peak == 0 || !(peak < INFINITY)) return;
    for (int i = 0; i < PARTS; i++) {
        double ratio = sums[i].peak / peak;
        square += sums[i].square * ratio * ratio;
        if (ratio > 0) moment += sums[i].moment * pow(ratio, plan->q);
    }
    double power = sqrt(square / moment), beta = power * pow(peak, 1 - plan->q / 2);
    int fits = plan->q < 4 && fabs(log2(beta)) < 100; /* all of beta in the amplitude, as `balanced` has it */
    *scale_unit = fits ? 1 : peak;
    *amplitude = fits ? beta : power;
}

#undef REAL
#include "columns.c"

#else /* for one REAL */

INLINE const REAL *NAME(load)(REAL *buffer, const void *from, int64_t start, int n, int dtype) {
    const uint16_t *halves = (const uint16_t *)from + start;
    if (dtype == BFLOAT16) for (int i = 0; i < n; i++) buffer[i] = from_bfloat16(halves[i]);
    else if (dtype == FLOAT16) for (int i = 0; i < n; i++) buffer[i] = from_float16(halves[i]);
    else return (const REAL *)from + start;
    return buffer;
}

/* xi of `count` draws from number `first` on. */
INLINE void NAME(draw)(REAL *xi, const Call *c, int64_t first, int count) {
    union { uint64_t words[BLOCK / 2 + 1]; int16_t narrow[2 * BLOCK + 4]; int32_t wide[BLOCK + 2]; } u;
    int32_t threshold = c->plan->threshold, each = 64 / c->plan->bits, skipped = (int32_t)(first % each);
    REAL kept = (REAL)c->plan->kept;
    uint64_t state = c->key + (uint64_t)(first / each) * GOLDEN;
    for (int i = 0; i < (skipped + count + each - 1) / each; i++) u.words[i] = mix(state + (uint64_t)(i + 1) * GOLDEN);
    if (each == 4) for (int i = 0; i < count; i++) xi[i] = u.narrow[skipped + i] >= threshold ? kept : -1;
    else for (int i = 0; i < count; i++) xi[i] = u.wide[skipped + i] >= threshold ? kept : -1;
}

/* xi of elements `start` to `start + n`, and up to LANES - 1 more that nobody reads. */
INLINE void NAME(noise)(REAL *xi, const Call *c, int64_t start, int n) {
    const Plan *p = c->plan;
    REAL once[BLOCK];
    int64_t at[64], rest = start / p->repeat, skipped = start % p->repeat;
    for (int run = 0; run < p->runs; run++) { at[run] = rest % p->sizes[run]; rest /= p->sizes[run]; }
    for (int i = 0; i < n;) {
        int64_t first = 0, left = p->sizes[0] - at[0], wanted = (skipped + n - i + p->repeat - 1) / p->repeat;
        int count = (int)(left < wanted ? left : wanted);
        for (int run = 0; run < p->runs; run++) first += at[run] * p->steps[run];
        NAME(draw)(p->repeat == 1 ? xi + i : once, c, first, count);
        if (p->repeat == 1) i += count;
        else for (int j = 0; j < count; j++) {
            int times = (int)(p->repeat - skipped < n - i ? p->repeat - skipped : n - i);
            for (int end = i + times; i < end; i += LANES) for (int k = 0; k < LANES; k++) xi[i + k] = once[j];
            i -= (LANES - times % LANES) % LANES;
            skipped = 0;
        }
        at[0] += count;
        for (int run = 0; run < p->runs - 1 && at[run] == p->sizes[run]; run++) { at[run] = 0; at[run + 1]++; }
    }
}

/* a^(how / 4) */
INLINE REAL NAME(quarters)(REAL a, int how, int careful) {
    REAL root = how & 1 ? NAME(root)(a, 1, careful) : how & 2 ? NAME(root)(a, 0, careful) : 1;
    REAL power = how == 1 || how == 5 ? root * root * root : root;
    return how > 4 ? power * a * a : how > 0 ? power * a : power;
}

INLINE BITS NAME(bits_of)(REAL a) { BITS bits; memcpy(&bits, &a, sizeof bits); return bits; }

/* The largest |x| and, 1 less, the least but 0, as bits: these have the same order, and NaN is the largest. */
INLINE BITS NAME(extremes)(const REAL *x, int n, BITS *largest) {
    BITS most = 0, least = ~(BITS)0;
    for (int i = 0; i < n; i++) {
        BITS bits = NAME(bits_of)(ABS(x[i]));
        most = bits > most ? bits : most;
        least = bits - 1 < least ? bits - 1 : least; /* that of 0 is the largest of all */
    }
    *largest = most;
    return least;
}

/* s = scale |x|^e */
INLINE void NAME(raise)(REAL *restrict s, const REAL *restrict x, int n, const Power *p) {
    const REAL scale = (REAL)p->scale, at_zero = (REAL)p->at_zero, infinity = (REAL)INFINITY;
    const REAL at_infinity = p->e > 0 ? infinity : p->e < 0 ? 0 : scale;
    const double whole = rint(p->log2_scale);
    const REAL e_high = (REAL)as_float(as_bits((float)p->e) & 0xFFFFF000), e_low = (REAL)(p->e - e_high);
    const REAL scale_high = (REAL)whole, scale_low = (REAL)(p->log2_scale - whole);
    BITS largest, least = NAME(extremes)(x, n, &largest);
    int unusual = !p->moderate || least < NAME(bits_of)(TINY) - 1 || largest >= NAME(bits_of)(infinity);
#define EACH(how, careful) \
    for (int i = 0; i < n; i++) { \
        REAL a = ABS(x[i]), power = how == OTHER ? \
            NAME(power)(a, e_high, e_low, scale_high, scale_low, careful) : scale * NAME(quarters)(a, how, careful); \
        if (careful) power = a < infinity ? power : a == a ? at_infinity : a; \
        s[i] = a == 0 ? at_zero : power; \
    }
#define CASE(how) case how: if (unusual) EACH(how, 1) else EACH(how, 0) break;
    switch (p->quarters) {
        CASE(-2) CASE(-1) CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(OTHER)
    }
}

TARGETS static void NAME(block)(const Call *c, int64_t start, int n) {
    const Plan *p = c->plan;
    REAL s[BLOCK], xi[BLOCK + LANES], x_wide[BLOCK], grad_wide[BLOCK], out_wide[BLOCK];
    const int size = p->dtype == FLOAT64 ? 8 : p->dtype == FLOAT32 ? 4 : 2;
    const REAL limit = p->what == VALUE ? (REAL)INFINITY : (REAL)p->limit;
    const REAL *x = NAME(load)(x_wide, c->x, start, n, p->dtype), *factor = x;
    REAL *out = p->dtype == BFLOAT16 || p->dtype == FLOAT16 ? out_wide : (REAL *)c->out + start;
    /* The next block is fetched meanwhile: the hardware would begin to, anew in each block, when that is read. */
    for (int64_t at = (start + BLOCK) * size, end = at + BLOCK * size; at < end; at += 64) { /* a line of a cache */
        __builtin_prefetch((const char *)c->x + at, 0, 2);
        __builtin_prefetch((const char *)c->out + at, 1, 2);
        if (c->grad) __builtin_prefetch((const char *)c->grad + at, 0, 2);
    }
    NAME(noise)(xi, c, start, n);
    NAME(raise)(s, x, n, &c->power);
    if (p->what == GRADIENT) factor = NAME(load)(grad_wide, c->grad, start, n, p->dtype);
    if (c->is_sum) for (int i = 0; i < n; i++) out[i] = x[i] + (x[i] < 0 ? -s[i] : s[i]) * xi[i];
    else for (int i = 0; i < n; i++) {
        REAL noise = s[i] * xi[i], slope = 1 + (noise < -limit ? -limit : noise > limit ? limit : noise);
        out[i] = p->what == SLOPE ? slope : factor[i] * slope;
    }
    if (p->dtype == BFLOAT16) for (int i = 0; i < n; i++) ((uint16_t *)c->out)[start + i] = to_bfloat16((float)out[i]);
    if (p->dtype == FLOAT16) for (int i = 0; i < n; i++) ((uint16_t *)c->out)[start + i] = to_float16((float)out[i]);
}

/* The sums of n elements, so few that they are still in a cache when they are read for the second time. */
TARGETS static void NAME(sums)(const Call *c, int64_t start, int64_t n, Sums *sums) {
    REAL buffer[BLOCK], u[BLOCK], power[BLOCK], peak;
    BITS block, largest = 0;
    for (int64_t done = 0; done < n; done += BLOCK) {
        int count = n - done < BLOCK ? (int)(n - done) : BLOCK;
        const REAL *x = NAME(load)(buffer, c->x, start + done, count, c->plan->dtype);
        NAME(extremes)(x, count, &block);
        largest = block > largest ? block : largest;
    }
    memcpy(&peak, &largest, sizeof peak);
    sums->peak = peak > 0 && peak < TINY ? TINY : peak; /* so that its inverse is finite */
    if (peak == 0 || !(peak < (REAL)INFINITY)) return;
    /* (|x|^(q/2) / peak^(q/2))^2; beyond q = 2 the power of |x| / peak, which may vanish but not before its own. */
    int roots = c->plan->q < 2;
    double half = c->plan->q / 2;
    Power of = power_of(half, roots ? -half * log2(sums->peak) : 0, 0);
    REAL inverse = (REAL)(1 / sums->peak);
    for (int64_t done = 0; done < n; done += BLOCK) {
        int count = n - done < BLOCK ? (int)(n - done) : BLOCK;
        const REAL *x = NAME(load)(buffer, c->x, start + done, count, c->plan->dtype);
        REAL square[LANES] = {0}, moment[LANES] = {0};
        for (int i = 0; i < count; i++) u[i] = ABS(x[i]) * inverse;
        NAME(raise)(power, roots ? x : u, count, &of);
        for (; count % LANES; count++) u[count] = power[count] = 0;
        for (int i = 0; i < count; i += LANES) for (int j = 0; j < LANES; j++) {
            square[j] += u[i + j] * u[i + j];
            moment[j] += power[i + j] * power[i + j];
        }
        for (int j = 0; j < LANES; j++) { sums->square += square[j]; sums->moment += moment[j]; }
    }
}

#include "columns.c"

#endif

/* Numbers: half types, and powers that become vector instructions, where those of libm do not. Part of cpu.c. */

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

/* scale |x|^e is 2^(e log2 a + log2 scale) in three steps, each a loop of its own in cpu.c: the steps of one element wait
   for each other, and a processor that sees all of them at once has no room for the next elements meanwhile.
   a is m 2^k, m from sqrt 1/2 to sqrt 2, and log2 m a polynomial in z = (m - 1) / (m + 1). What 12 bits of e and the 8
   of k give is exact and kept apart from the rest, so that the result is off by few units of 2^-24 of itself. The
   polynomials are minimax fits, off by 1.3e-8 and 1.9e-9 of themselves, summed in pairs, which wait less for each other.
   Not `careful`, these are for normal numbers and results; where both serve they give the same bits. */
INLINE float split_float(float a, float *k, int careful) { /* z and k */
    int denormal = careful && a < 0x1p-126f;
    uint32_t bits = as_bits(denormal ? a * 0x1p24f : a) - 0x3F3504F3; /* of sqrt 1/2 */
    float m = as_float((bits & 0x007FFFFF) + 0x3F3504F3);
    *k = (float)((int32_t)bits >> 23) - (denormal ? 24.0f : 0.0f);
    return (m - 1.0f) / (m + 1.0f);
}
INLINE float log2_float(float z, float k, float *low, const Power *p) { /* of scale |x|^e, without `low` */
    float z2 = z * z;
    float log2_m = z * ((2.88539004f + z2 * 0.961798847f) + z2 * z2 * (0.576714337f + z2 * 0.4317379f));
    *low = (float)p->e * log2_m + ((float)p->e_low * k + (float)p->log2_low);
    return (float)p->e_high * k + (float)p->log2_high;
}
INLINE float exp2_float(float high, float low, int careful) {
    const float to_whole = 0x1.8p23f; /* added it rounds to a whole number, which then is in the lowest bits */
    float sum = high + low;
    float shifted = (!careful ? sum : sum < -250.0f ? -250.0f : sum > 250.0f ? 250.0f : sum) + to_whole;
    float r = (high - (shifted - to_whole)) + low;
    if (careful) r = r < -1.0f ? -1.0f : r > 1.0f ? 1.0f : r; /* beyond are 0 and infinity */
    float r2 = r * r;
    float power = 1.0f + r * ((0.69314718f + r * 0.24022646f)
                + r2 * ((0.055503286f + r * 0.0096184891f) + r2 * (0.0013399931f + r * 0.00015345812f)));
    if (!careful) return as_float(as_bits(power) + (as_bits(shifted) << 23));
    int32_t whole = (int32_t)(as_bits(shifted) - as_bits(to_whole)), half = whole >> 1;
    power *= as_float((uint32_t)(half + 127) << 23); /* two factors, since 2^whole may be no float */
    return power * as_float((uint32_t)(whole - half + 127) << 23);
}
INLINE double split_double(double a, double *k, int careful) { (void)careful; *k = 0; return a; }
INLINE double log2_double(double a, double k, double *low, const Power *p) {
    *low = k;
    return p->e * log2(a) + (p->log2_high + p->log2_low);
}
INLINE double exp2_double(double high, double low, int careful) { (void)careful; (void)low; return exp2(high); }

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

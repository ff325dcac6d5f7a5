/* scale="matched": the beta that gives the noise the power of Dropout's, as kernels/reference.py defines it. Part of
   cpu.c, which includes it once for each REAL and once without. */

#ifdef REAL

/* The sums of n elements, so few that they are still in a cache when they are read for the second time. */
TARGETS static void NAME(sums)(const Call *c, int64_t start, int64_t n, Sums *sums) {
    REAL buffer[BLOCK], u[BLOCK], power[BLOCK], peak;
    BITS largest = 0;
    for (int64_t done = 0; done < n; done += BLOCK) {
        int count = n - done < BLOCK ? (int)(n - done) : BLOCK;
        const REAL *x = NAME(load)(buffer, c->x, start + done, count, c->plan->dtype);
        for (int i = 0; i < count; i++) {
            BITS bits = NAME(bits_of)(ABS(x[i]));
            largest = bits > largest ? bits : largest; /* NaN is */
        }
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

#else

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

#endif

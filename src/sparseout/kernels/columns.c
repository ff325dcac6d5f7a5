/* y = W x + b from the columns of W whose x is not 0: sparse linear layers. Part of cpu.c, which includes it once for
   each REAL and once without. W is stored column by column.

   A task makes `width` outputs of one row. It collects the nonzeros of x in a buffer and adds their columns eight at a
   time, so that eight are on their way from memory at once. The order of the sums does not depend on the number of
   threads, but does on `width`. */

#ifdef REAL

#ifndef WIDTH
#define WIDTH 1024
typedef struct {
    int32_t dtype;
    void *y;
    const void *x, *w, *bias;
    int64_t ins, outs, width, parts; /* width: outputs of a task, of which there are `parts` a row */
} Linear;
#endif

/* sums += the columns of these numbers times these values; eight of them, or one. */
#define COLUMNS(type, convert) do { \
    const type *w = (const type *)c->w + first; \
    if (count == 8) { \
        const type *a = w + at[0] * c->outs, *b = w + at[1] * c->outs, *d = w + at[2] * c->outs; \
        const type *e = w + at[3] * c->outs, *f = w + at[4] * c->outs, *g = w + at[5] * c->outs; \
        const type *h = w + at[6] * c->outs, *k = w + at[7] * c->outs; \
        for (int i = 0; i < width; i++) \
            sums[i] += ((v[0] * convert(a[i]) + v[1] * convert(b[i])) + (v[2] * convert(d[i]) + v[3] * convert(e[i]))) \
                     + ((v[4] * convert(f[i]) + v[5] * convert(g[i])) + (v[6] * convert(h[i]) + v[7] * convert(k[i]))); \
    } else for (int j = 0; j < count; j++) { \
        const type *a = w + at[j] * c->outs; \
        for (int i = 0; i < width; i++) sums[i] += v[j] * convert(a[i]); \
    } } while (0)

INLINE void NAME(add_columns)(REAL *restrict sums, const Linear *c, const int64_t *at, const REAL *v, int count,
                              int64_t first, int width) {
    if (c->dtype == BFLOAT16) COLUMNS(uint16_t, from_bfloat16);
    else if (c->dtype == FLOAT16) COLUMNS(uint16_t, from_float16);
    else COLUMNS(REAL, );
}

TARGETS static void NAME(outputs)(const Linear *c, int64_t row, int64_t first, int width) {
    REAL sums[WIDTH] = {0}, wide[BLOCK], v[BLOCK + 8], bias_wide[WIDTH];
    int64_t at[BLOCK + 8];
    int found = 0;
    for (int64_t start = 0; start < c->ins; start += BLOCK) {
        int n = (int)(c->ins - start < BLOCK ? c->ins - start : BLOCK), done = 0;
        const REAL *x = NAME(load)(wide, c->x, row * c->ins + start, n, c->dtype);
        for (int i = 0; i < n; i++) {
            at[found] = start + i;
            v[found] = x[i];
            found += x[i] != 0;
        }
        for (; done + 8 <= found; done += 8) NAME(add_columns)(sums, c, at + done, v + done, 8, first, width);
        for (int i = 0; i < found - done; i++) { at[i] = at[done + i]; v[i] = v[done + i]; }
        found -= done;
    }
    NAME(add_columns)(sums, c, at, v, found, first, width);
    if (c->bias) {
        const REAL *bias = NAME(load)(bias_wide, c->bias, first, width, c->dtype);
        for (int i = 0; i < width; i++) sums[i] += bias[i];
    }
    uint16_t *halves = (uint16_t *)c->y + row * c->outs + first;
    if (c->dtype == BFLOAT16) for (int i = 0; i < width; i++) halves[i] = to_bfloat16((float)sums[i]);
    else if (c->dtype == FLOAT16) for (int i = 0; i < width; i++) halves[i] = to_float16((float)sums[i]);
    else memcpy((REAL *)c->y + row * c->outs + first, sums, (size_t)width * sizeof(REAL));
}
#undef COLUMNS

TARGETS static int64_t NAME(nonzeros)(const void *x, int64_t n) {
    const REAL *numbers = x;
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) found += numbers[i] != 0;
    return found;
}

#else

TARGETS static int64_t nonzeros_halves(const void *x, int64_t n) {
    const uint16_t *halves = x;
    int64_t found = 0;
    for (int64_t i = 0; i < n; i++) found += (halves[i] & 0x7FFF) != 0;
    return found;
}

static void linear_tasks(int64_t begin, int64_t end, void *call) {
    const Linear *c = call;
    for (int64_t task = begin; task < end; task++) {
        int64_t first = task % c->parts * c->width;
        int width = (int)(c->outs - first < c->width ? c->outs - first : c->width);
        (c->dtype == FLOAT64 ? outputs_double : outputs_float)(c, task / c->parts, first, width);
    }
}

/* Writes y, (rows, outs), and returns 1; or returns 0 if more than `most` numbers of x, (rows, ins), are not 0. */
int32_t sparseout_linear(int32_t dtype, void *y, const void *x, const void *w, const void *bias, int64_t rows,
                         int64_t ins, int64_t outs, int64_t width, int64_t most) {
    int64_t n = rows * ins, found = dtype == FLOAT64 ? nonzeros_double(x, n)
                                  : dtype == FLOAT32 ? nonzeros_float(x, n) : nonzeros_halves(x, n);
    if (found > most) return 0;
    Linear c = {dtype, y, x, w, bias, ins, outs, width < WIDTH ? width : WIDTH, 0};
    c.parts = (outs + c.width - 1) / c.width;
    int64_t tasks = rows * c.parts, each = (found * outs + ins * rows * c.parts) / tasks + 1;
    int64_t grain = (GRAIN * BLOCK + each - 1) / each;
    if (tasks <= grain || !parallel_for || parallel_for(0, tasks, grain, linear_tasks, &c)) linear_tasks(0, tasks, &c);
    return 1;
}

#endif

/* Included by kernels.c once for each REAL. Matrices are row-major; strides count elements. */

#define LANES ((Int)(32 / sizeof(REAL)))
typedef REAL N(V) __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
typedef INTEGER N(VI) __attribute__((vector_size(32), aligned(sizeof(REAL)), may_alias));
#define V N(V)
#define VI N(VI)

/* C = alpha * (offset + A B) + beta * C, of a tile of ``rows`` x ``vectors`` * LANES; offset: one row, whole vectors. */
INLINE void N(tile)(const int rows, const int vectors, Int depth, const REAL *a, Int row, Int column, const REAL *b,
                    Int b_row, const REAL *offset, REAL *c, Int c_row, REAL alpha, REAL beta) {
    V sums[ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) sums[i][j] = *(const V *)(offset + j * LANES);
    for (Int k = 0; k < depth; k++) {
        const V first = *(const V *)(b + k * b_row);
        const V second = vectors > 1 ? *(const V *)(b + k * b_row + LANES) : first;
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            const REAL x = a[i * row + k * column];
            sums[i][0] += x * first;
            if (vectors > 1) sums[i][1] += x * second;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            V *at = (V *)(c + i * c_row + j * LANES);
            *at = beta == 0 ? alpha * sums[i][j] : alpha * sums[i][j] + beta * *at;
        }
}

#define TILE(r, v)                                                                                                     \
    __attribute__((noinline)) static void N(tile_##r##_##v)(Int depth, const REAL *a, Int row, Int column, const REAL *b, \
                                                            Int b_row, const REAL *offset, REAL *c, Int c_row,          \
                                                            REAL alpha, REAL beta) {                                   \
        N(tile)(r, v, depth, a, row, column, b, b_row, offset, c, c_row, alpha, beta);                                  \
    }
TILE(1, 1) TILE(2, 1) TILE(3, 1) TILE(4, 1) TILE(5, 1) TILE(6, 1)
TILE(1, 2) TILE(2, 2) TILE(3, 2) TILE(4, 2) TILE(5, 2) TILE(6, 2)
#undef TILE

typedef void (*N(Tile))(Int, const REAL *, Int, Int, const REAL *, Int, const REAL *, REAL *, Int, REAL, REAL);
static const N(Tile) N(TILES)[2][ROWS] = {
    {N(tile_1_1), N(tile_2_1), N(tile_3_1), N(tile_4_1), N(tile_5_1), N(tile_6_1)},
    {N(tile_1_2), N(tile_2_2), N(tile_3_2), N(tile_4_2), N(tile_5_2), N(tile_6_2)},
};

/* A (m x depth) by strides, B (depth x n) by strides, C (m x n) by rows. ``scratch``: depth * 2 * LANES. */
static void N(gemm)(Int m, Int n, Int depth, const REAL *a, Int row, Int column, const REAL *b, Int b_row, Int b_column,
                    const REAL *bias, REAL *c, Int c_row, REAL alpha, REAL beta, REAL *scratch) {
    const Int blocks = (m + ROWS - 1) / ROWS;
    for (Int at = 0; at < n; at += 2 * LANES) {
        const Int valid = n - at < 2 * LANES ? n - at : 2 * LANES, vectors = valid > LANES ? 2 : 1, width = vectors * LANES;
        const REAL *panel = b + at * b_column;
        REAL offset[2 * 32 / sizeof(REAL)] = {0}, part[ROWS * 2 * 32 / sizeof(REAL)];
        Int panel_row = b_row, first = 0;
        if (b_column != 1 || valid != width) { /* columns side by side, and zeros up to a whole vector */
            for (Int j = valid; j < width; j++)
                for (Int k = 0; k < depth; k++) scratch[k * width + j] = 0;
            if (b_column == 1)
                for (Int k = 0; k < depth; k++)
                    for (Int j = 0; j < valid; j++) scratch[k * width + j] = panel[k * b_row + j];
            else
                for (Int j = 0; j < valid; j++)
                    for (Int k = 0; k < depth; k++) scratch[k * width + j] = panel[k * b_row + j * b_column];
            panel = scratch;
            panel_row = width;
        }
        if (bias)
            for (Int j = 0; j < valid; j++) offset[j] = bias[at + j];
        for (Int block = 0; block < blocks; block++) {
            const Int rows = (m - first + blocks - block - 1) / (blocks - block);
            const N(Tile) tile = N(TILES)[vectors - 1][rows - 1];
            REAL *to = c + first * c_row + at;
            if (valid == width) {
                tile(depth, a + first * row, row, column, panel, panel_row, offset, to, c_row, alpha, beta);
            } else {
                tile(depth, a + first * row, row, column, panel, panel_row, offset, part, width, alpha, 0);
                for (Int i = 0; i < rows; i++)
                    for (Int j = 0; j < valid; j++)
                        to[i * c_row + j] = beta == 0 ? part[i * width + j] : part[i * width + j] + beta * to[i * c_row + j];
            }
            first += rows;
        }
    }
}

static void N(column_sums)(Int rows, Int columns, const REAL *x, Int row, REAL *out) {
    memset(out, 0, (size_t)columns * sizeof(REAL));
    for (Int i = 0; i < rows; i++)
        for (Int j = 0; j < columns; j++) out[j] += x[i * row + j];
}

/* A gradient: into ``grad`` where there is one, else a step of ``value``. */
INLINE void N(settle)(Int count, const REAL *found, REAL *value, REAL *grad, REAL rate, REAL keep) {
    if (grad) memcpy(grad, found, (size_t)count * sizeof(REAL));
    else
        for (Int i = 0; i < count; i++) value[i] = keep * value[i] - rate * found[i];
}

/* Linear layers. x (K, R, I), y (K, R, O); w (K, I, O) and b (K, O) with ``stride`` between clients. */

int N(linear_forward)(Int clients, Int rows, Int inputs, Int outputs, Int stride, const REAL *x, const REAL *w,
                      const REAL *b, REAL *y) {
    REAL *scratch = malloc((size_t)(inputs * 2 * LANES) * sizeof(REAL));
    if (!scratch) return 1;
    for (Int k = 0; k < clients; k++)
        N(gemm)(rows, outputs, inputs, x + k * rows * inputs, inputs, 1, w + k * stride, outputs, 1,
                b ? b + k * stride : 0, y + k * rows * outputs, outputs, 1, 0, scratch);
    free(scratch);
    return 0;
}

/* dx (K, R, I) or none; gradients into gw, gb, or straight into w, b. */
int N(linear_backward)(Int clients, Int rows, Int inputs, Int outputs, Int stride, const REAL *x, const REAL *dy, REAL *w,
                       REAL *b, REAL *gw, REAL *gb, REAL *dx, REAL rate, REAL keep) {
    const Int deep = rows > outputs ? rows : outputs;
    REAL *scratch = malloc((size_t)(deep * 2 * LANES + outputs) * sizeof(REAL)), *sums = scratch + deep * 2 * LANES;
    if (!scratch) return 1;
    for (Int k = 0; k < clients; k++) {
        const REAL *in = x + k * rows * inputs, *down = dy + k * rows * outputs;
        REAL *value = w + k * stride;
        if (dx)
            N(gemm)(rows, inputs, outputs, down, outputs, 1, value, 1, outputs, 0, dx + k * rows * inputs, inputs, 1, 0,
                    scratch);
        if (gw) N(gemm)(inputs, outputs, rows, in, 1, inputs, down, outputs, 1, 0, gw + k * stride, outputs, 1, 0, scratch);
        else N(gemm)(inputs, outputs, rows, in, 1, inputs, down, outputs, 1, 0, value, outputs, -rate, keep, scratch);
        if (b) {
            N(column_sums)(rows, outputs, down, outputs, sums);
            N(settle)(outputs, sums, b + k * stride, gb ? gb + k * stride : 0, rate, keep);
        }
    }
    free(scratch);
    return 0;
}

/* Convolutions over time, channels last. x (K, B, T, C), y (K, B, T', O); w (K, taps * C, O). A row of windows is a stretch
 * of the padded sequence where taps are neighbours, else one stretch a tap. */

typedef struct {
    Int clients, batch, steps, channels, outputs, taps, stride, padding, dilation, out, between;
} N(Conv);

INLINE void N(pad)(const N(Conv) *s, const REAL *x, REAL *padded) {
    memcpy(padded + s->padding * s->channels, x, (size_t)(s->steps * s->channels) * sizeof(REAL));
}

int N(conv_forward)(const N(Conv) *s, const REAL *x, const REAL *w, const REAL *b, REAL *y) {
    const Int c = s->channels, o = s->outputs, length = s->steps + 2 * s->padding, whole = s->dilation == 1;
    const Int pieces = whole ? 1 : s->taps, depth = whole ? s->taps * c : c;
    REAL *padded = calloc((size_t)(length * c + depth * 2 * LANES), sizeof(REAL)), *scratch = padded + length * c;
    if (!padded) return 1;
    for (Int k = 0; k < s->clients; k++)
        for (Int i = 0; i < s->batch; i++) {
            N(pad)(s, x + (k * s->batch + i) * s->steps * c, padded);
            for (Int p = 0; p < pieces; p++)
                N(gemm)(s->out, o, depth, padded + p * s->dilation * c, s->stride * c, 1, w + k * s->between + p * c * o, o, 1,
                        b && !p ? b + k * s->between : 0, y + (k * s->batch + i) * s->out * o, o, 1, p ? 1 : 0, scratch);
        }
    free(padded);
    return 0;
}

int N(conv_backward)(const N(Conv) *s, const REAL *x, const REAL *dy, REAL *w, REAL *b, REAL *gw, REAL *gb, REAL *dx,
                     REAL rate, REAL keep) {
    const Int c = s->channels, o = s->outputs, length = s->steps + 2 * s->padding, whole = s->dilation == 1;
    const Int pieces = whole ? 1 : s->taps, width = whole ? s->taps * c : c, size = s->taps * c * o;
    const Int deep = s->out > o ? s->out : o;
    const Int parts[] = {length * c, size, o, s->taps * c * o, s->out * s->taps * c, length * c, deep * 2 * LANES};
    Int total = 0;
    for (int p = 0; p < 7; p++) total += parts[p];
    REAL *padded = calloc((size_t)total, sizeof(REAL));
    if (!padded) return 1;
    REAL *found = padded + parts[0], *sums = found + parts[1], *turned = sums + parts[2], *columns = turned + parts[3];
    REAL *folded = columns + parts[4], *scratch = folded + parts[5];
    for (Int k = 0; k < s->clients; k++) {
        REAL *value = w + k * s->between;
        const REAL *down = dy + k * s->batch * s->out * o;
        if (dx) /* (O, taps C): the same for all examples */
            for (Int m = 0; m < s->taps * c; m++)
                for (Int j = 0; j < o; j++) turned[j * s->taps * c + m] = value[m * o + j];
        for (Int i = 0; i < s->batch; i++) {
            const REAL *one = down + i * s->out * o;
            N(pad)(s, x + (k * s->batch + i) * s->steps * c, padded);
            for (Int p = 0; p < pieces; p++)
                N(gemm)(width, o, s->out, padded + p * s->dilation * c, 1, s->stride * c, one, o, 1, 0, found + p * c * o, o, 1,
                        i ? 1 : 0, scratch);
            if (!dx) continue;
            N(gemm)(s->out, s->taps * c, o, one, o, 1, turned, s->taps * c, 1, 0, columns, s->taps * c, 1, 0, scratch);
            memset(folded, 0, (size_t)(length * c) * sizeof(REAL));
            for (Int t = 0; t < s->out; t++)
                for (Int p = 0; p < pieces; p++) {
                    REAL *to = folded + t * s->stride * c + p * s->dilation * c;
                    const REAL *from = columns + t * s->taps * c + p * c;
                    for (Int j = 0; j < width; j++) to[j] += from[j];
                }
            memcpy(dx + (k * s->batch + i) * s->steps * c, folded + s->padding * c, (size_t)(s->steps * c) * sizeof(REAL));
        }
        N(settle)(size, found, value, gw ? gw + k * s->between : 0, rate, keep);
        if (b) {
            N(column_sums)(s->batch * s->out, o, down, o, sums);
            N(settle)(o, sums, b + k * s->between, gb ? gb + k * s->between : 0, rate, keep);
        }
    }
    free(padded);
    return 0;
}

/* Max pooling over time, x (N, T, C) -> y (N, T', C), then ReLU where asked; which: the place of each maximum, the first
 * one of equals as in torch. Places outside the sequence never win. */

int N(pool_forward)(Int count, Int steps, Int channels, Int kernel, Int stride, Int padding, Int out, Int relu,
                    const REAL *x, REAL *y, int32_t *which) {
    for (Int i = 0; i < count; i++)
        for (Int t = 0; t < out; t++) {
            REAL *to = y + (i * out + t) * channels;
            int32_t *place = which + (i * out + t) * channels;
            const Int start = t * stride - padding, first = start < 0 ? 0 : start;
            const Int end = start + kernel < steps ? start + kernel : steps;
            memcpy(to, x + (i * steps + first) * channels, (size_t)channels * sizeof(REAL));
            for (Int c = 0; c < channels; c++) place[c] = (int32_t)first;
            for (Int at = first + 1; at < end; at++) {
                const REAL *from = x + (i * steps + at) * channels;
                for (Int c = 0; c < channels; c++) {
                    const int larger = from[c] > to[c] || from[c] != from[c];
                    place[c] = larger ? (int32_t)at : place[c];
                    to[c] = larger ? from[c] : to[c];
                }
            }
            if (relu)
                for (Int c = 0; c < channels; c++) to[c] = to[c] <= 0 ? 0 : to[c];
        }
    return 0;
}

int N(pool_backward)(Int count, Int steps, Int channels, Int kernel, Int stride, Int padding, Int out, Int relu,
                     const REAL *dy, const REAL *y, const int32_t *which, REAL *dx) {
    memset(dx, 0, (size_t)(count * steps * channels) * sizeof(REAL));
    for (Int i = 0; i < count; i++)
        for (Int t = 0; t < out; t++) {
            const Int row = (i * out + t) * channels, start = t * stride - padding;
            const Int end = start + kernel < steps ? start + kernel : steps;
            for (Int at = start < 0 ? 0 : start; at < end; at++) {
                REAL *to = dx + (i * steps + at) * channels;
                for (Int c = 0; c < channels; c++) {
                    const int counts = which[row + c] == (int32_t)at && !(relu && y[row + c] <= 0);
                    to[c] += counts ? dy[row + c] : 0;
                }
            }
        }
    return 0;
}

#if SINGLE
/* A NaN passes. exp(x) - 1 = 2^n p + (2^n - 1), with p = exp(r) - 1 by its Taylor series to r^7, |r| <= ln 2 / 2: below 1e-8 of 1. */
INLINE V N(chosen)(VI mask, V yes, V no) { return (V)(((VI)yes & mask) | ((VI)no & ~mask)); }

INLINE V N(scaled_expm1)(V x, V *power) {
    x = N(chosen)(x > 88.0f, (V){0} + 88.0f, x);
    x = N(chosen)(x < -87.0f, (V){0} - 87.0f, x);
    const V magic = (V){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    const V shifted = x * 1.44269504088896341f + magic, n = shifted - magic;
    const V r = x - n * 0.693145751953125f - n * 1.42860682030941723212e-6f;
    V p = (V){0} + 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r;
    VI bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127 << 23);
    memcpy(power, &bits, sizeof bits);
    return p;
}

INLINE V N(exponential)(V x) {
    V power;
    const V p = N(scaled_expm1)(x, &power);
    return power * p + power;
}

INLINE V N(sigmoid)(V x) { return 1.0f / (1.0f + N(exponential)(-x)); }

INLINE V N(hyperbolic)(V x) {
    V power;
    const V size = N(chosen)(x < 0, x, -x); /* -|x| */
    const V p = N(scaled_expm1)(size + size, &power), m = power * p + (power - 1.0f); /* exp(-2|x|) - 1 */
    const V t = -m / (m + 2.0f);
    return N(chosen)(x < 0, -t, t);
}
#else
INLINE V N(exponential)(V x) {
    for (int i = 0; i < LANES; i++) x[i] = exp(x[i]);
    return x;
}
INLINE V N(sigmoid)(V x) {
    for (int i = 0; i < LANES; i++) x[i] = 1.0 / (1.0 + exp(-x[i]));
    return x;
}
INLINE V N(hyperbolic)(V x) {
    for (int i = 0; i < LANES; i++) x[i] = tanh(x[i]);
    return x;
}
#endif

/* Cross-entropy. logits (K, B, C), targets (K, B); sums (K,); gradient: of scale * sum. 2: a target is no class. */

int N(cross_entropy)(Int clients, Int batch, Int classes, const REAL *logits, const Int *targets, REAL scale, REAL *sums,
                     REAL *gradient) {
    const Int room = (classes + LANES - 1) / LANES * LANES;
    REAL *row = calloc((size_t)room, sizeof(REAL));
    if (!row) return 1;
    for (Int k = 0; k < clients; k++) {
        REAL total = 0;
        for (Int i = 0; i < batch; i++) {
            const Int at = k * batch + i, target = targets[at];
            const REAL *x = logits + at * classes;
            REAL *to = gradient + at * classes, most = x[0], sum = 0;
            if (target < 0 || target >= classes) {
                free(row);
                return 2;
            }
            for (Int c = 1; c < classes; c++) most = x[c] > most || x[c] != x[c] ? x[c] : most;
            for (Int c = 0; c < classes; c++) row[c] = x[c] - most;
            for (Int c = 0; c < room; c += LANES) *(V *)(row + c) = N(exponential)(*(V *)(row + c));
            for (Int c = 0; c < classes; c++) sum += row[c];
            total += (REAL)log(sum) - (x[target] - most);
            for (Int c = 0; c < classes; c++) to[c] = row[c] / sum * scale;
            to[target] -= scale;
        }
        sums[k] = total;
    }
    free(row);
    return 0;
}

/* Gated recurrent unit, in torch's form: r, z = sigmoid, n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = n + z (h - n).
 * x (K, B, T, I), states (K, T + 1, B, H) of which the first are zero, gates (K, T, B, 3 H), inner (K, T, B, H);
 * w_in (3 H, I), w_state (3 H, H). H is a multiple of LANES. */

typedef struct {
    Int clients, batch, steps, inputs, hidden, between;
} N(Gru);

int N(gru_forward)(const N(Gru) *s, const REAL *x, const REAL *w_in, const REAL *w_state, const REAL *b_in,
                   const REAL *b_state, REAL *gates, REAL *inner, REAL *states) {
    const Int b = s->batch, h = s->hidden, g = 3 * h, in = s->inputs, deep = in > h ? in : h;
    const Int parts[] = {in * g, h * g, b * g, deep * 2 * LANES};
    REAL *turned_in = malloc((size_t)(parts[0] + parts[1] + parts[2] + parts[3]) * sizeof(REAL));
    if (!turned_in) return 1;
    REAL *turned = turned_in + parts[0], *product = turned + parts[1], *scratch = product + parts[2];
    for (Int k = 0; k < s->clients; k++) {
        const REAL *wi = w_in + k * s->between, *ws = w_state + k * s->between;
        for (Int j = 0; j < g; j++) {
            for (Int i = 0; i < in; i++) turned_in[i * g + j] = wi[j * in + i];
            for (Int i = 0; i < h; i++) turned[i * g + j] = ws[j * h + i];
        }
        const REAL *data = x + k * b * s->steps * in;
        REAL *state = states + k * (s->steps + 1) * b * h;
        memset(state, 0, (size_t)(b * h) * sizeof(REAL));
        for (Int t = 0; t < s->steps; t++, state += b * h) {
            REAL *gate = gates + (k * s->steps + t) * b * g, *kept = inner + (k * s->steps + t) * b * h;
            N(gemm)(b, g, in, data + t * in, s->steps * in, 1, turned_in, g, 1, b_in + k * s->between, gate, g, 1, 0, scratch);
            N(gemm)(b, g, h, state, h, 1, turned, g, 1, b_state + k * s->between, product, g, 1, 0, scratch);
            for (Int i = 0; i < b; i++)
                for (Int j = 0; j < h; j += LANES) {
                    V *r = (V *)(gate + i * g + j), *z = (V *)(gate + i * g + h + j), *n = (V *)(gate + i * g + 2 * h + j);
                    const V *p = (const V *)(product + i * g + j), *q = (const V *)(product + i * g + h + j);
                    const V w = *(const V *)(product + i * g + 2 * h + j), old = *(const V *)(state + i * h + j);
                    *r = N(sigmoid)(*r + *p);
                    *z = N(sigmoid)(*z + *q);
                    *n = N(hyperbolic)(*n + *r * w);
                    *(V *)(kept + i * h + j) = w;
                    *(V *)(state + (b + i) * h + j) = *n + *z * (old - *n);
                }
        }
    }
    free(turned_in);
    return 0;
}

/* dy (K, B, T, H); gates and inner become gradients. g_*: gradients, or none: straight into the parameters. */
int N(gru_backward)(const N(Gru) *s, const REAL *x, const REAL *dy, REAL *w_in, REAL *w_state, REAL *b_in, REAL *b_state,
                    REAL *g_w_in, REAL *g_w_state, REAL *g_b_in, REAL *g_b_state, REAL *gates, REAL *inner,
                    const REAL *states, REAL *dx, REAL rate, REAL keep) {
    const Int b = s->batch, h = s->hidden, g = 3 * h, in = s->inputs, rows = s->steps * b;
    const Int deep = rows > g ? rows : g;
    const Int parts[] = {b * h, b * g, g * in, g * h, g, g, rows * in, deep * 2 * LANES, b * h};
    Int total = 0;
    for (int p = 0; p < 9; p++) total += parts[p];
    REAL *room = malloc((size_t)total * sizeof(REAL)), *down = room;
    if (!room) return 1;
    REAL *both = down + parts[0], *in_found = both + parts[1], *state_found = in_found + parts[2];
    REAL *in_sums = state_found + parts[3], *state_sums = in_sums + parts[4], *by_time = state_sums + parts[5];
    REAL *scratch = by_time + parts[6], *next = scratch + parts[7];
    for (Int k = 0; k < s->clients; k++) {
        const Int shift = k * s->between;
        REAL *gate0 = gates + k * rows * g, *inner0 = inner + k * rows * h;
        const REAL *state0 = states + k * (rows + b) * h, *outside = dy + k * b * s->steps * h;
        memset(down, 0, (size_t)(b * h) * sizeof(REAL));
        for (Int t = s->steps - 1; t >= 0; t--) {
            REAL *gate = gate0 + t * b * g, *kept = inner0 + t * b * h;
            const REAL *before = state0 + t * b * h;
            for (Int i = 0; i < b; i++)
                for (Int j = 0; j < h; j += LANES) {
                    V *r = (V *)(gate + i * g + j), *z = (V *)(gate + i * g + h + j), *n = (V *)(gate + i * g + 2 * h + j);
                    V *w = (V *)(kept + i * h + j);
                    const V d = *(V *)(down + i * h + j) + *(const V *)(outside + (i * s->steps + t) * h + j);
                    const V dn = d * (1 - *z) * (1 - *n * *n), dz = d * (*(const V *)(before + i * h + j) - *n) * *z * (1 - *z);
                    const V dr = dn * *w * *r * (1 - *r), dw = dn * *r;
                    *(V *)(next + i * h + j) = d * *z;
                    *(V *)(both + i * g + j) = *r = dr;
                    *(V *)(both + i * g + h + j) = *z = dz;
                    *(V *)(both + i * g + 2 * h + j) = *w = dw;
                    *n = dn;
                }
            N(gemm)(b, h, g, both, g, 1, w_state + shift, h, 1, 0, next, h, 1, 1, scratch);
            REAL *kept_down = down;
            down = next;
            next = kept_down;
        }
        for (Int t = 0; t < s->steps; t++)
            for (Int i = 0; i < b; i++)
                memcpy(by_time + (t * b + i) * in, x + ((k * b + i) * s->steps + t) * in, (size_t)in * sizeof(REAL));
        N(gemm)(g, in, rows, gate0, 1, g, by_time, in, 1, 0, in_found, in, 1, 0, scratch);
        N(gemm)(2 * h, h, rows, gate0, 1, g, state0, h, 1, 0, state_found, h, 1, 0, scratch);
        N(gemm)(h, h, rows, inner0, 1, h, state0, h, 1, 0, state_found + 2 * h * h, h, 1, 0, scratch);
        N(column_sums)(rows, g, gate0, g, in_sums);
        memcpy(state_sums, in_sums, (size_t)(2 * h) * sizeof(REAL));
        N(column_sums)(rows, h, inner0, h, state_sums + 2 * h);
        if (dx) { /* time first, then to (B, T, I) */
            N(gemm)(rows, in, g, gate0, g, 1, w_in + shift, in, 1, 0, by_time, in, 1, 0, scratch);
            for (Int t = 0; t < s->steps; t++)
                for (Int i = 0; i < b; i++)
                    memcpy(dx + ((k * b + i) * s->steps + t) * in, by_time + (t * b + i) * in, (size_t)in * sizeof(REAL));
        }
        N(settle)(g * in, in_found, w_in + shift, g_w_in ? g_w_in + shift : 0, rate, keep);
        N(settle)(g * h, state_found, w_state + shift, g_w_state ? g_w_state + shift : 0, rate, keep);
        N(settle)(g, in_sums, b_in + shift, g_b_in ? g_b_in + shift : 0, rate, keep);
        N(settle)(g, state_sums, b_state + shift, g_b_state ? g_b_state + shift : 0, rate, keep);
    }
    free(room);
    return 0;
}

/* Whole local updates: a chain of the kernels above with cross-entropy and plain SGD, client by client, so that a small model and
 * its activations stay in the nearest cache from the first step to the last. An operation is FIELDS integers: its kind, places
 * of values in ``room`` (in, out, kept, and gradients of in and out; in = -1: the examples), of parameters, and sizes. */

INLINE N(Conv) N(conv_of)(const Int *s, Int batch) {
    return (N(Conv)){1, batch, s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], 0};
}

static int N(step_forward)(const Int *o, Int b, const REAL *data, REAL *w, REAL *room) {
    const Int *s = o + SIZES;
    const REAL *x = o[IN] < 0 ? data : room + o[IN], *bias = o[P1] < 0 ? 0 : w + o[P1];
    REAL *y = room + o[OUT], *kept = room + o[KEPT];
    switch (o[KIND]) {
    case LINEAR: return N(linear_forward)(1, b * s[0], s[1], s[2], 0, x, w + o[P0], bias, y);
    case CONV: {
        const N(Conv) c = N(conv_of)(s, b);
        return N(conv_forward)(&c, x, w + o[P0], bias, y);
    }
    case POOL: return N(pool_forward)(b, s[0], s[1], s[2], s[3], s[4], s[5], s[6], x, y, (int32_t *)kept);
    case RELU:
        for (Int i = 0; i < b * s[0]; i++) y[i] = x[i] <= 0 ? 0 : x[i];
        return 0;
    case MEAN:
        for (Int i = 0; i < b; i++) {
            N(column_sums)(s[0], s[1], x + i * s[0] * s[1], s[1], y + i * s[1]);
            for (Int c = 0; c < s[1]; c++) y[i * s[1] + c] /= (REAL)s[0];
        }
        return 0;
    case LAST:
        for (Int i = 0; i < b; i++)
            memcpy(y + i * s[1], x + (i * s[0] + s[2]) * s[1], (size_t)s[1] * sizeof(REAL));
        return 0;
    default: { /* GRU: gates, inner and states lie behind each other */
        const N(Gru) g = {1, b, s[0], s[1], s[2], 0};
        REAL *inner = kept + b * s[0] * 3 * s[2], *states = inner + b * s[0] * s[2];
        const int code = N(gru_forward)(&g, x, w + o[P0], w + o[P1], w + o[P2], w + o[P3], kept, inner, states);
        for (Int i = 0; i < b; i++)
            for (Int t = 0; t < s[0]; t++)
                memcpy(y + (i * s[0] + t) * s[2], states + ((t + 1) * b + i) * s[2], (size_t)s[2] * sizeof(REAL));
        return code;
    }
    }
}

static int N(step_backward)(const Int *o, Int b, const REAL *data, REAL *w, REAL *room, REAL rate, REAL keep) {
    const Int *s = o + SIZES;
    const REAL *x = o[IN] < 0 ? data : room + o[IN], *y = room + o[OUT];
    REAL *dy = room + o[D_OUT], *dx = o[D_IN] < 0 ? 0 : room + o[D_IN], *kept = room + o[KEPT];
    REAL *bias = o[P1] < 0 ? 0 : w + o[P1];
    switch (o[KIND]) {
    case LINEAR: return N(linear_backward)(1, b * s[0], s[1], s[2], 0, x, dy, w + o[P0], bias, 0, 0, dx, rate, keep);
    case CONV: {
        const N(Conv) c = N(conv_of)(s, b);
        return N(conv_backward)(&c, x, dy, w + o[P0], bias, 0, 0, dx, rate, keep);
    }
    case POOL: return N(pool_backward)(b, s[0], s[1], s[2], s[3], s[4], s[5], s[6], dy, y, (const int32_t *)kept, dx);
    case RELU:
        for (Int i = 0; i < b * s[0]; i++) dx[i] = y[i] <= 0 ? 0 : dy[i];
        return 0;
    case MEAN:
        for (Int i = 0; i < b * s[0]; i++)
            for (Int c = 0; c < s[1]; c++) dx[i * s[1] + c] = dy[i / s[0] * s[1] + c] / (REAL)s[0];
        return 0;
    case LAST:
        memset(dx, 0, (size_t)(b * s[0] * s[1]) * sizeof(REAL));
        for (Int i = 0; i < b; i++)
            memcpy(dx + (i * s[0] + s[2]) * s[1], dy + i * s[1], (size_t)s[1] * sizeof(REAL));
        return 0;
    default: {
        const N(Gru) g = {1, b, s[0], s[1], s[2], 0};
        REAL *inner = kept + b * s[0] * 3 * s[2], *states = inner + b * s[0] * s[2];
        return N(gru_backward)(&g, x, dy, w + o[P0], w + o[P1], w + o[P2], w + o[P3], 0, 0, 0, 0, kept, inner, states, dx,
                               rate, keep);
    }
    }
}

/* data (rows, features) and targets (rows,), client by client in the order of training; sizes: examples of each step, of which
 * client k has steps[k]; denominators: of the loss, by size of batch. values (K, between), each first set to
 * ``origin`` where there is one; offset: added after each step, a row a client or (between 0) one for all. totals, weights (K,): of the loss. */
int N(train)(Int clients, Int count, const Int *operations, Int fields, Int features, Int classes, Int logits, Int gradient,
             Int room_size, Int between, const REAL *data, const Int *targets, const Int *sizes, const Int *steps,
             const double *denominators, const REAL *origin, const REAL *offset, Int offset_between,
             REAL *values, double *totals, double *weights, REAL rate, REAL keep) {
    REAL *room = malloc((size_t)(room_size > 0 ? room_size : 1) * sizeof(REAL));
    int code = room ? 0 : 1;
    for (Int k = 0; k < clients && !code; k++) {
        REAL *w = values + k * between;
        if (origin) memcpy(w, origin, (size_t)between * sizeof(REAL));
        totals[k] = weights[k] = 0;
        for (Int step = 0; step < steps[k] && !code; step++) {
            const Int b = *sizes++;
            REAL sum = 0;
            for (Int i = 0; i < count && !code; i++)
                code = N(step_forward)(operations + i * fields, b, data, w, room);
            if (!code)
                code = N(cross_entropy)(1, b, classes, room + logits, targets, (REAL)(1 / denominators[b]), &sum,
                                        room + gradient);
            for (Int i = count - 1; i >= 0 && !code; i--)
                code = N(step_backward)(operations + i * fields, b, data, w, room, rate, keep);
            if (offset)
                for (Int i = 0; i < between; i++) w[i] += offset[k * offset_between + i];
            totals[k] += sum;
            weights[k] += denominators[b];
            data += b * features;
            targets += b;
        }
    }
    free(room);
    return code;
}

#undef V
#undef VI
#undef LANES

/* Included by kernels.c once for each REAL, after kernels.h: two-dimensional convolutions, pooling over images, and linear layers whose
 * matrix does not fit in the nearest cache. */

#define V N(V)
#define LANES ((Int)(32 / sizeof(REAL)))
#define WIDTH (2 * LANES)

/* A sum of ``runs`` products, each ``depth`` deep and ``a_run``, ``b_run`` after the one before: rows of windows of an image. */
INLINE void N(runs)(const int rows, Int runs, Int a_run, Int b_run, Int depth, const REAL *a, Int row, Int column,
                    const REAL *b, Int b_row, const REAL *offset, REAL *c, Int c_row, REAL more) {
    V sums[ROWS][2];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
            if (more != 0) sums[i][j] = more * *(const V *)(c + i * c_row + j * LANES);
            else sums[i][j] = *(const V *)(offset + j * LANES);
    for (Int run = 0; run < runs; run++, a += a_run, b += b_run) {
        const REAL *left = a, *right = b;
        for (Int k = 0; k < depth; k++, left += column, right += b_row) {
            const V first = *(const V *)right, second = *(const V *)(right + LANES);
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) {
                const REAL x = left[i * row];
                sums[i][0] += x * first;
                sums[i][1] += x * second;
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) *(V *)(c + i * c_row + j * LANES) = sums[i][j];
}

#define RUNS(r)                                                                                                        \
    __attribute__((noinline)) static void N(runs_##r)(Int runs, Int a_run, Int b_run, Int depth, const REAL *a, Int row, \
                                                      Int column, const REAL *b, Int b_row, const REAL *offset, REAL *c, \
                                                      Int c_row, REAL more) {                                          \
        N(runs)(r, runs, a_run, b_run, depth, a, row, column, b, b_row, offset, c, c_row, more);                       \
    }
RUNS(1) RUNS(2) RUNS(3) RUNS(4) RUNS(5) RUNS(6)
#undef RUNS

typedef void (*N(Runs))(Int, Int, Int, Int, const REAL *, Int, Int, const REAL *, Int, const REAL *, REAL *, Int, REAL);
static const N(Runs) N(RUNS)[ROWS] = {N(runs_1), N(runs_2), N(runs_3), N(runs_4), N(runs_5), N(runs_6)};

/* C (m x valid) = more * C, or offset where ``more`` is 0, + the runs; B has WIDTH columns, of which ``valid`` count. */
INLINE void N(strip)(Int m, Int valid, Int runs, Int a_run, Int b_run, Int depth, const REAL *a, Int row, Int column,
                     const REAL *b, Int b_row, const REAL *offset, REAL *c, Int c_row, REAL more) {
    const Int blocks = (m + ROWS - 1) / ROWS;
    REAL part[ROWS * WIDTH];
    for (Int block = 0, first = 0; block < blocks; block++) {
        const Int rows = (m - first + blocks - block - 1) / (blocks - block);
        const REAL *from = a + first * row;
        REAL *to = c + first * c_row;
        if (valid == WIDTH) {
            N(RUNS)[rows - 1](runs, a_run, b_run, depth, from, row, column, b, b_row, offset, to, c_row, more);
        } else {
            if (more)
                for (Int i = 0; i < rows; i++)
                    for (Int j = 0; j < WIDTH; j++) part[i * WIDTH + j] = j < valid ? to[i * c_row + j] : 0;
            N(RUNS)[rows - 1](runs, a_run, b_run, depth, from, row, column, b, b_row, offset, part, WIDTH, more);
            for (Int i = 0; i < rows; i++) memcpy(to + i * c_row, part + i * WIDTH, (size_t)valid * sizeof(REAL));
        }
        first += rows;
    }
}

/* (depth x columns) by strides -> panels of WIDTH columns side by side, with zeros after the last column. */
static void N(panels)(Int columns, Int depth, const REAL *from, Int row, Int column, REAL *to) {
    for (Int at = 0; at < columns; at += WIDTH)
        for (Int k = 0; k < depth; k++)
            for (Int j = 0; j < WIDTH; j++) *to++ = at + j < columns ? from[k * row + (at + j) * column] : 0;
}

INLINE Int N(panelled)(Int columns) { return (columns + WIDTH - 1) / WIDTH * WIDTH; }

/* Convolutions, channels last. x (K, B, H, W, C), y (K, B, H', W', O); w (K, O, tall, wide, C), b (K, O), ``between`` apart. */

typedef struct {
    Int clients, batch, height, width, channels, outputs, tall, wide, down, right, pad_h, pad_w, out_h, out_w, between;
} N(Image);

INLINE Int N(padded_size)(const N(Image) *s) {
    return (s->height + 2 * s->pad_h) * (s->width + 2 * s->pad_w) * s->channels;
}

/* The borders of ``padded`` are zero already. */
INLINE void N(pad_image)(const N(Image) *s, const REAL *x, REAL *padded) {
    const Int row = s->width * s->channels, line = row + 2 * s->pad_w * s->channels;
    for (Int i = 0; i < s->height; i++)
        memcpy(padded + (i + s->pad_h) * line + s->pad_w * s->channels, x + i * row, (size_t)row * sizeof(REAL));
}

int N(image_forward)(const N(Image) *s, const REAL *x, const REAL *w, const REAL *b, REAL *y) {
    const Int c = s->channels, o = s->outputs, stretch = s->wide * c, depth = s->tall * stretch;
    const Int line = (s->width + 2 * s->pad_w) * c, columns = N(panelled)(o), pixels = s->out_h * s->out_w;
    const Int pads = s->pad_h || s->pad_w, room = columns * depth + columns + N(padded_size)(s);
    REAL *packed = calloc((size_t)room, sizeof(REAL)), *offset = packed + columns * depth, *padded = offset + columns;
    if (!packed) return 1;
    for (Int k = 0; k < s->clients; k++) {
        N(panels)(o, depth, w + k * s->between, 1, depth, packed);
        if (b) memcpy(offset, b + k * s->between, (size_t)o * sizeof(REAL));
        for (Int i = k * s->batch; i < (k + 1) * s->batch; i++) {
            const REAL *in = x + i * s->height * s->width * c;
            if (pads) N(pad_image)(s, in, padded);
            if (pads) in = padded;
            for (Int at = 0; at < o; at += WIDTH)
                for (Int r = 0; r < s->out_h; r++)
                    N(strip)(s->out_w, o - at < WIDTH ? o - at : WIDTH, s->tall, line, stretch * WIDTH, stretch,
                             in + r * s->down * line, s->right * c, 1, packed + at * depth, WIDTH, offset + at,
                             y + (i * pixels + r * s->out_w) * o + at, o, 0);
        }
    }
    free(packed);
    return 0;
}

/* found (O, tall, wide, C) += of one image; ``in``: padded, readable WIDTH beyond its end. */
static void N(image_weights)(const N(Image) *s, const REAL *in, const REAL *down, REAL *found, Int more) {
    const Int c = s->channels, o = s->outputs, stretch = s->wide * c, depth = s->tall * stretch;
    const Int line = (s->width + 2 * s->pad_w) * c, near = 64 * 1024 / (Int)sizeof(REAL);
    const REAL zeros[WIDTH] = {0};
    Int rows = (near - s->tall * line) / (s->out_w * o + s->down * line); /* so many that both stay in the nearest cache */
    rows = rows < 1 ? 1 : rows > s->out_h ? s->out_h : rows;
    for (Int r = 0; r < s->out_h; r += rows) {
        const Int runs = s->out_h - r < rows ? s->out_h - r : rows;
        for (Int t = 0; t < s->tall; t++)
            for (Int at = 0; at < stretch; at += WIDTH)
                N(strip)(o, stretch - at < WIDTH ? stretch - at : WIDTH, runs, s->out_w * o, s->down * line, s->out_w,
                         down + r * s->out_w * o, 1, o, in + (r * s->down + t) * line + at, s->right * c, zeros,
                         found + t * stretch + at, depth, more || r ? 1 : 0);
    }
}

/* dx of one image, padded, which is zero before; packed: for each row of taps (O x wide C) in panels. */
static void N(image_inputs)(const N(Image) *s, const REAL *down, const REAL *packed, REAL *columns, REAL *dx) {
    const Int c = s->channels, o = s->outputs, stretch = s->wide * c, line = (s->width + 2 * s->pad_w) * c;
    const Int all = N(panelled)(stretch);
    const REAL zeros[WIDTH] = {0};
    for (Int t = 0; t < s->tall; t++)
        for (Int r = 0; r < s->out_h; r++) {
            for (Int at = 0; at < all; at += WIDTH)
                N(strip)(s->out_w, WIDTH, 1, 0, 0, o, down + r * s->out_w * o, o, 1, packed + (t * all + at) * o, WIDTH, zeros,
                         columns + at, all, 0);
            REAL *to = dx + (r * s->down + t) * line;
            for (Int j = 0; j < s->out_w; j++, to += s->right * c)
                for (Int m = 0; m < stretch; m++) to[m] += columns[j * all + m];
        }
}

/* dx (K, B, H, W, C) or none; gradients into gw, gb, or straight into w, b. */
int N(image_backward)(const N(Image) *s, const REAL *x, const REAL *dy, REAL *w, REAL *b, REAL *gw, REAL *gb, REAL *dx,
                      REAL rate, REAL keep) {
    const Int c = s->channels, o = s->outputs, stretch = s->wide * c, depth = s->tall * stretch, size = N(padded_size)(s);
    const Int row = s->width * c, line = row + 2 * s->pad_w * c, all = N(panelled)(stretch), pixels = s->out_h * s->out_w;
    const Int parts[] = {size + WIDTH, o * depth, o, s->tall * all * o, s->out_w * all, size};
    Int total = 0;
    for (int p = 0; p < 6; p++) total += parts[p];
    REAL *padded = calloc((size_t)total, sizeof(REAL));
    if (!padded) return 1;
    REAL *found = padded + parts[0], *sums = found + parts[1], *packed = sums + parts[2], *columns = packed + parts[3];
    REAL *folded = columns + parts[4];
    for (Int k = 0; k < s->clients; k++) {
        REAL *value = w + k * s->between;
        if (dx) /* before the weights change */
            for (Int t = 0; t < s->tall; t++) N(panels)(stretch, o, value + t * stretch, depth, 1, packed + t * all * o);
        for (Int i = 0; i < s->batch; i++) {
            const Int image = k * s->batch + i;
            const REAL *down = dy + image * pixels * o;
            N(pad_image)(s, x + image * s->height * row, padded);
            N(image_weights)(s, padded, down, found, i);
            if (!dx) continue;
            REAL *to = dx + image * s->height * row;
            REAL *whole = s->pad_h || s->pad_w ? folded : to;
            memset(whole, 0, (size_t)size * sizeof(REAL));
            N(image_inputs)(s, down, packed, columns, whole);
            if (whole != to)
                for (Int r = 0; r < s->height; r++)
                    memcpy(to + r * row, whole + (r + s->pad_h) * line + s->pad_w * c, (size_t)row * sizeof(REAL));
        }
        N(settle)(o * depth, found, value, gw ? gw + k * s->between : 0, rate, keep);
        if (b) {
            N(column_sums)(s->batch * pixels, o, dy + k * s->batch * pixels * o, o, sums);
            N(settle)(o, sums, b + k * s->between, gb ? gb + k * s->between : 0, rate, keep);
        }
    }
    free(padded);
    return 0;
}

/* Max pooling over images, then ReLU where asked. x (N, H, W, C) -> y (N, H', W', C), or (N, C, H', W') where ``planar``; which
 * (N, H', W', C): the number of the winning tap, the first one of equals as in torch; of ReLU's zeros -1. */

typedef struct {
    Int count, height, width, channels, tall, wide, down, right, pad_h, pad_w, out_h, out_w, relu, planar;
} N(Pool);

int N(image_pool_forward)(const N(Pool) *s, const REAL *x, REAL *y, INTEGER *which) {
    const Int c = s->channels, pixels = s->out_h * s->out_w;
    REAL *row = malloc((size_t)(s->out_w * c) * sizeof(REAL));
    if (!row) return 1;
    for (Int n = 0; n < s->count; n++)
        for (Int i = 0; i < s->out_h; i++) {
            REAL *to = s->planar ? row : y + (n * pixels + i * s->out_w) * c;
            INTEGER *won = which + (n * pixels + i * s->out_w) * c;
            for (Int j = 0; j < s->out_w; j++) {
                REAL *best = to + j * c;
                INTEGER *place = won + j * c;
                Int some = 0;
                for (Int t = 0; t < s->tall; t++)
                    for (Int u = 0; u < s->wide; u++) {
                        const Int h = i * s->down - s->pad_h + t, v = j * s->right - s->pad_w + u;
                        if (h < 0 || h >= s->height || v < 0 || v >= s->width) continue;
                        const REAL *from = x + ((n * s->height + h) * s->width + v) * c;
                        const INTEGER tap = (INTEGER)(t * s->wide + u);
                        if (!some++) {
                            memcpy(best, from, (size_t)c * sizeof(REAL));
                            for (Int m = 0; m < c; m++) place[m] = tap;
                        } else
                            for (Int m = 0; m < c; m++) {
                                const int larger = from[m] > best[m] || from[m] != from[m];
                                best[m] = larger ? from[m] : best[m];
                                place[m] = larger ? tap : place[m];
                            }
                    }
                if (s->relu)
                    for (Int m = 0; m < c; m++) {
                        const int dead = best[m] <= 0;
                        best[m] = dead ? 0 : best[m];
                        place[m] = dead ? -1 : place[m];
                    }
            }
            if (s->planar)
                for (Int m = 0; m < c; m++)
                    for (Int j = 0; j < s->out_w; j++) y[(n * c + m) * pixels + i * s->out_w + j] = row[j * c + m];
        }
    free(row);
    return 0;
}

int N(image_pool_backward)(const N(Pool) *s, const REAL *dy, const INTEGER *which, REAL *dx) {
    const Int c = s->channels, pixels = s->out_h * s->out_w;
    REAL *row = malloc((size_t)(s->out_w * c) * sizeof(REAL));
    if (!row) return 1;
    memset(dx, 0, (size_t)(s->count * s->height * s->width * c) * sizeof(REAL));
    for (Int n = 0; n < s->count; n++)
        for (Int i = 0; i < s->out_h; i++) {
            const REAL *from = dy + (n * pixels + i * s->out_w) * c;
            const INTEGER *won = which + (n * pixels + i * s->out_w) * c;
            if (s->planar) {
                for (Int m = 0; m < c; m++)
                    for (Int j = 0; j < s->out_w; j++) row[j * c + m] = dy[(n * c + m) * pixels + i * s->out_w + j];
                from = row;
            }
            for (Int j = 0; j < s->out_w; j++)
                for (Int t = 0; t < s->tall; t++)
                    for (Int u = 0; u < s->wide; u++) {
                        const Int h = i * s->down - s->pad_h + t, v = j * s->right - s->pad_w + u;
                        if (h < 0 || h >= s->height || v < 0 || v >= s->width) continue;
                        REAL *to = dx + ((n * s->height + h) * s->width + v) * c;
                        const INTEGER tap = (INTEGER)(t * s->wide + u);
                        for (Int m = 0; m < c; m++) to[m] += won[j * c + m] == tap ? from[j * c + m] : 0;
                    }
        }
    free(row);
    return 0;
}

/* Linear layers of few rows and a large matrix, which is read once in each direction: in blocks of its rows that stay in the
 * nearest cache while both products of the backward pass are taken. x (K, R, I), y (K, R, O). */

INLINE Int N(block_rows)(Int outputs) {
    const Int rows = 16 * 1024 / (Int)sizeof(REAL) / outputs / ROWS * ROWS;
    return rows < ROWS ? ROWS : rows > 16 * ROWS ? 16 * ROWS : rows;
}

/* Rows that come next: a product takes them by columns, which no processor foresees. */
INLINE void N(fetch)(const REAL *from, Int count) {
    for (Int i = 0; i < count; i += 64 / (Int)sizeof(REAL)) __builtin_prefetch(from + i);
}

int N(wide_forward)(Int clients, Int rows, Int inputs, Int outputs, Int stride, const REAL *x, const REAL *w, const REAL *b,
                    REAL *y) {
    const Int block = N(block_rows)(outputs);
    REAL *scratch = malloc((size_t)(block * WIDTH) * sizeof(REAL));
    if (!scratch) return 1;
    for (Int k = 0; k < clients; k++)
        for (Int at = 0; at < inputs; at += block) {
            const Int size = inputs - at < block ? inputs - at : block, next = inputs - at - size;
            const REAL *here = w + k * stride + at * outputs;
            N(fetch)(here + size * outputs, (next < block ? next : block) * outputs);
            N(gemm)(rows, outputs, size, x + k * rows * inputs + at, inputs, 1, here, outputs, 1, b && !at ? b + k * stride : 0,
                    y + k * rows * outputs, outputs, 1, at ? 1 : 0, scratch);
        }
    free(scratch);
    return 0;
}

int N(wide_backward)(Int clients, Int rows, Int inputs, Int outputs, Int stride, const REAL *x, const REAL *dy, REAL *w,
                     REAL *b, REAL *gw, REAL *gb, REAL *dx, REAL rate, REAL keep) {
    const Int block = N(block_rows)(outputs), deep = rows > outputs ? rows : outputs, across = N(panelled)(rows);
    const Int panel = N(panelled)(outputs), parts[] = {deep * WIDTH, outputs, across * outputs, block * across, rows * panel};
    const REAL zeros[WIDTH] = {0};
    Int total = 0;
    for (int p = 0; p < 5; p++) total += parts[p];
    REAL *scratch = calloc((size_t)total, sizeof(REAL)), *sums = scratch + parts[0], *turned = sums + parts[1];
    REAL *part = turned + parts[2], *steps = part + parts[3];
    if (!scratch) return 1;
    for (Int k = 0; k < clients; k++) {
        const REAL *in = x + k * rows * inputs, *down = dy + k * rows * outputs;
        REAL *value = w + k * stride;
        for (Int i = 0; i < rows; i++)
            for (Int j = 0; j < outputs; j++) {
                turned[j * across + i] = down[i * outputs + j];
                steps[i * panel + j] = -rate * down[i * outputs + j];
            }
        for (Int at = 0; at < inputs; at += block) {
            const Int size = inputs - at < block ? inputs - at : block, next = inputs - at - size;
            REAL *here = value + at * outputs;
            N(fetch)(here + size * outputs, (next < block ? next : block) * outputs);
            if (dx) {
                N(gemm)(size, across, outputs, here, outputs, 1, turned, across, 1, 0, part, across, 1, 0, scratch);
                for (Int i = 0; i < rows; i++)
                    for (Int m = 0; m < size; m++) dx[(k * rows + i) * inputs + at + m] = part[m * across + i];
            }
            if (gw)
                N(gemm)(size, outputs, rows, in + at, 1, inputs, down, outputs, 1, 0, gw + k * stride + at * outputs, outputs, 1,
                        0, scratch);
            else
                for (Int o = 0; o < outputs; o += WIDTH)
                    N(strip)(size, outputs - o < WIDTH ? outputs - o : WIDTH, 1, 0, 0, rows, in + at, 1, inputs, steps + o,
                             panel, zeros, here + o, outputs, keep);
        }
        if (b) {
            N(column_sums)(rows, outputs, down, outputs, sums);
            N(settle)(outputs, sums, b + k * stride, gb ? gb + k * stride : 0, rate, keep);
        }
    }
    free(scratch);
    return 0;
}

#undef V
#undef LANES
#undef WIDTH

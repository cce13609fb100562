/* Kernels of the stacked engine for small models: one thread, K clients one after the other, in float and in double.
 *
 * Everything here has a twin in torch operations (simulations/engine/program), which it is held to by the tests. Compiled on
 * first use by the machine's own compiler; without one the twins run. GNU C (gcc, clang): vector types, 128-bit integers.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define ROWS 6 /* of a tile: 6 x 2 vectors of sums, two of B and a broadcast fill 16 registers */

typedef int64_t Int;

/* Of an operation of ``train``. */
enum { LINEAR, CONV, POOL, RELU, MEAN, LAST, GRU };
enum { KIND, IN, OUT, KEPT, D_IN, D_OUT, P0, P1, P2, P3, SIZES };

#define REAL float
#define INTEGER int32_t
#define N(name) name##_f32
#define SINGLE 1
#include "kernels.h"
#include "images.h"
#undef REAL
#undef INTEGER
#undef N
#undef SINGLE

#define REAL double
#define INTEGER int64_t
#define N(name) name##_f64
#define SINGLE 0
#include "kernels.h"
#include "images.h"

/* Permutations as numpy.random.Generator(PCG64).permutation draws them: O'Neill's PCG XSL-RR 128/64; bounded
 * integers from as many bits as needed of halves of its words, low half first, too large ones drawn again. One generator a
 * key. */

typedef unsigned __int128 Wide;

typedef struct {
    Wide state, step;
    uint32_t spare;
    int has_spare;
} Pcg;

static uint32_t next32(Pcg *g) {
    if (g->has_spare) {
        g->has_spare = 0;
        return g->spare;
    }
    g->state = g->state * (((Wide)0x2360ED051FC65DA4ULL << 64) | 0x4385DF649FCCF645ULL) + g->step;
    uint64_t mixed = (uint64_t)(g->state >> 64) ^ (uint64_t)g->state;
    unsigned turn = (unsigned)(g->state >> 122);
    uint64_t word = (mixed >> turn) | (mixed << ((64 - turn) & 63));
    g->spare = (uint32_t)(word >> 32);
    g->has_spare = 1;
    return (uint32_t)word;
}

static uint32_t up_to(Pcg *g, uint32_t most) {
    uint32_t mask = 0xFFFFFFFFu >> __builtin_clz(most), drawn;
    while ((drawn = next32(g) & mask) > most) {}
    return drawn;
}

/* numpy.random.SeedSequence(key).generate_state(4, uint64) of one word of entropy up to 64 bits (O'Neill's seed_seq). */
static void seeds_of(uint64_t key, uint64_t *seeds) {
    uint32_t pool[4], words[8], constant = 0x43B0D7E5u;
    const uint32_t entropy[4] = {(uint32_t)key, (uint32_t)(key >> 32), 0, 0};
#define HASHED(to, value, multiplier)                                                                                  \
    {                                                                                                                  \
        uint32_t mixed = (value) ^ constant;                                                                           \
        constant *= multiplier;                                                                                        \
        mixed *= constant;                                                                                             \
        to = mixed ^ (mixed >> 16);                                                                                    \
    }
    for (int i = 0; i < 4; i++) HASHED(pool[i], entropy[i], 0x931E8875u)
    for (int from = 0; from < 4; from++)
        for (int to = 0; to < 4; to++)
            if (from != to) {
                uint32_t other;
                HASHED(other, pool[from], 0x931E8875u)
                const uint32_t mixed = 0xCA01F9DDu * pool[to] - 0x4973F715u * other;
                pool[to] = mixed ^ (mixed >> 16);
            }
    constant = 0x8B51F9DDu;
    for (int i = 0; i < 8; i++) HASHED(words[i], pool[i % 4], 0x58F38DEDu)
#undef HASHED
    for (int i = 0; i < 4; i++) seeds[i] = words[2 * i] | ((uint64_t)words[2 * i + 1] << 32);
}

int permutations(Int clients, Int count, const uint64_t *keys, Int *out) {
    const Wide multiplier = ((Wide)0x2360ED051FC65DA4ULL << 64) | 0x4385DF649FCCF645ULL;
    for (Int k = 0; k < clients; k++) {
        uint64_t s[4];
        seeds_of(keys[k], s);
        Pcg g = {0, ((((Wide)s[2] << 64) | s[3]) << 1) | 1, 0, 0};
        g.state = (g.step + (((Wide)s[0] << 64) | s[1])) * multiplier + g.step;
        Int *row = out + k * count;
        for (Int i = 0; i < count; i++) row[i] = i;
        for (Int i = count - 1; i > 0; i--) {
            Int j = up_to(&g, (uint32_t)i), kept = row[i];
            row[i] = row[j];
            row[j] = kept;
        }
    }
    return 0;
}

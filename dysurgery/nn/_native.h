/* The loops of native.c, compiled once for each instruction set. Before each time are defined:
 *
 *   SUFFIX  ends the names
 *   V       floats of a vector
 *   MR      positions of a tile: MR * NV accumulators fill the registers
 *   OB      output channels of a tile of the weights' gradient, likewise
 *
 * Maps are (sample, row, column, channel), weights (output channel, input channel, tap), as torch has them in
 * channels_last and contiguous. A panel is a mixed kernel in the order of its use: (tap, channel, NR outputs), with one
 * row more for each tap, as rows that lie a power of two apart evict one another.
 */

#define NV 2        /* vectors of a row of a panel */
#define NR (V * NV) /* columns of a panel */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define NAME(f) JOIN(f, SUFFIX)
#define vec NAME(vec)

typedef float vec __attribute__((vector_size(V * sizeof(float)), aligned(4), may_alias));
typedef int NAME(ints) __attribute__((vector_size(V * sizeof(int)), aligned(4), may_alias));
#define ints NAME(ints)

#define LOAD(p) (*(const vec *)(p))
#define STORE(p, v) (*(vec *)(p) = (v))

INLINE vec NAME(splat)(float a) { return a - (vec){0}; }
#define splat NAME(splat)

INLINE float NAME(sum)(vec a)
{
    float total = 0;
    for (int i = 0; i < V; i++) total += a[i];
    return total;
}

/* Where `which` is all ones a, where it is all zeros b. */
INLINE vec NAME(select)(ints which, vec a, vec b) { return (vec)(((ints)a & which) | ((ints)b & ~which)); }
INLINE vec NAME(at_least)(vec a, float low) { return NAME(select)(a < splat(low), splat(low), a); } /* NaN stays */
INLINE vec NAME(at_most)(vec a, float high) { return NAME(select)(a > splat(high), splat(high), a); }

/* e^a to 2 units in the last place, from -87 to 88: 2^n e^r with |r| <= log(2) / 2 (the polynomial is that of Cephes). */
INLINE vec NAME(exponential)(vec a)
{
    vec n = a * splat(1.44269504f) + splat(12582912.0f); /* 1.5 * 2^23, which leaves n in the last bits, rounded */
    ints power = ((ints)n - (ints)splat(12582912.0f) + 127) << 23;
    n -= splat(12582912.0f);
    vec r = a - n * splat(0.693359375f) + n * splat(2.12194440e-4f), p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    return (p * r * r + r + splat(1.0f)) * (vec)power;
}

INLINE vec NAME(activated)(vec a, int activation)
{
    switch (activation) {
    case RELU: return NAME(at_least)(a, 0);
    case RELU6: return NAME(at_most)(NAME(at_least)(a, 0), 6);
    case HARDSWISH: return a * NAME(at_most)(NAME(at_least)(a + splat(3), 0), 6) * splat(1 / 6.0f);
    case SILU: a = NAME(at_least)(a, -87); return a / (splat(1) + NAME(exponential)(NAME(at_least)(-a, -87)));
    default: return a;
    }
}

/* One step of the transposition of V vectors: exchange the blocks of d columns above and below the diagonal. */
INLINE void NAME(exchange)(vec *a, vec *b, int d)
{
    vec low, high;
#if V == 16
#define PICK(...) __builtin_shufflevector(*a, *b, __VA_ARGS__)
    switch (d) {
    case 1: low = PICK(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30); high = PICK(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31); break;
    case 2: low = PICK(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29); high = PICK(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31); break;
    case 4: low = PICK(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27); high = PICK(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31); break;
    default: low = PICK(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23); high = PICK(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
#elif V == 8
#define PICK(...) __builtin_shufflevector(*a, *b, __VA_ARGS__)
    switch (d) {
    case 1: low = PICK(0, 8, 2, 10, 4, 12, 6, 14); high = PICK(1, 9, 3, 11, 5, 13, 7, 15); break;
    case 2: low = PICK(0, 1, 8, 9, 4, 5, 12, 13); high = PICK(2, 3, 10, 11, 6, 7, 14, 15); break;
    default: low = PICK(0, 1, 2, 3, 8, 9, 10, 11); high = PICK(4, 5, 6, 7, 12, 13, 14, 15);
    }
#else
#define PICK(...) __builtin_shufflevector(*a, *b, __VA_ARGS__)
    switch (d) {
    case 1: low = PICK(0, 4, 2, 6); high = PICK(1, 5, 3, 7); break;
    default: low = PICK(0, 1, 4, 5); high = PICK(2, 3, 6, 7);
    }
#endif
#undef PICK
    *a = low;
    *b = high;
}

INLINE void NAME(transpose)(vec *rows)
{
#pragma GCC unroll 4
    for (int d = 1; d < V; d *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < V; i++)
            if (!(i & d)) NAME(exchange)(&rows[i], &rows[i + d], d);
}

/* A vector of the kernel of one sample: sum_k pi_k from_k, where the kernels are `step` apart. */
INLINE vec NAME(mixed)(const float *pi, int K, const float *from, size_t step)
{
    vec mixed = splat(pi[0]) * LOAD(from);
    for (int k = 1; k < K; k++) mixed += splat(pi[k]) * LOAD(from + k * step);
    return mixed;
}

/* n <= V vectors of the kernel of one sample, each to its place, where those of a kernel are V apart and kernels V * V. */
INLINE void NAME(mix_turned)(const int K, float *const *to, size_t offset, int n, const float *pi, const float *turned)
{
    vec p[K];
#pragma GCC unroll 4
    for (int k = 0; k < K; k++) p[k] = splat(pi[k]);
    for (int i = 0; i < n; i++) {
        vec mixed = p[0] * LOAD(turned + i * V);
#pragma GCC unroll 4
        for (int k = 1; k < K; k++) mixed += p[k] * LOAD(turned + (k * V + i) * V);
        STORE(to[i] + offset, mixed);
    }
}

/* Mix the panels of S samples for a block of outputs and the channels c0 .. c0 + cn. RUN columns at a time are
 * gathered first, as rows that lie a power of two apart evict one another; meanwhile the next are fetched. */
static void NAME(panels_of_outputs)(const struct conv *c, float *panels, size_t panel, float *gathered, const float *pi,
                                    const float *bank, int S, struct block block, int c0, int cn)
{
    int K = c->K, T = c->kh * c->kw, n = c->Cin * T, columns = cn * T;
    size_t kernel = (size_t)c->Cout * n;
    float turned[K * V * V];
    for (int ob = 0; ob < block.n; ob += V) {
        int behind = ob ? block.second : 0, o = block.at + behind, have = block.n - behind < V ? block.n - behind : V;
        for (int j = 0; j < columns; j += RUN) {
            int run = columns - j < RUN ? columns - j : RUN;
            const float *next[MAX_ROWS];
            for (int k = 0, row = 0; k < K; k++)
                for (int i = 0; i < V; i++, row++) {
                    float *to = gathered + (size_t)row * RUN;
                    const float *from = bank + k * kernel + (size_t)(o + (i < have ? i : 0)) * n + c0 * T + j;
                    if (row < MAX_ROWS) next[row] = from + RUN;
                    if (i >= have) memset(to, 0, sizeof(float) * RUN);
                    else if (run == RUN)
#pragma GCC unroll 16
                        for (int q = 0; q < RUN; q += V) STORE(to + q, LOAD(from + q));
                    else {
                        int q = 0;
                        for (; q + V <= run; q += V) STORE(to + q, LOAD(from + q));
                        for (; q < run; q++) to[q] = from[q];
                    }
                }
            int rows = K * V < MAX_ROWS ? K * V : MAX_ROWS;
            for (int q = 0; q < run; q += V) {
                int m = run - q < V ? run - q : V;
                float *to[V];
                for (int i = 0; i < m; i++) to[i] = panels + ((size_t)((j + q + i) % T) * (cn + 1) + (j + q + i) / T) * NR + ob;
                if (S > K) { /* K transpositions instead of S */
                    for (int k = 0; k < K; k++) {
                        vec kernel[V];
#pragma GCC unroll 16
                        for (int i = 0; i < V; i++) kernel[i] = LOAD(gathered + q + (size_t)(k * V + i) * RUN);
                        NAME(transpose)(kernel);
#pragma GCC unroll 16
                        for (int i = 0; i < V; i++) STORE(turned + (k * V + i) * V, kernel[i]);
                    }
                    for (int s = 0; s < S; s++) {
                        for (int row = s; row < rows; row += S) __builtin_prefetch(next[row] + q, 0, 2);
                        if (K == 4) NAME(mix_turned)(4, to, s * panel, m, pi + s * K, turned);
                        else NAME(mix_turned)(K, to, s * panel, m, pi + s * K, turned);
                    }
                    continue;
                }
                for (int s = 0; s < S; s++) {
                    for (int row = s; row < rows; row += S) __builtin_prefetch(next[row] + q, 0, 2);
                    vec mixed[V], p = splat(pi[s * K]);
#pragma GCC unroll 16
                    for (int i = 0; i < V; i++) mixed[i] = p * LOAD(gathered + q + i * RUN);
                    for (int k = 1; k < K; k++) {
                        const float *from = gathered + q + (size_t)k * V * RUN;
                        p = splat(pi[s * K + k]);
#pragma GCC unroll 16
                        for (int i = 0; i < V; i++) mixed[i] += p * LOAD(from + i * RUN);
                    }
                    NAME(transpose)(mixed);
                    if (m == V)
#pragma GCC unroll 16
                        for (int i = 0; i < V; i++) STORE(to[i] + s * panel, mixed[i]);
                    else
                        for (int i = 0; i < m; i++) STORE(to[i] + s * panel, mixed[i]);
                }
            }
        }
    }
}

/* The weights (channel, tap) of V channels as (tap, V), rows `tap` apart; `end` is where the bank ends. */
INLINE void NAME(spread)(float *to, size_t tap, const float *from, int T, int cn, const float *end)
{
    if (T > 1 && T <= V && cn >= V) {
        vec rows[V];
        float last[V];
        for (int i = 0; i < V; i++) {
            const float *row = from + i * T;
            if (row + V > end) row = memcpy(last, row, sizeof(float) * T);
            rows[i] = LOAD(row);
        }
        NAME(transpose)(rows);
#pragma GCC unroll 16
        for (int t = 0; t < V; t++)
            if (t < T) STORE(to + t * tap, rows[t]);
        return;
    }
    for (int t = 0; t < T; t++, to += tap) {
        if (T == 1 && cn >= V) STORE(to, LOAD(from));
        else
            for (int i = 0; i < V; i++) to[i] = i < cn ? from[i * T + t] : 0;
    }
}

/* The weights of one output channel for a block of channels, of all K kernels: taps and kernels are that far apart. */
static void NAME(gather)(const struct conv *c, float *to, size_t tap, size_t kernel, const float *bank, int o, struct block block)
{
    int T = c->kh * c->kw;
    const float *end = bank + (size_t)c->K * c->Cout * c->Cin * T;
    for (int k = 0; k < c->K; k++, to += kernel) {
        const float *next = bank + (((size_t)k * c->Cout + o + 2) * c->Cin + block.at) * T; /* rows lie too far apart to be guessed */
        for (int i = 0; i < NR * T; i += 16) __builtin_prefetch(next + i, 0, 2);
        for (int v = 0; v < block.n; v += V) {
            int behind = v ? block.second : 0;
            NAME(spread)(to + v, tap, bank + (((size_t)k * c->Cout + o) * c->Cin + block.at + behind) * T, T, block.n - behind, end);
        }
    }
}

/* The same as panels_of_outputs with channels and outputs exchanged: panels (tap, output, NR channels). */
static void NAME(panels_of_channels)(const struct conv *c, float *panels, size_t panel, float *gathered, const float *pi,
                                     const float *bank, int S, struct block block, int o0, int on)
{
    int K = c->K, T = c->kh * c->kw;
    for (int o = 0; o < on; o++) {
        NAME(gather)(c, gathered, NR, (size_t)T * NR, bank, o0 + o, block);
        for (int t = 0; t < T; t++)
            for (int v = 0; v < block.n; v += V) {
                const float *from = gathered + t * NR + v;
                float *to = panels + ((size_t)t * (on + 1) + o) * NR + v;
                for (int s = 0; s < S; s++) STORE(to + s * panel, NAME(mixed)(pi + s * K, K, from, (size_t)T * NR));
            }
    }
}

/* y[m] (N vectors, `second` apart) = what it was, or first, + sum over taps and channels of x[m][off[tap] * step + channel] *
 * panel row, and then what comes after. */
INLINE void NAME(tile)(const int M, const int N, float *const *y, int second, const float *first, const float *const *x, int step,
                       int taps, const int *off, const int *which, int cn, const float *panel, const struct after *after)
{
    vec acc[MR][NV];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) acc[m][v] = LOAD((first ? first : y[m]) + v * second);
    for (int t = 0; t < taps; t++) {
        const float *w = panel + (size_t)which[t] * (cn + 1) * NR;
        int o = off[t] * step;
        for (int c = 0; c < cn; c++, w += NR, o++) {
            vec row[NV];
#pragma GCC unroll 2
            for (int v = 0; v < N; v++) row[v] = LOAD(w + v * V);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                vec a = splat(x[m][o]);
#pragma GCC unroll 2
                for (int v = 0; v < N; v++) acc[m][v] += a * row[v];
            }
        }
    }
    if (after && after->activation)
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 2
            for (int v = 0; v < N; v++) acc[m][v] = NAME(activated)(acc[m][v], after->activation);
    if (after && after->sums)
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) {
            vec sum = acc[0][v];
#pragma GCC unroll 16
            for (int m = 1; m < M; m++) sum += acc[m][v];
            STORE(after->sums + v * V, LOAD(after->sums + v * V) + sum);
        }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 2
        for (int v = 0; v < N; v++) STORE(y[m] + v * second, acc[m][v]);
}

/* The same for any number of positions up to MR, and of vectors up to NV. */
static void NAME(any_tile)(int M, int N, float *const *y, int second, const float *first, const float *const *x, int step,
                           int taps, const int *off, const int *which, int cn, const float *panel, const struct after *after)
{
    switch (M) {
#define CASE(M) case M: \
        if (N > 1) NAME(tile)(M, NV, y, second, first, x, step, taps, off, which, cn, panel, after); \
        else NAME(tile)(M, 1, y, 0, first, x, step, taps, off, which, cn, panel, after); \
        break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if MR > 6
    CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14)
#endif
#undef CASE
    }
}

/* Multiply one sample at all positions of the grid by the panels of several blocks of outputs, which are `apart`. */
static void NAME(multiply)(const struct grid *g, float *y, int blocks, const struct block *block, const float *first,
                           const float *x, int step, int cn, const float *panels, size_t apart, const struct after *after)
{
    int count = g->rows * g->columns, tiles = (count + MR - 1) / MR;
    for (int i = 0; i < tiles; i++) {
        int begin = (int)((long long)count * i / tiles), M = (int)((long long)count * (i + 1) / tiles) - begin;
        float *target[MR];
        const float *from[MR];
        for (int m = 0, r = begin / g->columns, q = begin % g->columns; m < M; m++, q++) {
            if (q == g->columns) q = 0, r++;
            from[m] = x + (r * g->x_row + q * g->x_column) * step;
            target[m] = y + r * g->y_row + q * g->y_column;
        }
        for (int b = 0; b < blocks; b++) {
            float *to[MR], edge[MR * V], start[V] = {0};
            const float *begin = first ? first + block[b].at : NULL;
            struct after here = {after ? after->activation : 0, after && after->sums ? after->sums + b * NR : NULL};
            int n = block[b].n, narrow = n < V; /* than a vector: what is behind it must not be touched */
            for (int m = 0; m < M; m++) to[m] = target[m] + block[b].at;
            for (int m = 0; narrow && m < M; m++) {
                if (!first) memcpy(edge + m * V, to[m], sizeof(float) * n);
                to[m] = edge + m * V;
            }
            if (narrow && first) begin = memcpy(start, begin, sizeof(float) * n);
            NAME(any_tile)(M, n > V ? 2 : 1, to, block[b].second, begin, from, step, g->taps, g->off, g->which, cn,
                           panels + b * apart, after ? &here : NULL);
            for (int m = 0; narrow && m < M; m++) memcpy(target[m] + block[b].at, edge + m * V, sizeof(float) * n);
        }
    }
}

#include "_winograd.h"

/* The output channels (or, towards the input, the input channels) o0 .. o0 + on, in blocks of NR, for S samples.
 * ``outputs`` of them are there in all, ``inner`` channels are summed over, and ``grids`` tell where. */
static int NAME(dense)(const struct conv *c, int backward, int grids, const struct grid *g, float *y, size_t y_sample,
                       const struct padded *x, const float *pi, const float *bank, const float *bias, struct after after, int s0,
                       int S, int o0, int on)
{
    int T = c->kh * c->kw, inner = backward ? c->Cout : c->Cin, outputs = backward ? c->Cin : c->Cout;
    int most = x->block, blocks = (on + NR - 1) / NR;
    size_t panel = (size_t)(most + 1) * (g->winograd ? SLOTS : T) * NR, gathered = (size_t)c->K * (backward ? T * NR : V * RUN);
    size_t tiles = g->winograd ? (size_t)SLOTS * TILES * most : 0, sums = g->winograd ? SLOTS * TILES * NR : 0;
    float *panels = room(panel * S * blocks + gathered + tiles + sums), *scratch = panels + panel * S * blocks;
    float zeros[outputs + NR], sums_of_y[blocks * NR], *mean = after.sums, scale = 1.0f / ((float)c->Ho * c->Wo);
    struct block block[blocks];
    if (!panels) return 0;
    if (!bias) memset(zeros, 0, sizeof zeros);
    if (mean) after.sums = sums_of_y;
    for (int i = 0; i < blocks; i++) {
        int o = o0 + i * NR, n = on - i * NR < NR ? on - i * NR : NR;
        /* The last vector may overlap the one before it; Winograd adds to y for each vector, and chunks of channels too. */
        if (n < V && outputs >= V && inner <= most && !g->winograd) o = outputs - V, n = V;
        block[i] = (struct block){o, n, g->winograd || n < V ? V : n - V};
    }
    for (int c0 = 0; c0 < inner; c0 += most) {
        int cn = inner - c0 < most ? inner - c0 : most, step = x->copy ? cn : inner, last = c0 + cn == inner;
        for (int i = 0; i < blocks; i++) {
            float *to = panels + panel * S * i;
            if (backward) NAME(panels_of_channels)(c, to, panel, scratch, pi + s0 * c->K, bank, S, block[i], c0, cn);
            else NAME(panels_of_outputs)(c, to, panel, scratch, pi + s0 * c->K, bank, S, block[i], c0, cn);
            for (int s = 0; s < S && g->winograd; s++) NAME(transform_panel)(to + panel * s, cn, backward);
        }
        for (int s = 0; s < S; s++) {
            float *to = y + (s0 + s) * y_sample;
            const float *from = x->x + (s0 + s) * x->sample + (x->copy ? (size_t)c0 * x->positions : (size_t)c0);
            const float *first = c0 ? NULL : bias ? bias + (size_t)(s0 + s) * outputs : zeros;
            if (last && mean) memset(sums_of_y, 0, sizeof sums_of_y);
            if (g->winograd)
                NAME(multiply_tiles)(g, to + o0, on, first ? first + o0 : NULL, from, step, cn, panels + panel * s, panel * S,
                                     scratch + gathered, scratch + gathered + tiles, last ? &after : NULL);
            else
                for (int i = 0; i < grids; i++)
                    NAME(multiply)(&g[i], to + g[i].y, blocks, block, first, from, step, cn, panels + panel * s, panel * S,
                                   last ? &after : NULL);
            for (int i = 0; last && mean && i < blocks; i++)
                for (int v = 0; v < block[i].n; v += V)
                    for (int o = v ? block[i].second : 0, j = 0; j < V && o < block[i].n; j++, o++)
                        mean[(size_t)(s0 + s) * outputs + block[i].at + o] = sums_of_y[i * NR + v + j] * scale;
        }
    }
    leave(panels);
    return 1;
}

/* pi and the bank get their gradients from those of S mixed kernels, g (s, size), samples `apart`: gpi (s, k) +=
 * bank . g, and gbank = or, with `add`, += pi g, where the kernels of bank and gbank are `kernel` apart. */
static void NAME(unmix)(int K, float *gpi, float *gbank, int add, const float *pi, const float *bank, size_t kernel, const float *g,
                        size_t apart, int S, int size)
{
    for (int k0 = 0; gbank && k0 < K; k0 += 4)
        for (int v = 0; v < size; v += V) {
            int n = size - v < V ? size - v : V;
            vec a[4] = {{0}};
            for (int k = 0; add && k < 4 && k0 + k < K; k++) memcpy(&a[k], gbank + (k0 + k) * kernel + v, sizeof(float) * n);
            if (K - k0 >= 4)
                for (int s = 0; s < S; s++) {
                    vec mixed = LOAD(g + s * apart + v);
#pragma GCC unroll 4
                    for (int k = 0; k < 4; k++) a[k] += splat(pi[s * K + k0 + k]) * mixed;
                }
            else
                for (int s = 0; s < S; s++)
                    for (int k = 0; k < K - k0; k++) a[k] += splat(pi[s * K + k0 + k]) * LOAD(g + s * apart + v);
            for (int k = 0; k < 4 && k0 + k < K; k++) {
                float *to = gbank + (k0 + k) * kernel + v;
                if (n == V) STORE(to, a[k]);
                else memcpy(to, &a[k], sizeof(float) * n);
            }
        }
    for (int k0 = 0; gpi && k0 < K; k0 += 4) {
        const float *rows[4];
        for (int k = 0; k < 4; k++) rows[k] = bank + (k0 + k < K ? k0 + k : k0) * kernel;
        for (int s = 0; s < S; s += 2) {
            const float *one = g + s * apart, *two = s + 1 < S ? one + apart : one;
            vec a[4] = {{0}}, b[4] = {{0}};
            for (int v = 0; v < size; v += V) {
                vec row[4] = {{0}};
                if (size - v >= V)
#pragma GCC unroll 4
                    for (int k = 0; k < 4; k++) row[k] = LOAD(rows[k] + v);
                else
                    for (int k = 0; k < 4; k++) memcpy(&row[k], rows[k] + v, sizeof(float) * (size - v));
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) {
                    a[k] += row[k] * LOAD(one + v);
                    b[k] += row[k] * LOAD(two + v);
                }
            }
            for (int k = 0; k < 4 && k0 + k < K; k++) {
                gpi[s * K + k0 + k] += NAME(sum)(a[k]);
                if (s + 1 < S) gpi[(s + 1) * K + k0 + k] += NAME(sum)(b[k]);
            }
        }
    }
}

/* (tap, V channels) to (channel, tap). The V floats behind may be overwritten. */
INLINE void NAME(turn)(float *to, const vec *taps, int T)
{
    vec rows[V] = {0};
#pragma GCC unroll 16
    for (int t = 0; t < V; t++)
        if (t < T) rows[t] = taps[t];
    NAME(transpose)(rows);
    /* What each has too much is overwritten by the next. */
#pragma GCC unroll 16
    for (int i = 0; i < V; i++) STORE(to + i * T, rows[i]);
}

/* The same in place for a row of blocks of V channels. */
static void NAME(turn_row)(float *row, int blocks, int T)
{
    for (int b = 0; b < blocks; b++, row += T * V) {
        float turned[(T + 1) * V];
        if (T <= V) NAME(turn)(turned, (const vec *)row, T);
        else
            for (int t = 0; t < T; t++)
                for (int i = 0; i < V; i++) turned[i * T + t] = row[t * V + i];
        memcpy(row, turned, sizeof(float) * T * V);
    }
}

/* Patches of x (H, W, Cin) of the channels c0 .. c0 + cn, for `count` positions of y from `begin` on, as rows of `columns`:
 * in the order of the weights, (channel, tap), or `late`: (block of V channels, tap, V), to be turned later. The rest is
 * zeros. V floats behind the last row may be overwritten. */
static void NAME(patches)(const struct conv *c, float *to, int columns, int late, const float *x, int begin, int count, int c0,
                          int cn)
{
    int T = c->kh * c->kw, used = cn * T;
    const float zeros[V] = {0};
    int top = begin / c->Wo * c->sh - c->ph, left = begin % c->Wo * c->sw - c->pw, end = c->Wo * c->sw - c->pw;
    for (int p = 0; p < count; p++, to += columns, left += c->sw) {
        const float *at[T];
        if (left == end) {
            left = -c->pw;
            top += c->sh;
        }
        for (int a = 0, t = 0, h = top; a < c->kh; a++, h += c->dh) {
            const float *row = h < 0 || h >= c->H ? NULL : x + (size_t)h * c->W * c->Cin + c0;
            for (int b = 0, w = left; b < c->kw; b++, w += c->dw)
                at[t++] = !row || w < 0 || w >= c->W ? NULL : row + (size_t)w * c->Cin;
        }
        int i = 0;
        for (; i + V <= cn && (late || T <= V); i += V) {
            if (late || T == 1) {
                for (int t = 0; t < T; t++) STORE(to + i * T + t * V, LOAD(at[t] ? at[t] + i : zeros));
                continue;
            }
            vec rows[V] = {0};
#pragma GCC unroll 16
            for (int t = 0; t < V; t++)
                if (t < T) rows[t] = LOAD(at[t] ? at[t] + i : zeros);
            NAME(turn)(to + i * T, rows, T);
        }
        if (i < cn && late)
            for (int v = i * T; v < columns; v++) to[v] = 0;
        for (int t = 0; t < T; t++)
            for (int v = i; v < cn; v++) to[late ? i * T + t * V + v - i : v * T + t] = at[t] ? at[t][v] : 0;
        for (int v = used; v < columns && !late; v++) to[v] = 0;
    }
}

/* Whether the patches are x itself. */
static int NAME(bare)(const struct conv *c)
{
    return c->kh * c->kw == 1 && c->sh == 1 && c->sw == 1 && !c->ph && !c->pw && c->Cin % V == 0;
}

/* The gradient of OB output channels and N * V columns, from gy (position, OB) and patches that are `step` apart. */
INLINE void NAME(outer)(const int N, float *to, int columns, int add, const float *gy, const float *patch, int step, int count)
{
    vec acc[OB][3];
#pragma GCC unroll 16
    for (int m = 0; m < OB; m++)
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) acc[m][v] = add ? LOAD(to + m * columns + v * V) : (vec){0};
    for (int p = 0; p < count; p++, gy += OB, patch += step) {
        vec row[3];
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) row[v] = LOAD(patch + v * V);
#pragma GCC unroll 16
        for (int m = 0; m < OB; m++) {
            vec a = splat(gy[m]);
#pragma GCC unroll 4
            for (int v = 0; v < N; v++) acc[m][v] += a * row[v];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < OB; m++)
#pragma GCC unroll 4
        for (int v = 0; v < N; v++) STORE(to + m * columns + v * V, acc[m][v]);
}

/* The gradients of pi (added) and of the bank (written or, with `add`, added) for the channels c0 .. c0 + cn and the
 * outputs o0 .. o0 + on, of S samples; gy is (output / OB, sample, position, OB). */
static int NAME(dense_weights)(const struct conv *c, float *gpi, float *gbank, int add, const float *gy, const float *x,
                               const float *pi, const float *bank, int S, int c0, int cn, int o0, int on)
{
    int K = c->K, T = c->kh * c->kw, n = c->Cin * T, size = cn * T, P = c->Ho * c->Wo;
    /* Either the patches are turned to the order of the weights or the gradients are, whichever are fewer. */
    int late = T > 1 && on < P, columns = late ? (cn + V - 1) / V * V * T : (size + V - 1) / V * V;
    /* All samples' patches at once, if they fit; else bands of positions, and all outputs' gradients are kept. */
    int bare = NAME(bare)(c), step = bare ? c->Cin : columns, whole = (size_t)(bare ? 1 : S) * P * columns <= PATCHES;
    int band = whole ? P : BAND, outputs = whole ? OB : (on + OB - 1) / OB * OB;
    size_t kernel = (size_t)c->Cout * n, block = (size_t)OB * columns, mixed = (size_t)outputs * columns;
    size_t copied = bare ? 0 : (size_t)(whole ? S : 1) * band * columns + V;
    float *g = room(S * mixed + copied), *patches = g + S * mixed;
    if (!g) return 0;
    for (int s0 = 0; s0 < S; s0 += whole ? S : 1)
        for (int p = 0; p < P; p += band) {
            int count = P - p < band ? P - p : band, s1 = whole ? S : s0 + 1, last = s1 == S && p + count == P;
            for (int s = s0; s < s1 && !bare; s++)
                NAME(patches)(c, patches + (size_t)(s - s0) * band * columns, columns, late,
                              x + (size_t)s * c->H * c->W * c->Cin, p, count, c0, cn);
            for (int o = 0; o < on; o += OB) {
                float *to = g + (whole ? 0 : o / OB * block);
                for (int s = s0; s < s1; s++) {
                    const float *from = gy + (((size_t)(o0 + o) / OB * S + s) * P + p) * OB;
                    const float *patch = bare ? x + ((size_t)s * P + p) * c->Cin + c0 : patches + (size_t)(s - s0) * band * columns;
                    for (int v = 0; v < columns; v += 3 * V)
                        switch ((columns - v) / V) {
                        case 1: NAME(outer)(1, to + s * mixed + v, columns, p, from, patch + v, step, count); break;
                        case 2: NAME(outer)(2, to + s * mixed + v, columns, p, from, patch + v, step, count); break;
                        default: NAME(outer)(3, to + s * mixed + v, columns, p, from, patch + v, step, count);
                        }
                    if (!last) continue;
                    /* Fetch a part of what unmix will read and write: its rows lie too far apart to be guessed. */
                    for (int row = s - s0; row < K * OB; row += s1 - s0) {
                        size_t at = row / OB * kernel + (size_t)(o0 + o + row % OB) * n + (size_t)c0 * T;
                        for (int i = 0; i < size && row % OB < on - o; i += 16) {
                            if (gpi) __builtin_prefetch(bank + at + i, 0, 2);
                            if (gbank) __builtin_prefetch(gbank + at + i, 1, 2);
                        }
                    }
                }
                for (int m = 0; last && m < OB && m < on - o; m++) {
                    for (int s = 0; late && s < S; s++) NAME(turn_row)(to + s * mixed + (size_t)m * columns, columns / (T * V), T);
                    size_t at = (size_t)(o0 + o + m) * n + (size_t)c0 * T;
                    NAME(unmix)(K, gpi, gbank ? gbank + at : NULL, add, pi, bank + at, kernel, to + (size_t)m * columns, mixed, S, size);
                }
            }
        }
    leave(g);
    return 1;
}

/* The same for all channels and outputs of S samples. */
static int NAME(dense_gradients)(const struct conv *c, float *gpi, float *gbank, int add, const float *gy, const float *x,
                                 const float *pi, const float *bank, int S, int threads)
{
    int T = c->kh * c->kw, P = c->Ho * c->Wo, K = c->K, ok = 1, blocks = (c->Cout + OB - 1) / OB;
    /* Fewer columns if that lets all samples' patches fit. */
    int columns = (size_t)S * P * COLUMNS > PATCHES && (size_t)S * P * COLUMNS / 2 <= PATCHES ? COLUMNS / 2 : COLUMNS;
    int most = columns / T / V * V, wide = WEIGHTS / (S * columns) / OB;
    if (most < V) most = V;
    if (wide < 1 || (size_t)(NAME(bare)(c) ? 1 : S) * P * most * T <= PATCHES) wide = blocks;
    int parts = (c->Cin + most - 1) / most, tall = (blocks + wide - 1) / wide;
    while (parts * tall < threads && tall < blocks) tall++;
    wide = (blocks + tall - 1) / tall;
    tall = (blocks + wide - 1) / wide;
    float *packed = room((size_t)blocks * S * P * OB), *partial = gpi ? room((size_t)parts * tall * S * K) : NULL;
    if (!packed || (gpi && !partial)) {
        leave(packed);
        leave(partial);
        return 0;
    }
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < S * P; i++) {
        const float *from = gy + (size_t)i * c->Cout;
        float *to = packed + (size_t)i * OB;
        int o = 0;
        for (; o + OB <= c->Cout; o += OB, to += (size_t)S * P * OB) memcpy(to, from + o, sizeof(float) * OB);
        for (int m = 0; o < c->Cout && m < OB; m++) to[m] = o + m < c->Cout ? from[o + m] : 0;
    }
#pragma omp parallel for num_threads(threads) reduction(&& : ok)
    for (int i = 0; i < parts * tall; i++) {
        int c0 = i / tall * most, cn = c->Cin - c0 < most ? c->Cin - c0 : most, o0 = i % tall * wide * OB;
        int on = c->Cout - o0 < wide * OB ? c->Cout - o0 : wide * OB;
        float *mine = gpi ? partial + (size_t)i * S * K : NULL;
        if (mine) memset(mine, 0, sizeof(float) * S * K);
        ok = NAME(dense_weights)(c, mine, gbank, add, packed, x, pi, bank, S, c0, cn, o0, on) && ok;
    }
    for (int i = 0; gpi && i < parts * tall; i++)
        for (int j = 0; j < S * K; j++) gpi[j] += partial[(size_t)i * S * K + j];
    leave(partial);
    leave(packed);
    return ok;
}

/* Depthwise. The weights of a sample are in blocks of V channels: (block, tap, V). The last block may overlap the one
 * before it; what it has twice is zero in gradients. */

static int NAME(blocks)(const struct conv *c) { return (c->Cin + V - 1) / V; }
static int NAME(channel)(const struct conv *c, int block) { return block * V + V <= c->Cin ? block * V : c->Cin - V; }

/* The bank as (k, block, tap, V). */
static void NAME(depthwise_gather)(const struct conv *c, float *to, const float *bank)
{
    int T = c->kh * c->kw, blocks = NAME(blocks)(c);
    for (int k = 0; k < c->K; k++)
        for (int b = 0; b < blocks; b++)
            for (int t = 0; t < T; t++)
                for (int i = 0; i < V; i++) *to++ = bank[((size_t)k * c->Cin + NAME(channel)(c, b) + i) * T + t];
}

/* Some positions of a row of y and what they read: A rows of x (or of gy, as y stands for gx) and in each B taps, columns
 * shift[b] of the first position and `stride` more for each next one. Those outside of x are zeros. */
struct NAME(line) {
    int A, B, stride, width, C;
    const float *const *x; /* at the first column */
    const int *shift;
    const vec *taps; /* (row, tap) */
    vec first;
    int activation;
    float *y;
    ptrdiff_t y_step;
};
#define line NAME(line)

/* What comes after, for P positions in registers from the p-th on. */
INLINE void NAME(finish)(const int P, float *y, ptrdiff_t y_step, vec *acc, int activation, vec *sums)
{
    vec total = *sums;
#pragma GCC unroll 8
    for (int i = 0; i < P; i++) {
        acc[i] = NAME(activated)(acc[i], activation);
        total += acc[i];
        STORE(y + i * y_step, acc[i]);
    }
    *sums = total;
}

/* The positions p .. end, of which no tap lies outside. The few taps stay in registers. */
INLINE void NAME(inside)(const int A, const int B, const struct line *l, int p, int end, vec *sums)
{
    vec weight[9], first = l->first, total = *sums;
    const float *from[9];
    ptrdiff_t step = (ptrdiff_t)l->stride * l->C, y_step = l->y_step;
    float *y = l->y;
    int activation = l->activation;
    for (int t = 0; t < A * B; t++) weight[t] = l->taps[t];
    for (int t = 0; t < A * B; t++) from[t] = l->x[t / B] + (ptrdiff_t)l->shift[t % B] * l->C;
    for (; p < end; p++) {
        vec acc = first;
#pragma GCC unroll 9
        for (int t = 0; t < A * B; t++) acc += LOAD(from[t] + p * step) * weight[t];
        NAME(finish)(1, y + p * y_step, y_step, &acc, activation, &total);
    }
    *sums = total;
}

/* The p-th position, of which taps may lie outside. */
INLINE void NAME(edge)(const int A, const int B, const struct line *l, int p, vec *sums)
{
    vec acc = l->first;
    for (int b = 0; b < B; b++) {
        int column = l->shift[b] + p * l->stride;
        if (column < 0 || column >= l->width) continue;
        for (int a = 0; a < A; a++) acc += LOAD(l->x[a] + (ptrdiff_t)column * l->C) * l->taps[a * B + b];
    }
    NAME(finish)(1, l->y + p * l->y_step, l->y_step, &acc, l->activation, sums);
}

/* P positions from the p-th on, which stay in registers, and any taps. */
INLINE void NAME(piece)(const int P, const struct line *l, int p, vec *sums)
{
    vec acc[8];
    ptrdiff_t step = (ptrdiff_t)l->stride * l->C;
#pragma GCC unroll 8
    for (int i = 0; i < P; i++) acc[i] = l->first;
    for (int b = 0; b < l->B; b++) {
        int column = l->shift[b] + p * l->stride, low = 0, high = P;
        while (low < P && column + low * l->stride < 0) low++;
        while (high > low && column + (high - 1) * l->stride >= l->width) high--;
        for (int a = 0; a < l->A; a++) {
            const float *from = l->x[a] + (ptrdiff_t)column * l->C;
            vec weight = l->taps[a * l->B + b];
#pragma GCC unroll 8
            for (int i = 0; i < P; i++)
                if (i >= low && i < high) acc[i] += weight * LOAD(from + i * step);
        }
    }
    NAME(finish)(P, l->y + p * l->y_step, l->y_step, acc, l->activation, sums);
}

/* The same where the B taps of a row lie side by side, forwards or backwards: what is loaded of x serves all of them. */
INLINE void NAME(sweep)(const int P, const int B, const int S, const struct line *l, int p, vec *sums)
{
    int backwards = l->shift[B - 1] < l->shift[0], column = l->shift[backwards ? B - 1 : 0] + p * S;
    int low = -column, high = l->width - column;
    vec acc[8];
#pragma GCC unroll 8
    for (int i = 0; i < P; i++) acc[i] = l->first;
    for (int a = 0; a < l->A; a++) {
        const float *from = l->x[a] + (ptrdiff_t)column * l->C;
        vec weight[8];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) weight[b] = l->taps[a * B + (backwards ? B - 1 - b : b)];
#pragma GCC unroll 32
        for (int j = 0; j < (P - 1) * S + B; j++, from += l->C) {
            if (j < low || j >= high) continue;
            vec here = LOAD(from);
#pragma GCC unroll 8
            for (int b = 0; b < B; b++)
                if (j >= b && (j - b) % S == 0 && (j - b) / S < P) acc[(j - b) / S] += here * weight[b];
        }
    }
    NAME(finish)(P, l->y + p * l->y_step, l->y_step, acc, l->activation, sums);
}

/* The positions p .. end; way 16 and 32: those that are swept, one and two columns apart. */
static void NAME(pieces)(const struct line *l, int way, int p, int end, vec *sums)
{
    for (int left = (end - p + 7) / 8; left > 0; left--) {
        int P = (end - p) / left;
        switch (way + P) {
#define CASE(P) case P: NAME(piece)(P, l, p, sums); break; \
        case 16 + P: NAME(sweep)(P, 5, 1, l, p, sums); break; \
        case 32 + P: NAME(sweep)(P, 5, 2, l, p, sums); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
        }
        p += P;
    }
}

/* The positions of n of which no tap lies outside: from `begin` to what is returned, which is no less. */
static int NAME(within)(const int *shift, int B, int stride, int width, int n, int *begin)
{
    int least = 0, most = 0;
    for (int b = 0; b < B; b++) {
        if (!b || shift[b] < least) least = shift[b];
        if (!b || shift[b] > most) most = shift[b];
    }
    int low = least < 0 ? (-least + stride - 1) / stride : 0, high = most < width ? (width - 1 - most) / stride + 1 : 0;
    *begin = low < n ? low : n;
    high = high < n ? high : n;
    return high > *begin ? high : *begin;
}

/* n positions. */
static void NAME(row)(const struct line *l, int n, int begin, int end, vec *sums)
{
    switch (l->A * 8 + l->B) {
#define CASE(A, B) case A * 8 + B: \
        for (int p = 0; p < begin; p++) NAME(edge)(A, B, l, p, sums); \
        NAME(inside)(A, B, l, begin, end, sums); \
        for (int p = end; p < n; p++) NAME(edge)(A, B, l, p, sums); \
        return;
    CASE(3, 3) CASE(2, 2) CASE(2, 1) CASE(1, 2) CASE(1, 1) CASE(3, 2) CASE(2, 3)
#undef CASE
    }
    int beside = l->B == 5 && l->stride <= 2;
    for (int b = 1; beside && b < 5; b++) beside = l->shift[b] - l->shift[b - 1] == (l->shift[1] > l->shift[0] ? 1 : -1);
    NAME(pieces)(l, beside ? l->stride * 16 : 0, 0, n, sums);
}

/* The rows of x that the taps of a row of y reach, and these taps: how many. */
static int NAME(reached)(const struct conv *c, int backward, int r, const float *x, const float **from, int *ky)
{
    int A = 0, step = backward ? c->sh : 1, height = backward ? c->Ho : c->H;
    size_t row = (size_t)(backward ? c->Wo : c->W) * c->Cin;
    for (int k = 0; k < c->kh; k++) {
        int at = backward ? r + c->ph - k * c->dh : r * c->sh - c->ph + k * c->dh;
        if (at < 0 || at % step || at / step >= height) continue;
        from[A] = x + at / step * row;
        ky[A++] = k;
    }
    return A;
}

/* One sample, of which the blocks b0 .. b1, whose weights are given: y from x (backward: 0), gx from gy (y = gx, x = gy,
 * backward: 1). */
static void NAME(depthwise)(const struct conv *c, int backward, int b0, int b1, float *y, const float *x, const float *weights,
                            const float *bias, struct after after)
{
    int C = c->Cin, T = c->kh * c->kw;
    int out_rows = backward ? c->H : c->Ho, width = backward ? c->W : c->Wo, step = backward ? c->sw : 1;
    int phases = step < width ? step : width, B[phases], kx[phases][c->kw], shift[phases][c->kw], begin[phases], end[phases];
    vec sums[b1 - b0];
    memset(sums, 0, sizeof sums);
    struct line l = {.stride = backward ? 1 : c->sw, .width = backward ? c->Wo : c->W, .C = C, .activation = after.activation,
                     .y_step = (ptrdiff_t)step * C};
    /* The taps that reach the columns of each phase of the stride. */
    for (int phase = 0; phase < phases; phase++) {
        for (int k = B[phase] = 0; k < c->kw; k++) {
            int at = backward ? phase + c->pw - k * c->dw : k * c->dw - c->pw;
            if (at % step) continue;
            shift[phase][B[phase]] = at / step;
            kx[phase][B[phase]++] = k;
        }
        end[phase] = NAME(within)(shift[phase], B[phase], l.stride, l.width, (width - phase + step - 1) / step, &begin[phase]);
    }
    for (int r = 0; r < out_rows; r++) {
        int ky[c->kh];
        const float *from[c->kh], *at[c->kh];
        l.A = NAME(reached)(c, backward, r, x, from, ky);
        l.x = at;
        for (int b = b0; b < b1; b++) {
            int channel = NAME(channel)(c, b);
            const vec *all = (const vec *)(weights + (size_t)(b - b0) * T * V);
            l.first = bias ? LOAD(bias + channel) : (vec){0};
            for (int a = 0; a < l.A; a++) at[a] = from[a] + channel;
            for (int phase = 0; phase < phases; phase++) {
                vec some[T];
                l.B = B[phase];
                l.shift = shift[phase];
                l.taps = some;
                l.y = y + ((size_t)r * width + phase) * C + channel;
                if (l.B == c->kw && l.A && ky[l.A - 1] - ky[0] == l.A - 1) l.taps = all + ky[0] * c->kw;
                else
                    for (int t = 0; t < l.A * l.B; t++) some[t] = all[ky[t / l.B] * c->kw + kx[phase][t % l.B]];
                NAME(row)(&l, (width - phase + step - 1) / step, begin[phase], end[phase], &sums[b - b0]);
            }
        }
    }
    for (int b = b0; after.sums && b < b1; b++)
        STORE(after.sums + NAME(channel)(c, b), sums[b - b0] * splat(1.0f / ((float)c->Ho * c->Wo)));
}

/* The gradients of the weights (row, tap, V) from one position of gy. */
INLINE void NAME(cross_edge)(const int A, const int B, vec *acc, vec g, const float *const *x, const int *shift, int column, int width,
                             int C)
{
    for (int b = 0; b < B; b++) {
        int q = column + shift[b];
        if (q < 0 || q >= width) continue;
        for (int a = 0; a < A; a++) acc[a * B + b] += g * LOAD(x[a] + (ptrdiff_t)q * C);
    }
}

/* The same from all positions of a row, of which begin .. end have no tap outside of x. */
INLINE void NAME(cross)(const int A, const int B, float *gw, const struct conv *c, const float *gy, const float *const *x,
                        const int *shift, int begin, int end)
{
    vec acc[A * B];
    int C = c->Cin, stride = c->sw;
    ptrdiff_t off[B], step = (ptrdiff_t)stride * C;
    for (int b = 0; b < B; b++) off[b] = (ptrdiff_t)shift[b] * C;
    for (int t = 0; t < A * B; t++) acc[t] = LOAD(gw + t * V);
    for (int i = 0; i < begin; i++) NAME(cross_edge)(A, B, acc, LOAD(gy + (ptrdiff_t)i * C), x, shift, i * stride, c->W, C);
    for (int i = begin; i < end; i++) {
        vec g = LOAD(gy + (ptrdiff_t)i * C);
#pragma GCC unroll 8
        for (int a = 0; a < A; a++)
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) acc[a * B + b] += g * LOAD(x[a] + off[b] + i * step);
    }
    for (int i = end; i < c->Wo; i++) NAME(cross_edge)(A, B, acc, LOAD(gy + (ptrdiff_t)i * C), x, shift, i * stride, c->W, C);
    for (int t = 0; t < A * B; t++) STORE(gw + t * V, acc[t]);
}

/* The gradient of the weights of one sample, (block, tap, V). */
static void NAME(depthwise_weights)(const struct conv *c, float *gw, const float *gy, const float *x)
{
    int C = c->Cin, T = c->kh * c->kw, blocks = NAME(blocks)(c), twice = blocks * V - C, shift[c->kw], begin;
    for (int k = 0; k < c->kw; k++) shift[k] = k * c->dw - c->pw;
    int end = NAME(within)(shift, c->kw, c->sw, c->W, c->Wo, &begin);
    memset(gw, 0, sizeof(float) * blocks * T * V);
    for (int r = 0; r < c->Ho; r++) {
        int ky[c->kh], A;
        const float *from[c->kh], *at[c->kh];
        A = NAME(reached)(c, 0, r, x, from, ky);
        for (int b = 0; b < blocks && A; b++) {
            int channel = NAME(channel)(c, b);
            const float *g = gy + (size_t)r * c->Wo * C + channel;
            float *to = gw + ((size_t)b * T + ky[0] * c->kw) * V; /* rows that are reached follow one another */
            for (int a = 0; a < A; a++) at[a] = from[a] + channel;
            switch (A * 8 + c->kw) {
#define CASE(A, B) case A * 8 + B: NAME(cross)(A, B, to, c, g, at, shift, begin, end); break;
            CASE(2, 3) CASE(3, 3) CASE(3, 5) CASE(4, 5) CASE(5, 5)
#undef CASE
            default: NAME(cross)(A, c->kw, to, c, g, at, shift, begin, end);
            }
        }
    }
    for (int t = 0; twice && t < T; t++) memset(gw + ((size_t)(blocks - 1) * T + t) * V, 0, sizeof(float) * twice);
}

/* All samples: y from x (backward: 0), gx from gy (backward: 1), in parallel, a few samples in several parts. Channels that two
 * blocks share get the same from both. */
static int NAME(depthwise_samples)(const struct conv *c, int backward, float *y, const float *x, const float *pi,
                                   const float *bank, const float *bias, struct after after, int threads)
{
    int T = c->kh * c->kw, blocks = NAME(blocks)(c), parts = c->B < threads ? threads : 1;
    size_t size = (size_t)blocks * T * V, in = (size_t)c->H * c->W * c->Cin, out = (size_t)c->Ho * c->Wo * c->Cin;
    float *gathered = room(c->K * size);
    int ok = 1;
    if (!gathered) return 0;
    if (parts > blocks) parts = blocks;
    NAME(depthwise_gather)(c, gathered, bank);
#pragma omp parallel for num_threads(threads) reduction(&& : ok)
    for (int i = 0; i < c->B * parts; i++) {
        int b = i / parts, b0 = (int)((long long)blocks * (i % parts) / parts), b1 = (int)((long long)blocks * (i % parts + 1) / parts);
        size_t begin = (size_t)b0 * T * V, some = (size_t)(b1 - b0) * T * V;
        struct after here = {after.activation, after.sums ? after.sums + (size_t)b * c->Cin : NULL};
        float *mixed = room(some);
        ok = ok && mixed;
        for (size_t v = 0; mixed && v < some; v += V)
            STORE(mixed + v, NAME(mixed)(pi + b * c->K, c->K, gathered + begin + v, size));
        if (mixed)
            NAME(depthwise)(c, backward, b0, b1, y + b * (backward ? in : out), x + b * (backward ? out : in), mixed,
                            bias ? bias + (size_t)b * c->Cin : NULL, here);
        leave(mixed);
    }
    leave(gathered);
    return ok;
}

/* The same of a dense convolution, whose x is padded by border: blocks of NR channels and chunks of samples in parallel. */
static int NAME(dense_samples)(const struct conv *c, int backward, int grids, const struct grid *g, struct border border, float *y,
                               const float *x, const float *pi, const float *bank, const float *bias, struct after after,
                               int threads)
{
    int T = c->kh * c->kw, H = backward ? c->Ho : c->H, W = backward ? c->Wo : c->W, C = backward ? c->Cout : c->Cin;
    size_t y_sample = backward ? (size_t)c->H * c->W * c->Cin : (size_t)c->Ho * c->Wo * c->Cout;
    int outputs = backward ? c->Cin : c->Cout, blocks = (outputs + NR - 1) / NR, most = PANEL / T < 1 ? 1 : PANEL / T, ok = 1;
    /* As many blocks of outputs at a time as have room for their panels: they share what is done to x, and write a large
     * map in one pass. By Winograd they are two at least, of fewer samples. */
    int rows = (most < C ? most : C) * T, together = g->winograd ? SAMPLES / WIDE : SAMPLES;
    int group = together * ((threads + blocks - 1) / blocks);
    for (int b = 0; b < c->B && ok; b += group) {
        int n = c->B - b < group ? c->B - b : group, chunk = share(n, together, blocks, threads);
        int wide = SAMPLES * PANEL / (rows * chunk);
        if (wide < 1) wide = 1; /* very large kernels */
        int chunks = (n + chunk - 1) / chunk, parts = (blocks + wide - 1) / wide;
        while (chunks * parts % threads && parts < blocks) parts++;
        wide = (blocks + parts - 1) / parts;
        parts = (blocks + wide - 1) / wide;
        struct padded a;
        if (!pad(&a, x + (size_t)b * H * W * C, n, H, W, C, border, most < C ? most : C, threads)) return 0;
#pragma omp parallel for num_threads(threads) reduction(&& : ok)
        for (int i = 0; i < chunks * parts; i++) {
            int s0 = i / parts * chunk, S = n - s0 < chunk ? n - s0 : chunk, o0 = i % parts * wide * NR;
            struct after here = {after.activation, after.sums ? after.sums + (size_t)b * outputs : NULL};
            ok = NAME(dense)(c, backward, grids, g, y + b * y_sample, y_sample, &a, pi + b * c->K, bank,
                             bias ? bias + (size_t)b * outputs : NULL, here, s0, S, o0,
                             outputs - o0 < wide * NR ? outputs - o0 : wide * NR) && ok;
        }
        leave(a.copy);
    }
    return ok;
}

static int NAME(forward)(const struct conv *c, float *y, const float *x, const float *pi, const float *bank,
                         const float *bias, struct after after, int threads)
{
    int T = c->kh * c->kw, off[T], which[T], winograd = NAME(takes_winograd)(c, 0);
    if (c->groups > 1) return NAME(depthwise_samples)(c, 0, y, x, pi, bank, bias, after, threads);
    struct border border = {c->ph, c->ph + (winograd && c->Ho % 2), c->pw, c->pw + (winograd && c->Wo % 2)};
    int W = border.left + c->W + border.right;
    for (int t = 0; t < T; t++) {
        off[t] = t / c->kw * c->dh * W + t % c->kw * c->dw;
        which[t] = t;
    }
    struct grid g = {c->Ho, c->Wo, T, off, which, winograd, 0, (ptrdiff_t)c->sh * W, c->sw, (ptrdiff_t)c->Wo * c->Cout, c->Cout};
    return NAME(dense_samples)(c, 0, 1, &g, border, y, x, pi, bank, bias, after, threads);
}

/* `first` (B, Cin) or NULL is added at each position. */
static int NAME(input_gradient)(const struct conv *c, float *gx, const float *gy, const float *pi, const float *bank,
                                const float *first, int threads)
{
    int T = c->kh * c->kw;
    if (c->groups > 1) return NAME(depthwise_samples)(c, 1, gx, gy, pi, bank, first, (struct after){0}, threads);
    /* A convolution of gy for each phase of the stride, with the taps that reach it. */
    int phases = c->sh * c->sw, off[phases][T], which[phases][T], grids = 0;
    int bottom = (c->H - 1 + c->ph) / c->sh - (c->Ho - 1), right = (c->W - 1 + c->pw) / c->sw - (c->Wo - 1);
    struct border border = {before((c->kh - 1) * c->dh - c->ph, c->sh), bottom > 0 ? bottom : 0,
                            before((c->kw - 1) * c->dw - c->pw, c->sw), right > 0 ? right : 0};
    int winograd = NAME(takes_winograd)(c, 1);
    border.bottom += winograd && c->H % 2;
    border.right += winograd && c->W % 2;
    int W = border.left + c->Wo + border.right;
    struct grid g[phases];
    for (int i = 0; i < phases; i++) {
        int h = i / c->sw, w = i % c->sw, taps = 0;
        if (h >= c->H || w >= c->W) continue;
        for (int t = 0; t < T; t++) {
            int r = h + c->ph - t / c->kw * c->dh, q = w + c->pw - t % c->kw * c->dw;
            if (r % c->sh || q % c->sw) continue;
            off[grids][taps] = (r / c->sh + border.top) * W + q / c->sw + border.left;
            which[grids][taps++] = t;
        }
        g[grids] = (struct grid){(c->H - h + c->sh - 1) / c->sh, (c->W - w + c->sw - 1) / c->sw, taps, off[grids], which[grids],
                                 winograd, ((ptrdiff_t)h * c->W + w) * c->Cin, W, 1, (ptrdiff_t)c->sh * c->W * c->Cin,
                                 (ptrdiff_t)c->sw * c->Cin};
        grids++;
    }
    return NAME(dense_samples)(c, 1, grids, g, border, gx, gy, pi, bank, first, (struct after){0}, threads);
}

static int NAME(depthwise_gradients)(const struct conv *c, float *gpi, float *gbank, const float *gy, const float *x,
                                     const float *pi, const float *bank, int threads)
{
    int T = c->kh * c->kw, K = c->K, blocks = NAME(blocks)(c), twice = blocks * V - c->Cin;
    size_t size = (size_t)blocks * T * V;
    float *gathered = room((2 * K + c->B) * size), *gradient = gathered + K * size, *mixed = gradient + K * size;
    if (!gathered) return 0;
#pragma omp parallel for num_threads(threads)
    for (int b = 0; b < c->B; b++)
        NAME(depthwise_weights)(c, mixed + b * size, gy + (size_t)b * c->Ho * c->Wo * c->Cin, x + (size_t)b * c->H * c->W * c->Cin);
    if (gpi) NAME(depthwise_gather)(c, gathered, bank);
    NAME(unmix)(K, gpi, gbank ? gradient : NULL, 0, pi, gathered, size, mixed, size, c->B, (int)size);
    for (int k = 0; gbank && k < K; k++)
        for (int b = 0; b < blocks; b++)
            for (int t = 0; t < T; t++)
                for (int i = b == blocks - 1 ? twice : 0; i < V; i++)
                    gbank[((size_t)k * c->Cin + NAME(channel)(c, b) + i) * T + t] = gradient[k * size + ((size_t)b * T + t) * V + i];
    leave(gathered);
    return 1;
}

/* gpi (B, K) and gbank are written; either may be NULL. */
static int NAME(weight_gradients)(const struct conv *c, float *gpi, float *gbank, const float *gy, const float *x,
                                  const float *pi, const float *bank, int threads)
{
    int K = c->K, P = c->Ho * c->Wo, ok = 1;
    /* More samples for each pass over the bank if their patches fit, fewer if their gradients do not. */
    int chunk = PATCHES / ((size_t)P * COLUMNS / 2), most = PACKED / ((size_t)P * c->Cout);
    chunk = chunk < SAMPLES ? SAMPLES : chunk < 4 * SAMPLES ? chunk : 4 * SAMPLES;
    chunk = most < 1 ? 1 : most < chunk ? most : chunk;
    if (gpi) memset(gpi, 0, sizeof(float) * c->B * K);
    if (c->groups > 1) return NAME(depthwise_gradients)(c, gpi, gbank, gy, x, pi, bank, threads);
    for (int b = 0; b < c->B && ok; b += chunk)
        ok = NAME(dense_gradients)(c, gpi ? gpi + b * K : NULL, gbank, b > 0, gy + (size_t)b * P * c->Cout,
                                   x + (size_t)b * c->H * c->W * c->Cin, pi + b * K, bank, c->B - b < chunk ? c->B - b : chunk,
                                   threads);
    return ok;
}

/* The mean over the positions of each map (B, P, C), added up row by row of W positions for the sake of precision. */
static int NAME(pool)(float *mean, const float *x, int B, int H, int W, int C, int threads)
{
    int blocks = (C + 4 * V - 1) / (4 * V);
    if ((double)B * H * W * C < 1 << 16) threads = 1;
#pragma omp parallel for num_threads(threads)
    for (int i = 0; i < B * blocks; i++) {
        int b = i / blocks, c0 = i % blocks * 4 * V, cn = C - c0 < 4 * V ? C - c0 : 4 * V;
        const float *from = x + (size_t)b * H * W * C + c0;
        float *to = mean + (size_t)b * C + c0, scale = 1.0f / ((float)H * W);
        if (cn == 4 * V) {
            vec total[4] = {{0}};
            for (int r = 0; r < H; r++) {
                vec row[4] = {{0}};
                for (int q = 0; q < W; q++, from += C)
#pragma GCC unroll 4
                    for (int v = 0; v < 4; v++) row[v] += LOAD(from + v * V);
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) total[v] += row[v];
            }
            for (int v = 0; v < 4; v++) STORE(to + v * V, total[v] * splat(scale));
            continue;
        }
        float total[4 * V] = {0};
        for (int r = 0; r < H; r++) {
            float row[4 * V] = {0};
            for (int q = 0; q < W; q++, from += C)
                for (int c = 0; c < cn; c++) row[c] += from[c];
            for (int c = 0; c < cn; c++) total[c] += row[c];
        }
        for (int c = 0; c < cn; c++) to[c] = total[c] * scale;
    }
    return 1;
}

/* y (S, stride out) = weight (M, n) x (S, n) + bias, for M rows and S samples at once. */
INLINE void NAME(dots)(const int M, const int S, float *y, int out, const float *weight, const float *x, const float *bias, int n)
{
    vec acc[M * S];
    float rest[M * S];
    int v = 0;
    for (int i = 0; i < M * S; i++) acc[i] = (vec){0}, rest[i] = bias[i / S];
    for (; v + V <= n; v += V) {
        vec rows[M];
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) rows[m] = LOAD(weight + (size_t)m * n + v);
#pragma GCC unroll 4
        for (int s = 0; s < S; s++) {
            vec a = LOAD(x + (size_t)s * n + v);
#pragma GCC unroll 4
            for (int m = 0; m < M; m++) acc[m * S + s] += rows[m] * a;
        }
    }
    for (; v < n; v++)
        for (int i = 0; i < M * S; i++) rest[i] += weight[(size_t)(i / S) * n + v] * x[(size_t)(i % S) * n + v];
    for (int i = 0; i < M * S; i++) y[(size_t)(i % S) * out + i / S] = rest[i] + NAME(sum)(acc[i]);
}

static void NAME(linear)(float *y, const float *x, const float *weight, const float *bias, int B, int n, int out)
{
    for (int m = 0; m < out; m += 4)
        for (int s = 0; s < B; s += 4) {
            float *to = y + (size_t)s * out + m;
            const float *w = weight + (size_t)m * n, *a = x + (size_t)s * n;
            if (out - m >= 4 && B - s >= 4) NAME(dots)(4, 4, to, out, w, a, bias + m, n);
            else if (out - m >= 4)
                for (int j = 0; j < B - s; j++) NAME(dots)(4, 1, to + (size_t)j * out, out, w, a + (size_t)j * n, bias + m, n);
            else
                for (int i = 0; i < out - m; i++)
                    for (int j = 0; j < B - s && j < 4; j++)
                        NAME(dots)(1, 1, to + (size_t)j * out + i, out, w + (size_t)i * n, a + (size_t)j * n, bias + m + i, n);
        }
}

#undef vec
#undef ints
#undef LOAD
#undef STORE
#undef splat
#undef line
#undef NAME
#undef NV
#undef NR
#undef SUFFIX
#undef V
#undef MR
#undef OB

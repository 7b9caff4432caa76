/* Dense 3x3 convolutions of stride 1 by Winograd's F(2x2, 3x3) (Lavin and Gray, CVPR 2016, arXiv 1509.09308, section 4.1):
 * two by two positions of y from four by four of x, with 16 multiplications for a channel and an output instead of 36.
 * It is part of native.h. A tile of x and a kernel become 16 numbers each; here a panel has 16 slots instead of 9 taps.
 */

#define SLOTS 16
#define WIDE 2 /* blocks of NR outputs for each transformation of x, at least; fewer samples are mixed together instead */
#define TILES (2 * MR) /* tiles of x that are transformed at a time */
#define LARGE 100 /* positions of y from which it is taken */

/* The taps of a panel, in its first nine slots, become its 16 slots: G g G^T, with g `turned` by 180 degrees towards the
 * input. As it is linear, the kernels are mixed before. */
static void NAME(transform_panel)(float *panel, int cn, int turned)
{
    size_t slot = (size_t)(cn + 1) * NR;
    const vec half = splat(0.5f);
    for (int i = 0; i < cn * NR; i += V) {
        vec g[9], rows[4][3];
#pragma GCC unroll 9
        for (int t = 0; t < 9; t++) g[t] = LOAD(panel + (turned ? 8 - t : t) * slot + i);
#pragma GCC unroll 3
        for (int b = 0; b < 3; b++) {
            vec even = (g[b] + g[6 + b]) * half, odd = g[3 + b] * half;
            rows[0][b] = g[b], rows[1][b] = even + odd, rows[2][b] = even - odd, rows[3][b] = g[6 + b];
        }
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) {
            vec even = (rows[a][0] + rows[a][2]) * half, odd = rows[a][1] * half;
            float *to = panel + 4 * a * slot + i;
            STORE(to, rows[a][0]);
            STORE(to + slot, even + odd);
            STORE(to + 2 * slot, even - odd);
            STORE(to + 3 * slot, rows[a][2]);
        }
    }
}

/* V channels of a tile of x, whose positions are `column` and `row` apart, as 16 vectors `apart`: B^T d B. */
INLINE void NAME(transform_tile)(float *to, size_t apart, const float *x, size_t row, size_t column)
{
    vec rows[4][4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        vec d[4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) d[a] = LOAD(x + a * row + b * column);
        rows[0][b] = d[0] - d[2], rows[1][b] = d[1] + d[2], rows[2][b] = d[2] - d[1], rows[3][b] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int a = 0; a < 4; a++, to += 4 * apart) {
        STORE(to, rows[a][0] - rows[a][2]);
        STORE(to + apart, rows[a][1] + rows[a][2]);
        STORE(to + 2 * apart, rows[a][2] - rows[a][1]);
        STORE(to + 3 * apart, rows[a][1] - rows[a][3]);
    }
}

/* Two by two positions of V outputs, from 16 vectors `apart`: A^T m A. */
INLINE void NAME(transform_back)(vec *y, const float *from, size_t apart)
{
    vec rows[2][4];
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
        vec m[4];
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) m[a] = LOAD(from + (4 * a + b) * apart);
        rows[0][b] = m[0] + m[1] + m[2], rows[1][b] = m[1] - m[2] - m[3];
    }
#pragma GCC unroll 2
    for (int a = 0; a < 2; a++) {
        y[2 * a] = rows[a][0] + rows[a][1] + rows[a][2];
        y[2 * a + 1] = rows[a][1] - rows[a][2] - rows[a][3];
    }
}

/* Two by two positions of n <= V outputs of the tile at (r, q) are what they were, or first, + A^T m A. */
INLINE void NAME(add_tile)(const struct grid *g, float *y, int r, int q, int n, const float *first, const float *products,
                           int activation, float *sums)
{
    vec found[4], total = {0};
    NAME(transform_back)(found, products, (size_t)TILES * NR);
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) {
        if (2 * r + p / 2 >= g->rows || 2 * q + p % 2 >= g->columns) continue;
        float *at = y + (2 * r + p / 2) * g->y_row + (2 * q + p % 2) * g->y_column;
        vec sum = {0};
        if (n >= V) sum = LOAD(first ? first : at);
        else memcpy(&sum, first ? first : at, sizeof(float) * n);
        sum = NAME(activated)(sum + found[p], activation);
        total += sum;
        if (n >= V) STORE(at, sum);
        else memcpy(at, &sum, sizeof(float) * n);
    }
    if (sums) STORE(sums, LOAD(sums) + total);
}

/* As `multiply`, for on columns of y and panels of SLOTS, which are `apart`; tiles (SLOTS, TILES, cn) and products
 * (SLOTS, TILES, NR) are scratch. */
static void NAME(multiply_tiles)(const struct grid *g, float *y, int on, const float *first, const float *x, int step, int cn,
                                 const float *panels, size_t apart, float *tiles, float *products,
                                 const struct after *after)
{
    const float zeros[NR] = {0};
    const int here = 0;
    int columns = (g->columns + 1) / 2, count = (g->rows + 1) / 2 * columns, blocks = (count + TILES - 1) / TILES;
    for (int i = 0; i < blocks; i++) {
        int begin = (int)((long long)count * i / blocks), n = (int)((long long)count * (i + 1) / blocks) - begin;
        for (int m = 0, r = begin / columns, q = begin % columns; m < n; m++, q++) {
            if (q == columns) q = 0, r++;
            const float *from = x + 2 * (r * g->x_row + q) * step;
            size_t row = (size_t)g->x_row * step;
            int c = 0;
            for (; c + V <= cn; c += V) NAME(transform_tile)(tiles + (size_t)m * cn + c, (size_t)TILES * cn, from + c, row, step);
            if (c == cn) continue;
            float last[SLOTS * V] = {0}, turned[SLOTS * V];
            for (int p = 0; p < SLOTS; p++)
                memcpy(last + p * V, from + p / 4 * row + (size_t)(p % 4) * step + c, sizeof(float) * (cn - c));
            NAME(transform_tile)(turned, V, last, 4 * V, V);
            for (int p = 0; p < SLOTS; p++)
                memcpy(tiles + ((size_t)p * TILES + m) * cn + c, turned + p * V, sizeof(float) * (cn - c));
        }
        for (int o = 0; o < on; o += NR) {
            int have = on - o < NR ? on - o : NR;
            for (int p = 0; p < SLOTS; p++)
                for (int m0 = 0, parts = (n + MR - 1) / MR, part = 1; part <= parts; part++) {
                    int m1 = n * part / parts;
                    float *to[MR];
                    const float *from[MR];
                    for (int m = m0; m < m1; m++) {
                        to[m - m0] = products + ((size_t)p * TILES + m) * NR;
                        from[m - m0] = tiles + ((size_t)p * TILES + m) * cn;
                    }
                    NAME(any_tile)(m1 - m0, have > V ? 2 : 1, to, V, zeros, from, 0, 1, &here, &p, cn, panels + o / NR * apart, NULL);
                    m0 = m1;
                }
            for (int m = 0, r = begin / columns, q = begin % columns; m < n; m++, q++) {
                if (q == columns) q = 0, r++;
                for (int v = 0; v < have; v += V)
                    NAME(add_tile)(g, y + o + v, r, q, have - v, first ? first + o + v : NULL, products + (size_t)m * NR + v,
                                   after ? after->activation : 0, after && after->sums ? after->sums + o + v : NULL);
            }
        }
    }
}

/* Whether it is faster, forward or towards the input (measured); mixing 16 slots instead of 9 taps has to pay. */
static int NAME(takes_winograd)(const struct conv *c, int backward)
{
    int positions = backward ? c->H * c->W : c->Ho * c->Wo;
    return c->kh == 3 && c->kw == 3 && c->sh == 1 && c->sw == 1 && c->dh == 1 && c->dw == 1 && c->ph <= 2 && c->pw <= 2
        && c->Cin >= 32 && c->Cout >= 32 && positions >= LARGE;
}

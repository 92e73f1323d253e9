/* One row of the vertical stack and one position of the horizontal stack of a gated PixelCNN, and one position of blocks of
   attention, each through all layers, and the draw of a head at a position, in float32: the same arithmetic as Stacks and Blocks
   in steps.py and the heads in heads.py, of which it is the fast form on CPUs. There, small operations at every position cost
   more in being called than in being computed.

   B batch, D width, L layers, w columns of the grid, a kernel of k columns and m = (k+1)/2 rows or columns of its causal half,
   d features of an attention head, N positions, K codes or mixture components, C latent channels.
   Arrays are stored row after row; D is a multiple of LANES. Only the matrices that multiply lie panel after panel: see
   `add_product`. */

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* Vectors as wide as the registers of the processor that this is compiled for, and sums that fit into these: into 32 with AVX-512
   and on ARM, elsewhere into 16. A product has tiles of ROWS × VECTORS, attention PARTS × WIDE. */
#if defined(__AVX512F__)
enum { LANES = 16, ROWS = 4, VECTORS = 4, PARTS = 4, WIDE = 2 };
#elif defined(__AVX__)
enum { LANES = 8, ROWS = 4, VECTORS = 2, PARTS = 2, WIDE = 4 };
#elif defined(__aarch64__)
enum { LANES = 4, ROWS = 4, VECTORS = 4, PARTS = 2, WIDE = 8 };
#else
enum { LANES = 4, ROWS = 2, VECTORS = 4, PARTS = 2, WIDE = 4 };
#endif
enum { PANEL = VECTORS * LANES };
enum { LINE = 16 }; /* numbers in a line of a cache */
enum { BLOCK = 32 }; /* rows whose sums, with the weights of a tile, stay in the first-level cache */
#define INLINE static inline __attribute__((always_inline))

typedef ptrdiff_t size;
typedef float vector __attribute__((vector_size(LANES * sizeof(float)), aligned(sizeof(float)), may_alias));

/* sums += x · weights for `rows` rows and `vectors` · LANES columns, summed up in registers. */
INLINE void tile(float *sums, size sums_row, const float *x, size x_row, const float *weights, size weights_row, size inner,
                 const int rows, const int vectors) {
    vector sum[ROWS][VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r][v] = *(const vector *)(sums + r * sums_row + v * LANES);
    for (size i = 0; i < inner; i++)
        for (int v = 0; v < vectors; v++) {
            vector weight = *(const vector *)(weights + i * weights_row + v * LANES);
            for (int r = 0; r < rows; r++) sum[r][v] += x[r * x_row + i] * weight;
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) *(vector *)(sums + r * sums_row + v * LANES) = sum[r][v];
}

INLINE void tiles(float *sums, size sums_row, const float *x, size x_row, const float *weights, size weights_row, size batch,
                  size inner, const int vectors) {
    size row = 0;
    for (; row + ROWS <= batch; row += ROWS)
        tile(sums + row * sums_row, sums_row, x + row * x_row, x_row, weights, weights_row, inner, ROWS, vectors);
    for (; row < batch; row++)
        tile(sums + row * sums_row, sums_row, x + row * x_row, x_row, weights, weights_row, inner, 1, vectors);
}

/* sums += x · weights: batch × columns, batch × inner, inner × columns.

   The weights lie panel after panel, for the columns of a tile to be read one after another: inner × PANEL each, then inner × LANES
   for the columns that are left. */
static void add_product(float *sums, size sums_row, const float *x, size x_row, const float *weights, size batch, size inner,
                        size columns) {
    size column = 0;
    for (; column + PANEL <= columns; column += PANEL)
        tiles(sums + column, sums_row, x, x_row, weights + column * inner, PANEL, batch, inner, VECTORS);
    for (; column < columns; column += LANES)
        tiles(sums + column, sums_row, x, x_row, weights + column * inner, LANES, batch, inner, 1);
}

/* tanh to the precision of float, as a ratio of two polynomials: a minimax fit that Eigen, XLA and others use. */
INLINE float tanh_ratio(float x) {
    const float largest = 7.90531110763549805f;
    x = x > largest ? largest : x;
    x = x < -largest ? -largest : x;
    float y = x * x;
    float p = -2.76076847742355e-16f;
    p = p * y + 2.00018790482477e-13f;
    p = p * y - 8.60467152213735e-11f;
    p = p * y + 5.12229709037114e-08f;
    p = p * y + 1.48572235717979e-05f;
    p = p * y + 6.37261928875436e-04f;
    p = p * y + 4.89352455891786e-03f;
    float q = 1.19825839466702e-06f;
    q = q * y + 1.18534705686654e-04f;
    q = q * y + 2.26843463243900e-03f;
    q = q * y + 4.89352518554385e-03f;
    return x * p / q;
}

INLINE float sigmoid(float x) { return 0.5f + 0.5f * tanh_ratio(0.5f * x); }

/* tanh(a) · sigmoid(b) of a feature, of 2a and of b, which lies `width` after it. */
INLINE float gate(const float *both, size width) { return tanh_ratio(0.5f * both[0]) * sigmoid(both[width]); }

INLINE void copy(float *restrict out, const float *restrict from, size count) {
    for (size i = 0; i < count; i++) out[i] = from[i];
}

INLINE void fill(float *out, const float *bias, size rows, size columns) {
    for (size row = 0; row < rows; row++) copy(out + row * columns, bias, columns);
}

INLINE float sum_of(vector terms) {
    float sum = 0;
    for (size lane = 0; lane < LANES; lane++) sum += terms[lane];
    return sum;
}

/* Layer normalization of D numbers; weights, 2 D, are its scale and its shift. */
static void normalize(float *restrict out, const float *restrict x, const float *restrict weights, size width) {
    vector sum = {0}, squares = {0};
    for (size i = 0; i < width; i += LANES) sum += *(const vector *)(x + i);
    const float mean = sum_of(sum) / width;
    for (size i = 0; i < width; i += LANES) {
        vector apart = *(const vector *)(x + i) - mean;
        squares += apart * apart;
    }
    const float scale = 1 / sqrtf(sum_of(squares) / width + 1e-5f);
    for (size i = 0; i < width; i++) out[i] = (x[i] - mean) * scale * weights[i] + weights[width + i];
}

/* The vertical stack for a row, at `place` of the ring of m rows.

   features, w B D, go through all layers in place; rows, L m (w+k-1) B D, the layers' normalized inputs, with zeros left and
   right of the grid; seen, L w B 2D, is what the horizontal stack is given. vertical, L m k·D 2D, the last of the m for this
   row; norm, L 2 D; across, L 2D 2D; scratch, BLOCK 2D for each thread. */
void gated_row(size place, size layers, size batch, size width, size columns, size m, size k, float *features, float *rows,
               float *seen, const float *norm, const float *vertical, const float *vertical_bias, const float *across,
               const float *across_bias, float *scratch, size threads) {
    const size row_size = (columns + k - 1) * batch * width, total = columns * batch, margin = k / 2 * batch * width;
#pragma omp parallel num_threads((int)threads) if (threads > 1)
    for (size layer = 0; layer < layers; layer++) {
        float *ring = rows + layer * m * row_size, *here = ring + place * row_size + margin;
#pragma omp for
        for (size i = 0; i < total; i++) normalize(here + i * width, features + i * width, norm + layer * 2 * width, width);
#pragma omp for
        for (size start = 0; start < total; start += BLOCK) {
            const size count = start + BLOCK < total ? BLOCK : total - start;
            float *above = scratch + THREAD * BLOCK * 2 * width, *out = seen + (layer * total + start) * 2 * width;
            fill(above, vertical_bias + layer * 2 * width, count, 2 * width);
            for (size i = 0; i < m; i++)
                for (size j = 0; j < k; j++)
                    add_product(above, 2 * width, ring + (place + 1 + i) % m * row_size + (start + j * batch) * width, width,
                                vertical + ((layer * m + i) * k + j) * width * 2 * width, count, width, 2 * width);
            fill(out, across_bias + layer * 2 * width, count, 2 * width);
            add_product(out, 2 * width, above, 2 * width, across + layer * 4 * width * width, count, 2 * width, 2 * width);
            for (size row = 0; row < count; row++)
                for (size i = 0; i < width; i++) features[(start + row) * width + i] += gate(above + row * 2 * width + i, width);
        }
    }
}

/* A thread's share of a batch, in whole tiles. */
INLINE size rows_a_thread(size batch, size threads) {
    return ((batch + threads - 1) / threads + ROWS - 1) / ROWS * ROWS;
}

/* Layers first … last-1 of the horizontal stack at one position, for some rows of a batch; arguments as below. */
static void steps_of_rows(size first, size last, size rows, size width, size m, float *features, float *seen, size seen_layer,
                          float *inputs, size inputs_layer, size inputs_row, const float *norm, const float *horizontal,
                          const float *output) {
    for (size layer = first; layer < last; layer++) {
        float *both = seen + layer * seen_layer, *x = inputs + layer * inputs_layer;
        for (size row = 0; row < rows; row++)
            normalize(x + row * inputs_row + (m - 1) * width, features + row * width, norm + layer * 2 * width, width);
        add_product(both, 2 * width, x, inputs_row, horizontal + layer * m * width * 2 * width, rows, m * width, 2 * width);
        for (size row = 0; row < rows; row++)
            for (size i = 0; i < width; i++) both[row * 2 * width + i] = -gate(both + row * 2 * width + i, width);
        add_product(features, width, both, 2 * width, output + layer * width * width, rows, width, width);
    }
}

/* The same for a batch, in as many parts as there are threads.

   features, B D, go through the layers in place. Of the first of all layers, at this column: seen, B 2D, which is overwritten;
   inputs, B m·D, the normalized ones of the columns that the kernel reaches, of which the last is this one. A layer's lie
   seen_layer and inputs_layer numbers after those of the one before. norm, L 2 D; horizontal, L m·D 2D; output, L D D. */
void gated_steps(size first, size last, size batch, size width, size m, float *features, float *seen, size seen_layer,
                 float *inputs, size inputs_layer, size inputs_row, const float *norm, const float *horizontal,
                 const float *output, size threads) {
    const size rows = rows_a_thread(batch, threads);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (size row = 0; row < batch; row += rows)
        steps_of_rows(first, last, row + rows < batch ? rows : batch - row, width, m, features + row * width,
                      seen + row * 2 * width, seen_layer, inputs + row * inputs_row, inputs_layer, inputs_row, norm, horizontal,
                      output);
}

/* exp of what lies between -87 and 0, to the precision of float: 2^n · e^r with |r| ≤ log(2) / 2, e^r a polynomial of Cephes. */
INLINE float exponential(float x) {
    int32_t n = (int32_t)(x * 1.44269504088896341f - 0.5f);
    float r = x - (float)n * 0.693359375f + (float)n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union {
        int32_t bits;
        float number;
    } power = {(n + 127) << 23};
    return (p * r * r + r + 1) * power.number;
}

/* Logits become e to the power of each less the largest. */
static void exponentials(float *logits, size count) {
    float most[LANES], largest = logits[0];
    for (size lane = 0; lane < LANES; lane++) most[lane] = largest;
    size k = 0;
    for (; k + LANES <= count; k += LANES)
        for (size lane = 0; lane < LANES; lane++) most[lane] = logits[k + lane] > most[lane] ? logits[k + lane] : most[lane];
    for (; k < count; k++) largest = logits[k] > largest ? logits[k] : largest;
    for (size lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
    for (k = 0; k < count; k++) logits[k] = logits[k] - largest > -87 ? logits[k] - largest : -87;
    for (k = 0; k < count; k++) logits[k] = exponential(logits[k]);
}

/* The index of a category by inverse CDF: of K logits, which are overwritten, with a uniform number. */
static size chosen(float *logits, size count, float uniform) {
    float total = 0;
    exponentials(logits, count);
    for (size k = 0; k < count; k++) logits[k] = total += logits[k];
    int32_t below = 0;
    for (size k = 0; k + 1 < count; k++) below += !(logits[k] >= uniform * total);
    return below;
}

/* A draw of a head for a batch: output(SiLU(hidden(x))), with E features between, whose first K columns are logits, then the
   choice of one of them.

   codes, B: which; or, where that is 0, values, B C: from that one of K diagonal Gaussians, whose means and log standard
   deviations, C each, follow the logits. hidden, D E; output, E columns; E and columns are multiples of LANES; scratch,
   B E+columns. */
void draw(size batch, size width, size hidden_width, size count, size columns, size channels, const float *x, size x_row,
          const float *hidden, const float *hidden_bias, const float *output, const float *output_bias, const float *uniforms,
          const float *normals, float least_std, float *values, int64_t *codes, float *scratch, size threads) {
    const size rows = rows_a_thread(batch, threads);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (size start = 0; start < batch; start += rows) {
        const size own = start + rows < batch ? rows : batch - start;
        float *inner = scratch + start * (hidden_width + columns), *raw = inner + own * hidden_width;
        fill(inner, hidden_bias, own, hidden_width);
        add_product(inner, hidden_width, x + start * x_row, x_row, hidden, own, width, hidden_width);
        for (size i = 0; i < own * hidden_width; i++) inner[i] *= sigmoid(inner[i]);
        fill(raw, output_bias, own, columns);
        add_product(raw, columns, inner, hidden_width, output, own, hidden_width, columns);
        for (size row = start; row < start + own; row++, raw += columns) {
            const size k = chosen(raw, count, uniforms[row]);
            if (codes) codes[row] = k;
            const float *mean = raw + count + k * 2 * channels, *log_std = mean + channels;
            for (size c = 0; c < channels; c++)
                values[row * channels + c] = mean[c] + (expf(log_std[c]) + least_std) * normals[row * channels + c];
        }
    }
}

/* erf to the precision of float, as a ratio of two polynomials: a minimax fit that Eigen and others use. */
INLINE float erf_ratio(float x) {
    x = x > 4 ? 4 : x;
    x = x < -4 ? -4 : x;
    float y = x * x;
    float p = -2.72614225801306e-10f;
    p = p * y + 2.77068142495902e-08f;
    p = p * y - 2.10102402082508e-06f;
    p = p * y - 5.69250639462346e-05f;
    p = p * y - 7.34990630326855e-04f;
    p = p * y - 2.95459980854025e-03f;
    p = p * y - 1.60960333262415e-02f;
    float q = -1.45660718464996e-05f;
    q = q * y - 2.13374055278905e-04f;
    q = q * y - 1.68282697438203e-03f;
    q = q * y - 7.37332916720468e-03f;
    q = q * y - 1.42647390514189e-02f;
    return x * p / q;
}

/* out = scale · sums of `count` vectors times a number each, for `wide` sums at once, in PARTS parts, for none to wait for the one
   before. The vectors of a sum are `stride` numbers apart, and those of the next sum `apart` from them.
   next: where as many numbers lie that are read soon. They are fetched meanwhile, and nothing waits for memory then. */
INLINE void weighted(float *out, float scale, const float *factors, const float *vectors, size stride, size apart, size count,
                     const float *next, const int wide) {
    vector sums[PARTS][WIDE] = {{{0}}};
    size i = 0;
    for (; i + PARTS <= count; i += PARTS)
        for (int part = 0; part < PARTS; part++)
            for (int v = 0; v < wide; v++) {
                const int read = (part * wide + v) * LANES;
                if (read % LINE == 0) __builtin_prefetch(next + i * wide * LANES + read, 0, 2);
                sums[part][v] += factors[i + part] * *(const vector *)(vectors + (i + part) * stride + v * apart);
            }
    for (; i < count; i++)
        for (int v = 0; v < wide; v++) sums[0][v] += factors[i] * *(const vector *)(vectors + i * stride + v * apart);
    for (int v = 0; v < wide; v++) {
        for (int part = 1; part < PARTS; part++) sums[0][v] += sums[part][v];
        *(vector *)(out + v * LANES) = scale * sums[0][v];
    }
}

/* The same for `total` sums. */
INLINE void weighted_sums(size total, float *out, float scale, const float *factors, const float *vectors, size stride, size apart,
                          size count, const float *next) {
    size v = 0;
    for (; v + WIDE <= total; v += WIDE)
        weighted(out + v * LANES, scale, factors, vectors + v * apart, stride, apart, count, next + v * count * LANES, WIDE);
    for (; v < total; v++)
        weighted(out + v * LANES, scale, factors, vectors + v * apart, stride, apart, count, next + v * count * LANES, 1);
}

/* Attention of one position of one image: takes its key and value in, and reads those so far.

   qkv, 3D, its query, scaled, key and value; out, D; scores, room. keys, heads room/LANES d LANES: those of LANES positions lie
   together, feature after feature; values, heads room d. */
static void attend(size heads, size d, size position, size room, const float *qkv, float *keys, float *values, float *out,
                   float *scores) {
    const size count = position + 1, whole = (count + LANES - 1) / LANES * LANES;
    for (size head = 0; head < heads; head++, qkv += d, keys += d * room, values += d * room, out += d) {
        const float *key = qkv + heads * d, *value = key + heads * d;
        float *place = keys + position / LANES * LANES * d + position % LANES;
        for (size i = 0; i < d; i++) place[i * LANES] = key[i];
        copy(values + position * d, value, d);
        weighted_sums(whole / LANES, scores, 1, qkv, keys, LANES, d * LANES, d, values);
        exponentials(scores, count);
        for (size p = count; p < whole; p++) scores[p] = 0;
        vector sum = {0};
        for (size p = 0; p < whole; p += LANES) sum += *(const vector *)(scores + p);
        weighted_sums(d / LANES, out, 1 / sum_of(sum), scores, values, d, LANES, count, keys + d * room);
    }
}

/* Blocks first … last-1 of attention, and of what follows it, at one position, for some rows of a batch; arguments as below. */
static void blocks_of_rows(size first, size last, size rows, size batch, size width, size heads, size inner, size room,
                           size position, float *x, size x_row, float *keys, float *values, const float *norm, const float *qkv,
                           const float *output, const float *inner_norm, const float *expand, const float *contract,
                           float *scratch) {
    const size cache = room * width;
    float *normed = scratch, *wide = normed + rows * width, *scores = wide + rows * (3 * width + inner);
    for (size layer = first; layer < last; layer++) {
        for (size row = 0; row < rows; row++) normalize(normed + row * width, x + row * x_row, norm + layer * 2 * width, width);
        for (size i = 0; i < rows * 3 * width; i++) wide[i] = 0;
        add_product(wide, 3 * width, normed, width, qkv + layer * 3 * width * width, rows, width, 3 * width);
        for (size row = 0; row < rows; row++)
            attend(heads, width / heads, position, room, wide + row * 3 * width, keys + (layer * batch + row) * cache,
                   values + (layer * batch + row) * cache, normed + row * width, scores);
        add_product(x, x_row, normed, width, output + layer * width * width, rows, width, width);
        if (!inner) continue;
        for (size row = 0; row < rows; row++)
            normalize(normed + row * width, x + row * x_row, inner_norm + layer * 2 * width, width);
        for (size i = 0; i < rows * inner; i++) wide[i] = 0;
        add_product(wide, inner, normed, width, expand + layer * width * inner, rows, width, inner);
        for (size i = 0; i < rows * inner; i++) wide[i] = 0.5f * wide[i] * (1 + erf_ratio(wide[i] * 0.70710678118654752f));
        add_product(x, x_row, wide, inner, contract + layer * inner * width, rows, inner, width);
    }
}

/* The same for a batch, in as many parts as there are threads.

   x, B D, is overwritten; keys and values, L B heads · d · room, as `attend` has them, of `room` positions, a multiple of LANES. The
   weights of all layers: norm, 2 D; qkv, D 3D; output, D D; and of the two layers with a GELU between that follow where `inner`,
   their features, is not 0: inner_norm, 2 D; expand, D inner; contract, inner D. scratch, B 4D+inner, and room for each thread. */
void attention_steps(size first, size last, size batch, size width, size heads, size inner, size room, size position, float *x,
                     size x_row, float *keys, float *values, const float *norm, const float *qkv, const float *output,
                     const float *inner_norm, const float *expand, const float *contract, float *scratch, size threads) {
    const size rows = rows_a_thread(batch, threads);
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (size row = 0; row < batch; row += rows)
        blocks_of_rows(first, last, row + rows < batch ? rows : batch - row, batch, width, heads, inner, room, position,
                       x + row * x_row, x_row, keys + row * room * width, values + row * room * width, norm, qkv, output,
                       inner_norm, expand, contract, scratch + row * (4 * width + inner) + row / rows * room);
}

const int lanes = LANES, panel = PANEL, block = BLOCK; /* for the callers */
const int steps_version = 4; /* of the functions' arguments and the layouts that they take: compiled.py expects the same */

/* Whether this is a build for this processor, which has all that it was compiled for. Vectors of x86 without AVX are for
   processors without it only: elsewhere torch's operations are faster. */
int runs_here(void) {
    int runs = 1;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
#ifndef __AVX__
    runs = !__builtin_cpu_supports("avx");
#endif
#ifdef __FMA__
    runs = runs && __builtin_cpu_supports("fma");
#endif
#ifdef __AVX2__
    runs = runs && __builtin_cpu_supports("avx2");
#endif
#ifdef __AVX512F__
    runs = runs && __builtin_cpu_supports("avx512f");
#endif
#ifdef __AVX512VL__
    runs = runs && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#endif
#endif
    return runs;
}

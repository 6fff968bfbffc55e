/* The small operations of a decoding step on a CPU, in bfloat16: what costs torch several calls each.
 *
 * Plain C without Python's or torch's headers: pointers, sizes and strides in elements, which cpu_kernels.py takes from
 * tensors and has checked. Every sum is in float32 and rounded once. No row's result depends on the rows beside it.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
/* One object for every x86-64: the loader picks the copy that the machine at hand can run. */
#define FOR_EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EVERY_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

/* Below this many elements, waking the other threads costs more than they save. */
enum { WORTH_SHARING = 1 << 15 };
/* Query heads that one thread holds against a key-value head at a time. */
enum { MOST_TOGETHER = 16 };

INLINE float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float y;
    memcpy(&y, &bits, sizeof y);
    return y;
}

/* To the nearest, ties to even. Not-a-numbers stay so, because their bits are never all carried out of the mantissa. */
INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* e^x by 2^n * 2^f with a polynomial for 2^f on [-1/2, 1/2] (its Taylor series; error about 2e-7). */
INLINE float exponential(float x) {
    float scaled = x * 1.44269504f;
    scaled = scaled < -126.0f ? -126.0f : scaled > 127.0f ? 127.0f : scaled;
    float whole = rintf(scaled), f = scaled - whole;
    float power = 1.5403530e-4f;
    power = power * f + 1.3333558e-3f;
    power = power * f + 9.6181291e-3f;
    power = power * f + 5.5504109e-2f;
    power = power * f + 2.4022651e-1f;
    power = power * f + 6.9314718e-1f;
    power = power * f + 1.0f;
    int32_t exponent = ((int32_t)whole + 127) << 23;
    float two_to_whole;
    memcpy(&two_to_whole, &exponent, sizeof two_to_whole);
    return power * two_to_whole;
}

/* tanh x by e^2x, which `exponential` keeps finite; the error is below 3e-7 everywhere. */
INLINE float tangent(float x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

/* One query token's heads that share a key-value head, over the blocks of its context, with a running maximum
 * (Milakov and Gimelshein 2018, arXiv:1805.02867). `group` query heads of `dim`; the first `value_dim` numbers of a
 * value count, which lies as far from the next as a key does. The query stands at `end` - 1; `slopes` [group] is what
 * scores lose a position between key and query, or null. */
INLINE void attend_group(
    bf16 *out, const bf16 *query, const bf16 *keys, const bf16 *values, const int64_t *table, int64_t first,
    int64_t end, long group, long dim, long value_dim, long kv_heads, long kv_head, long block_size, float scale,
    float cap, const float *slopes) {
    float q[group][dim], sum[group][value_dim], score[group][block_size], top[group], total[group], lane[dim];
    long stride = kv_heads * dim;
    for (long g = 0; g < group; g++) {
        top[g] = -INFINITY;
        total[g] = 0.0f;
        for (long d = 0; d < dim; d++) q[g][d] = wide(query[g * dim + d]) * scale;
        for (long d = 0; d < value_dim; d++) sum[g][d] = 0.0f;
    }
    for (int64_t block = first / block_size; block * block_size < end; block++) {
        long from = block * block_size < first ? first - block * block_size : 0;
        long to = end - block * block_size < block_size ? end - block * block_size : block_size;
        const bf16 *key = keys + table[block] * block_size * stride + kv_head * dim;
        const bf16 *value = values + table[block] * block_size * stride + kv_head * dim;
        for (long t = from; t < to; t++) {
            for (long d = 0; d < dim; d++) lane[d] = wide(key[t * stride + d]);
            for (long g = 0; g < group; g++) {
                float dot = 0.0f;
                for (long d = 0; d < dim; d++) dot += q[g][d] * lane[d];
                score[g][t] = dot;
            }
        }
        if (cap > 0.0f)
            for (long g = 0; g < group; g++)
                for (long t = from; t < to; t++) score[g][t] = cap * tangent(score[g][t] / cap);
        for (long g = 0; g < group; g++) {
            if (slopes)
                for (long t = from; t < to; t++)
                    score[g][t] += slopes[g] * (float)(block * block_size + t - (end - 1));
            float highest = top[g], added = 0.0f;
            for (long t = from; t < to; t++) highest = score[g][t] > highest ? score[g][t] : highest;
            float kept = top[g] == highest ? 1.0f : exponential(top[g] - highest);
            for (long t = from; t < to; t++) added += score[g][t] = exponential(score[g][t] - highest);
            if (kept != 1.0f)
                for (long d = 0; d < value_dim; d++) sum[g][d] *= kept;
            total[g] = total[g] * kept + added;
            top[g] = highest;
        }
        for (long g = 0; g < group; g++) {
            float kept[value_dim];
            for (long d = 0; d < value_dim; d++) kept[d] = sum[g][d];
            for (long t = from; t < to; t++)
                for (long d = 0; d < value_dim; d++) kept[d] += score[g][t] * wide(value[t * stride + d]);
            for (long d = 0; d < value_dim; d++) sum[g][d] = kept[d];
        }
    }
    for (long g = 0; g < group; g++)
        for (long d = 0; d < value_dim; d++) out[g * value_dim + d] = narrow(sum[g][d] / total[g]);
}

FOR_EVERY_CPU static void attend_one(
    bf16 *out, const bf16 *query, const bf16 *keys, const bf16 *values, const int64_t *table, int64_t first,
    int64_t end, long group, long dim, long value_dim, long kv_heads, long kv_head, long block_size, float scale,
    float cap, const float *slopes) {
    /* Known sizes let the compiler keep whole vectors in registers. */
#define ATTEND(DIM, VALUE_DIM) \
    attend_group( \
        out, query, keys, values, table, first, end, group, DIM, VALUE_DIM, kv_heads, kv_head, block_size, scale, cap, \
        slopes)
    if (dim == 64 && value_dim == 64) ATTEND(64, 64);
    else if (dim == 128 && value_dim == 128) ATTEND(128, 128);
    else ATTEND(dim, value_dim);
#undef ATTEND
}

/* out [rows, heads, value_dim]; query [rows, heads, dim] with `query_stride` between rows; keys [blocks, block_size,
 * kv_heads, dim], values likewise, of which the first `value_dim` numbers count; tables [rows, width]; positions
 * [rows], of the queries; window 0 and cap 0 for none; slopes [heads], or null. */
void weir_attend(
    bf16 *out, const bf16 *query, long query_stride, const bf16 *keys, const bf16 *values, const int64_t *tables,
    long width, const int64_t *positions, long rows, long heads, long kv_heads, long dim, long value_dim,
    long block_size, float scale, float cap, long window, const float *slopes) {
    /* Many heads over one key-value head are split: for all threads, and for a thread's stack. */
    long shared = heads / kv_heads, parts = (shared + MOST_TOGETHER - 1) / MOST_TOGETHER;
    long items = rows * kv_heads * parts;
#pragma omp parallel for schedule(dynamic) if (items > 1)
    for (long item = 0; item < items; item++) {
        long row = item / (kv_heads * parts), kv_head = item / parts % kv_heads, part = item % parts;
        long begin = part * shared / parts, group = (part + 1) * shared / parts - begin;
        long head = kv_head * shared + begin;
        int64_t end = positions[row] + 1, first = window > 0 && end > window ? end - window : 0;
        attend_one(
            out + (row * heads + head) * value_dim, query + row * query_stride + head * dim, keys, values,
            tables + row * width, first, end, group, dim, value_dim, kv_heads, kv_head, block_size, scale, cap,
            slopes ? slopes + head : NULL);
    }
}

/* Copies [tokens, size] with `stride` between tokens to the slots of a cache [slots, size]. */
void weir_store(bf16 *cache, const bf16 *x, long stride, const int64_t *slots, long tokens, long size) {
    for (long token = 0; token < tokens; token++)
        memcpy(cache + slots[token] * size, x + token * stride, size * sizeof(bf16));
}

INLINE float norm_scale(const bf16 *x, long size, float eps) {
    float squares = 0.0f;
    for (long i = 0; i < size; i++) squares += wide(x[i]) * wide(x[i]);
    return 1.0f / sqrtf(squares / size + eps);
}

FOR_EVERY_CPU static void norm_one(bf16 *out, const bf16 *x, const bf16 *weight, long size, float eps) {
    float scale = norm_scale(x, size, eps);
    for (long i = 0; i < size; i++) out[i] = narrow(wide(x[i]) * scale * wide(weight[i]));
}

FOR_EVERY_CPU static void wide_norm_one(bf16 *out, const bf16 *x, const float *weight, long size, float eps) {
    float scale = norm_scale(x, size, eps);
    for (long i = 0; i < size; i++) out[i] = narrow(wide(x[i]) * scale * weight[i]);
}

/* out, x [rows, size]; `stride` between the rows of x. */
void weir_rms_norm(bf16 *out, const bf16 *x, long stride, const bf16 *weight, long rows, long size, float eps) {
#pragma omp parallel for if (rows * size > WORTH_SHARING)
    for (long row = 0; row < rows; row++) norm_one(out + row * size, x + row * stride, weight, size, eps);
}

/* The same with a weight in float32. */
void weir_wide_rms_norm(bf16 *out, const bf16 *x, long stride, const float *weight, long rows, long size, float eps) {
#pragma omp parallel for if (rows * size > WORTH_SHARING)
    for (long row = 0; row < rows; row++) wide_norm_one(out + row * size, x + row * stride, weight, size, eps);
}

/* The first `size` numbers of every head are turned, those that follow kept; `apart` numbers lie between heads of x. */
FOR_EVERY_CPU static void rotate_halves(
    bf16 *out, const bf16 *x, long apart, const bf16 *cosines, const bf16 *sines, long heads, long dim, long size) {
    long half = size / 2;
    for (long head = 0; head < heads; head++, x += apart, out += dim) {
        for (long i = 0; i < half; i++) {
            float low = wide(x[i]), high = wide(x[half + i]);
            out[i] = narrow(low * wide(cosines[i]) + high * wide(sines[i]));
            out[half + i] = narrow(high * wide(cosines[half + i]) + low * wide(sines[half + i]));
        }
        memcpy(out + size, x + size, (dim - size) * sizeof(bf16));
    }
}

FOR_EVERY_CPU static void rotate_pairs(
    bf16 *out, const bf16 *x, long apart, const bf16 *cosines, const bf16 *sines, long heads, long dim, long size) {
    const bf16 *positive = sines + size / 2;
    for (long head = 0; head < heads; head++, x += apart, out += dim) {
        for (long i = 0; i < size / 2; i++) {
            float even = wide(x[2 * i]), odd = wide(x[2 * i + 1]), cosine = wide(cosines[i]), sine = wide(positive[i]);
            out[2 * i] = narrow(even * cosine - odd * sine);
            out[2 * i + 1] = narrow(odd * cosine + even * sine);
        }
        memcpy(out + size, x + size, (dim - size) * sizeof(bf16));
    }
}

/* out [tokens, heads, dim]; x likewise with `stride` between tokens and `apart` between heads; cosines and sines
 * [tokens, size], the first half of the sines negated. `pairs`: neighbours turn together, not halves. */
void weir_rotate(
    bf16 *out, const bf16 *x, long stride, long apart, const bf16 *cosines, const bf16 *sines, long tokens, long heads,
    long dim, long size, int pairs) {
#pragma omp parallel for if (tokens * heads * dim > WORTH_SHARING)
    for (long token = 0; token < tokens; token++)
        (pairs ? rotate_pairs : rotate_halves)(
            out + token * heads * dim, x + token * stride, apart, cosines + token * size, sines + token * size, heads,
            dim, size);
}

FOR_EVERY_CPU static void gate_one(bf16 *out, const bf16 *gate, const bf16 *up, long size) {
    for (long i = 0; i < size; i++) {
        float x = wide(gate[i]);
        out[i] = narrow(x / (1.0f + exponential(-x)) * wide(up[i]));
    }
}

/* out [rows, size] = silu(gate) * up, where gate_up [rows, 2 * size] has them side by side. */
void weir_silu_gate(bf16 *out, const bf16 *gate_up, long rows, long size) {
#pragma omp parallel for if (rows * size > WORTH_SHARING)
    for (long row = 0; row < rows; row++)
        gate_one(out + row * size, gate_up + 2 * row * size, gate_up + (2 * row + 1) * size, size);
}

FOR_EVERY_CPU static void gelu_gate_one(bf16 *out, const bf16 *gate, const bf16 *up, long size) {
    for (long i = 0; i < size; i++) {
        float x = wide(gate[i]);
        out[i] = narrow(x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x))) * wide(up[i]));
    }
}

/* The same with the Gaussian error linear unit by a tangent (Hendrycks and Gimpel 2016, arXiv:1606.08415): 1 + tanh y
 * is 2 / (1 + e^-2y), which loses nothing where the tangent is near -1. */
void weir_gelu_gate(bf16 *out, const bf16 *gate_up, long rows, long size) {
#pragma omp parallel for if (rows * size > WORTH_SHARING)
    for (long row = 0; row < rows; row++)
        gelu_gate_one(out + row * size, gate_up + 2 * row * size, gate_up + (2 * row + 1) * size, size);
}

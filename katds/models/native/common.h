/* What forward.c and attention.c share. Matrix products and threads are PyTorch's own: its BLAS, its OpenMP. */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* e^x between e^-87 and e^87, no denormals; a NaN stays one. Relative error 3e-7, without fused multiply-add
 * 6e-8 |x|: as much as x itself is uncertain. Branch-free, so that loops over it become vector code anywhere. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
    const float n = rintf(x * 1.44269504f);
    const float r = x - n * 0.69314718f;
    float y = 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    union {
        uint32_t bits;
        float value;
    } power = {((uint32_t)(int32_t)(n == n ? n : 0.0f) + 127u) << 23};
    return y * power.value;
}

/* Pointers to 64-bit numbers serve a BLAS with 32-bit ones as well: little-endian, and no size reaches 2^31. */
typedef void (*sgemm_fn)(const char *, const char *, const int64_t *, const int64_t *, const int64_t *, const float *,
                         const float *, const int64_t *, const float *, const int64_t *, const float *, float *,
                         const int64_t *);

/* GOMP_parallel of the OpenMP library that PyTorch runs on: calls the function in so many threads, waits for them. */
typedef void (*parallel_fn)(void (*)(void *), void *, unsigned, unsigned);

/* Sets how many threads the calling thread's matrix products are cut up for; returns how many it was. MKL cuts by the number that it is
 * told, which PyTorch tells its main thread alone, also where all are busy: a product would depend on who makes it. */
typedef int (*product_threads_fn)(int);

/* `queries` successive tokens from `first` on; the one at `first` has `position` keys before it. */
typedef struct {
    int64_t first, queries, place, position; /* place: where key 0 lies, in units of key_place and value_place */
} Run;

typedef struct {
    sgemm_fn sgemm;
    parallel_fn parallel; /* NULL: one thread */
    product_threads_fn product_threads; /* NULL: there is nothing to set */
    const float *query, *key, *value;
    float *out, *logsum; /* logsum [tokens, heads], log of the sum of the scores' exponentials; NULL: not asked for */
    const float *grad_out;
    float *grad_query, *grad_key, *grad_value; /* keys and values: zeros */
    float *work;                               /* see katds_attention_floats */
    const Run *runs;
    int64_t query_token, query_head, key_place, key_token, key_head, value_place, value_token, value_head; /* strides */
    int64_t count, heads, kv_heads, dim, window, longest, threads; /* window, visible keys, 0: all; longest run of keys */
    float scale;
} Attention;

int64_t katds_attention_floats(const Attention *a, int backward);
void katds_attention(const Attention *a);

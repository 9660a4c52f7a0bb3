/* Causal attention over runs of queries in float32 on the CPU, and its gradient, as PyTorch's flash attention computes it:
 * a block of queries against all keys that it may see, scores kept in the cache, no mask. PyTorch's own reaches a third
 * of the speed of its matrix products for the narrow heads of small models; this one half to two thirds.
 *
 * Layouts: queries [tokens, heads, dim] and keys and values alike, with any strides between tokens and heads; results
 * [tokens, heads, dim], contiguous. No state, no allocation: Python owns all memory.
 */
#include "common.h"

#define BLOCK 64 /* queries that are weighed together: few enough that little is computed beyond the diagonal */
#define KEYS 64  /* of a single query, keys or values that stay in the first cache while all heads read them */
#define MAX_DIM 256             /* of a head whose single queries have code of their own */
#define WORTH_THREADS (1 << 17) /* products of queries and keys, in numbers: some 50 microseconds for one thread */

/* Of scores, which a thread has for itself. */
static int64_t scores_floats(const Attention *a, int backward) {
    const int64_t share = a->heads / a->kv_heads;
    return (backward ? 2 * BLOCK : share > BLOCK ? share : BLOCK) * a->longest;
}

int64_t katds_attention_floats(const Attention *a, int backward) { return a->threads * scores_floats(a, backward); }

/* A block of queries of one head, and the keys that at least one of them sees: [low, low + keys) of the run. */
typedef struct {
    const float *query, *key, *value;
    int64_t row, queries, low, keys, position; /* row: the first query's; position: its own among the run's keys */
} Block;

static Block block_of(const Attention *a, const Run *run, int64_t head, int64_t at) {
    const int64_t left = run->queries - at, position = run->position + at, kv = head / (a->heads / a->kv_heads);
    Block b = {.row = run->first + at, .queries = left < BLOCK ? left : BLOCK, .position = position};
    b.low = a->window && position >= a->window ? position + 1 - a->window : 0;
    b.keys = position + b.queries - b.low;
    b.query = a->query + b.row * a->query_token + head * a->query_head;
    b.key = a->key + run->place * a->key_place + b.low * a->key_token + kv * a->key_head;
    b.value = a->value + run->place * a->value_place + b.low * a->value_token + kv * a->value_head;
    return b;
}

/* What the query in row i of a block sees: keys [from, to) of the block's. */
static inline int64_t from(const Attention *a, const Block *b, int64_t i) {
    const int64_t last = b->position + i;
    return a->window && last >= a->window ? last + 1 - a->window - b->low : 0;
}

static inline int64_t to(const Block *b, int64_t i) { return b->position + i + 1 - b->low; }

/* c [m, n] = scale a [m, k] b [n, k]^T, rows ldc, lda and ldb apart */
static void times_transposed(const Attention *at, const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                             int64_t m, int64_t n, int64_t k, float scale) {
    const float zero = 0.0f;
    at->sgemm("T", "N", &n, &m, &k, &scale, b, &ldb, a, &lda, &zero, c, &n);
}

/* c [m, n] = a [m, k] b [k, n] */
static void times(const Attention *at, const float *a, const float *b, int64_t ldb, float *c, int64_t ldc, int64_t m,
                  int64_t n, int64_t k) {
    const float one = 1.0f, zero = 0.0f;
    at->sgemm("N", "N", &n, &m, &k, &one, b, &ldb, a, &k, &zero, c, &ldc);
}

/* c [m, n] += a [k, m]^T b [k, n] */
static void add_transposed_times(const Attention *at, const float *a, const float *b, int64_t ldb, float *c,
                                 int64_t ldc, int64_t m, int64_t n, int64_t k) {
    const float one = 1.0f;
    at->sgemm("N", "T", &n, &m, &k, &one, b, &ldb, a, &m, &one, c, &ldc);
}

/* Softmax over p[from, to), zeros around it; returns the log of the sum of exponentials. */
static float softmax(float *restrict p, int64_t from, int64_t to, int64_t keys) {
    float most = p[from], total = 0.0f;
    for (int64_t t = from + 1; t < to; t++) most = p[t] > most ? p[t] : most;
    for (int64_t t = from; t < to; t++) {
        p[t] = exponential(p[t] - most);
        total += p[t];
    }
    const float inverse = 1.0f / total;
    for (int64_t t = from; t < to; t++) p[t] *= inverse;
    for (int64_t t = 0; t < from; t++) p[t] = 0.0f;
    for (int64_t t = to; t < keys; t++) p[t] = 0.0f;
    return most + logf(total);
}

static void forward(const Attention *a, const Run *run, int64_t head, float *scores) {
    const int64_t wide = a->heads * a->dim;
    for (int64_t at = 0; at < run->queries; at += BLOCK) {
        const Block b = block_of(a, run, head, at);
        times_transposed(a, b.query, a->query_token, b.key, a->key_token, scores, b.queries, b.keys, a->dim, a->scale);
        for (int64_t i = 0; i < b.queries; i++) {
            const float logsum = softmax(scores + i * b.keys, from(a, &b, i), to(&b, i), b.keys);
            if (a->logsum) a->logsum[(b.row + i) * a->heads + head] = logsum;
        }
        times(a, scores, b.value, a->value_token, a->out + b.row * wide + head * a->dim, wide, b.queries, a->dim,
              b.keys);
    }
}

/* One query of `share` heads of one key head against keys 0 .. count - 1. A product of matrices would have a single row.
 * Inlined for the usual `dim`, so that a row is a few registers and its loops are straight code. */
static inline void attend_rows(const float *restrict query, int64_t query_head, const float *restrict keys,
                               int64_t key_token, const float *restrict values, int64_t value_token,
                               float *restrict scores, float *restrict out, float *restrict logsum, int64_t share,
                               int64_t dim, int64_t count, float scale) {
    for (int64_t begin = 0; begin < count; begin += KEYS) {
        const int64_t end = begin + KEYS < count ? begin + KEYS : count;
        for (int64_t h = 0; h < share; h++) {
            const float *restrict q = query + h * query_head;
            for (int64_t t = begin; t < end; t++) {
                const float *restrict k = keys + t * key_token;
                float sum = 0.0f;
                for (int64_t j = 0; j < dim; j++) sum += q[j] * k[j];
                scores[h * count + t] = sum * scale;
            }
        }
    }
    for (int64_t h = 0; h < share; h++) {
        const float total = softmax(scores + h * count, 0, count, count);
        if (logsum) logsum[h] = total;
    }
    memset(out, 0, (size_t)(share * dim) * sizeof(float));
    for (int64_t begin = 0; begin < count; begin += KEYS) {
        const int64_t end = begin + KEYS < count ? begin + KEYS : count;
        for (int64_t h = 0; h < share; h++) {
            float row[MAX_DIM];
            for (int64_t j = 0; j < dim; j++) row[j] = out[h * dim + j];
            const float *restrict p = scores + h * count;
            int64_t t = begin;
            for (; t + 4 <= end; t += 4) { /* four at a time: one alone waits for the addition before it */
                const float *restrict a = values + t * value_token, *restrict b = a + value_token;
                const float *restrict c = b + value_token, *restrict d = c + value_token;
                for (int64_t j = 0; j < dim; j++)
                    row[j] += (p[t] * a[j] + p[t + 1] * b[j]) + (p[t + 2] * c[j] + p[t + 3] * d[j]);
            }
            for (; t < end; t++)
                for (int64_t j = 0; j < dim; j++) row[j] += p[t] * values[t * value_token + j];
            for (int64_t j = 0; j < dim; j++) out[h * dim + j] = row[j];
        }
    }
}

/* The only query of a run, all heads of one key head. */
static void single(const Attention *a, const Run *run, int64_t kv, float *scores) {
    const int64_t share = a->heads / a->kv_heads, head = kv * share, dim = a->dim;
    const Block b = block_of(a, run, head, 0);
    float *out = a->out + (b.row * a->heads + head) * dim, *logsum = a->logsum ? a->logsum + b.row * a->heads + head : 0;
#define ATTEND(dim)                                                                                                    \
    attend_rows(b.query, a->query_head, b.key, a->key_token, b.value, a->value_token, scores, out, logsum, share, dim, \
                b.keys, a->scale)
    switch (dim) {
    case 32: ATTEND(32); break;
    case 64: ATTEND(64); break;
    case 128: ATTEND(128); break;
    default: ATTEND(dim);
    }
#undef ATTEND
}

/* Scores become probabilities p, and the probabilities' gradients d those of the scores: p (d - sum of p d) scale. */
static void softmax_backward(float *restrict p, float *restrict d, float logsum, float mean, float scale, int64_t from,
                             int64_t to, int64_t keys) {
    for (int64_t t = from; t < to; t++) {
        p[t] = exponential(p[t] - logsum);
        d[t] = p[t] * (d[t] - mean) * scale;
    }
    for (int64_t t = 0; t < from; t++) p[t] = d[t] = 0.0f;
    for (int64_t t = to; t < keys; t++) p[t] = d[t] = 0.0f;
}

/* Of a run whose keys are its own queries' tokens. Adds to the gradients of its keys and values. */
static void backward(const Attention *a, const Run *run, int64_t head, float *scores) {
    const int64_t wide = a->heads * a->dim, narrow = a->kv_heads * a->dim, dim = a->dim;
    const int64_t kv = head / (a->heads / a->kv_heads);
    float *grads = scores + BLOCK * a->longest;
    for (int64_t at = 0; at < run->queries; at += BLOCK) {
        const Block b = block_of(a, run, head, at);
        const float *out = a->out + b.row * wide + head * dim, *grad_out = a->grad_out + b.row * wide + head * dim;
        const int64_t key = (run->first + b.low) * narrow + kv * dim;
        times_transposed(a, b.query, a->query_token, b.key, a->key_token, scores, b.queries, b.keys, dim, a->scale);
        times_transposed(a, grad_out, wide, b.value, a->value_token, grads, b.queries, b.keys, dim, 1.0f);
        for (int64_t i = 0; i < b.queries; i++) {
            float mean = 0.0f; /* sum of p d */
            for (int64_t j = 0; j < dim; j++) mean += out[i * wide + j] * grad_out[i * wide + j];
            softmax_backward(scores + i * b.keys, grads + i * b.keys, a->logsum[(b.row + i) * a->heads + head], mean,
                             a->scale, from(a, &b, i), to(&b, i), b.keys);
        }
        add_transposed_times(a, scores, grad_out, wide, a->grad_value + key, narrow, b.keys, dim, b.queries);
        add_transposed_times(a, grads, b.query, a->query_token, a->grad_key + key, narrow, b.keys, dim, b.queries);
        times(a, grads, b.key, a->key_token, a->grad_query + b.row * wide + head * dim, wide, b.queries, dim, b.keys);
    }
}

typedef struct {
    const Attention *attention;
    int64_t begun, threads; /* units of work that a thread has begun, and threads */
} Work;

/* What one thread does: the next run and key head that nobody has begun. The query heads of a key head stay together,
 * since they add to the same gradients. */
static void work(void *given) {
    Work *w = given;
    const Attention *a = w->attention;
    const int64_t thread = __atomic_fetch_add(&w->threads, 1, __ATOMIC_RELAXED), share = a->heads / a->kv_heads;
    float *scores = a->work + thread * scores_floats(a, a->grad_out != NULL);
    const int before = a->product_threads ? a->product_threads(1) : 0;
    for (int64_t unit; (unit = __atomic_fetch_add(&w->begun, 1, __ATOMIC_RELAXED)) < a->count * a->kv_heads;) {
        const Run *run = a->runs + unit / a->kv_heads;
        const int64_t kv = unit % a->kv_heads, first = kv * share;
        if (run->queries == 1 && !a->grad_out && a->dim <= MAX_DIM)
            single(a, run, kv, scores);
        else
            for (int64_t head = first; head < first + share; head++)
                (a->grad_out ? backward : forward)(a, run, head, scores);
    }
    if (a->product_threads) a->product_threads(before);
}

static int worth_threads(const Attention *a) {
    int64_t pairs = 0;
    for (const Run *run = a->runs; run < a->runs + a->count; run++) pairs += run->queries * (run->position + run->queries);
    return a->count * a->kv_heads > 1 && pairs * a->kv_heads * a->dim >= WORTH_THREADS;
}

/* Writes `out` and `logsum`; with `grad_out`, the gradients. */
void katds_attention(const Attention *a) {
    Work w = {a, 0, 0};
    if (a->parallel && a->threads > 1 && worth_threads(a))
        a->parallel(work, &w, (unsigned)a->threads, 0);
    else
        work(&w);
}

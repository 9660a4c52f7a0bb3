/* The forward of a Llama-like transformer in float32 on the CPU, from tokens in slots to their last hidden states: a decode
 * step, prompts, or the chunks that a teacher reads.
 *
 * Only the small operations are written out; matrix products go to the BLAS that PyTorch carries, attention to attention.c.
 * What PyTorch spends on a small model is not arithmetic but some forty operator calls per layer, each of which also takes
 * its results through the memory. No state, no allocation: Python owns all memory.
 *
 * Layouts: weights [out, in] row-major; keys and values [slots, kv_heads, length, dim].
 */
#include "common.h"

#define TILE 256                /* tokens that go through the MLP together: few enough that its rows stay in the cache */
#define WORTH_THREADS (1 << 16) /* numbers of a pass: some 20 microseconds for one thread */

typedef struct {
    const float *input_norm, *post_norm, *query_norm, *key_norm; /* query_norm, key_norm: NULL without */
    const float *query, *key, *value, *out, *gate, *up, *down;
    const float *query_bias, *key_bias, *value_bias, *out_bias, *gate_bias, *up_bias, *down_bias; /* NULL without */
    float *keys, *values;
    int64_t window; /* visible keys, 0: all */
} Layer;

typedef struct {
    sgemm_fn sgemm;
    parallel_fn parallel; /* NULL: one thread */
    product_threads_fn product_threads;
    const float *embedding, *norm;
    const float *cosine, *sine; /* [length, dim] */
    int64_t layers, hidden, heads, kv_heads, dim, inner;
    int64_t tokens, slots, length, threads; /* tokens: rows of the embedding */
    float eps, scale;
} Model;

typedef struct {
    const int64_t *tokens, *positions;                           /* [n] */
    const int64_t *write_source, *write_slots, *write_positions; /* [writes], where keys go; source NULL: token i is write i */
    const Run *runs;                                             /* [count] */
    float *work;                                                 /* see katds_forward_floats */
    int64_t n, writes, count;
} Batch;

static int64_t tile_of(int64_t n) { return n < TILE ? n : TILE; }

static Attention attention_of(const Model *m) {
    return (Attention){.sgemm = m->sgemm, .parallel = m->parallel, .product_threads = m->product_threads,
                       .query_token = m->heads * m->dim, .query_head = m->dim,
                       .key_place = m->kv_heads * m->length * m->dim, .key_token = m->dim, .key_head = m->length * m->dim,
                       .value_place = m->kv_heads * m->length * m->dim, .value_token = m->dim,
                       .value_head = m->length * m->dim, .heads = m->heads, .kv_heads = m->kv_heads, .dim = m->dim,
                       .longest = m->length, .threads = m->threads, .scale = m->scale};
}

int64_t katds_forward_floats(const Model *m, int64_t n) {
    const Attention a = attention_of(m);
    return n * 2 * (m->heads + m->kv_heads) * m->dim + tile_of(n) * (m->hidden + 2 * m->inner) +
           katds_attention_floats(&a, 0);
}

/* y [n, rows] (+)= x [n, columns] w^T */
static void product(const Model *m, const float *x, const float *w, const float *bias, float *y, int64_t n,
                    int64_t columns, int64_t rows, int accumulate) {
    const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    m->sgemm("T", "N", &rows, &n, &columns, &one, w, &columns, x, &columns, &beta, y, &rows);
    if (bias)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < rows; j++) y[i * rows + j] += bias[j];
}

/* A pass over rows, which threads share: function(pass, from, to) for blocks of them. */
typedef struct Pass {
    void (*function)(const struct Pass *, int64_t, int64_t);
    const Model *model;
    const Layer *layer;
    const Batch *batch;
    float *x, *y; /* what the function says */
    const float *weight;
    int64_t n, block, begun;
} Pass;

static void rows_left(void *given) {
    Pass *p = given;
    for (int64_t from; (from = __atomic_fetch_add(&p->begun, p->block, __ATOMIC_RELAXED)) < p->n;)
        p->function(p, from, from + p->block < p->n ? from + p->block : p->n);
}

static void run_pass(Pass p, int64_t width) {
    const Model *m = p.model;
    if (m->parallel && m->threads > 1 && p.n > 1 && p.n * width >= WORTH_THREADS) {
        p.block = (p.n + 4 * m->threads - 1) / (4 * m->threads);
        m->parallel(rows_left, &p, (unsigned)m->threads, 0);
    } else
        p.function(&p, 0, p.n);
}

/* y = weight x / root mean square; y may be x. */
static void rms_norm(const float *x, const float *weight, float *y, int64_t n, int64_t width, float eps) {
    for (int64_t i = 0; i < n; i++, x += width, y += width) {
        float sum = 0.0f;
        for (int64_t j = 0; j < width; j++) sum += x[j] * x[j];
        const float factor = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t j = 0; j < width; j++) y[j] = weight[j] * (x[j] * factor);
    }
}

static void norm_rows(const Pass *p, int64_t from, int64_t to) {
    const int64_t width = p->model->hidden;
    rms_norm(p->x + from * width, p->weight, p->y + from * width, to - from, width, p->model->eps);
}

/* x = silu(x) y */
static void gate_rows(const Pass *p, int64_t from, int64_t to) {
    float *restrict x = p->x;
    const float *restrict y = p->y;
    const int64_t width = p->model->inner;
    for (int64_t j = from * width; j < to * width; j++) x[j] = x[j] / (1.0f + exponential(-x[j])) * y[j];
}

/* One head, in place: the rotation of transformers' rotate_half. */
static void rotate(float *restrict x, const float *restrict cosine, const float *restrict sine, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t j = 0; j < half; j++) {
        const float a = x[j], b = x[j + half];
        x[j] = a * cosine[j] - b * sine[j];
        x[j + half] = b * cosine[j + half] + a * sine[j + half];
    }
}

/* Queries x and keys y, in place. */
static void rotate_rows(const Pass *p, int64_t from, int64_t to) {
    const Model *m = p->model;
    const int64_t dim = m->dim;
    for (int64_t i = from; i < to; i++) {
        const float *cosine = m->cosine + p->batch->positions[i] * dim, *sine = m->sine + p->batch->positions[i] * dim;
        float *query = p->x + i * m->heads * dim, *key = p->y + i * m->kv_heads * dim;
        if (p->layer->query_norm) rms_norm(query, p->layer->query_norm, query, m->heads, dim, m->eps);
        if (p->layer->key_norm) rms_norm(key, p->layer->key_norm, key, m->kv_heads, dim, m->eps);
        for (int64_t h = 0; h < m->heads; h++) rotate(query + h * dim, cosine, sine, dim);
        for (int64_t h = 0; h < m->kv_heads; h++) rotate(key + h * dim, cosine, sine, dim);
    }
}

/* Keys x and values y to their places in the cache; a row is a write. */
static void write_rows(const Pass *p, int64_t from, int64_t to) {
    const Model *m = p->model;
    const Batch *b = p->batch;
    for (int64_t w = from; w < to; w++) {
        const int64_t source = (b->write_source ? b->write_source[w] : w) * m->kv_heads * m->dim;
        for (int64_t h = 0; h < m->kv_heads; h++) {
            const int64_t at = ((b->write_slots[w] * m->kv_heads + h) * m->length + b->write_positions[w]) * m->dim;
            memcpy(p->layer->keys + at, p->x + source + h * m->dim, (size_t)m->dim * sizeof(float));
            memcpy(p->layer->values + at, p->y + source + h * m->dim, (size_t)m->dim * sizeof(float));
        }
    }
}

/* x += attention(norm(x)) */
static void attend(const Model *m, const Layer *l, const Batch *b, float *x) {
    const int64_t n = b->n, hidden = m->hidden, wide = m->heads * m->dim, narrow = m->kv_heads * m->dim;
    float *query = b->work, *key = query + n * wide, *value = key + n * narrow, *context = value + n * narrow;
    float *normed = context + n * wide;
    for (int64_t at = 0; at < n; at += TILE) {
        const int64_t rows = tile_of(n - at);
        run_pass((Pass){norm_rows, m, l, b, x + at * hidden, normed, l->input_norm, rows, 0, 0}, hidden);
        product(m, normed, l->query, l->query_bias, query + at * wide, rows, hidden, wide, 0);
        product(m, normed, l->key, l->key_bias, key + at * narrow, rows, hidden, narrow, 0);
        product(m, normed, l->value, l->value_bias, value + at * narrow, rows, hidden, narrow, 0);
    }
    run_pass((Pass){rotate_rows, m, l, b, query, key, NULL, n, 0, 0}, wide + narrow);
    run_pass((Pass){write_rows, m, l, b, key, value, NULL, b->writes, 0, 0}, 2 * narrow);
    Attention a = attention_of(m);
    a.query = query, a.key = l->keys, a.value = l->values, a.out = context;
    a.runs = b->runs, a.count = b->count, a.window = l->window;
    a.work = normed + tile_of(n) * (hidden + 2 * m->inner);
    katds_attention(&a);
    product(m, context, l->out, l->out_bias, x, n, wide, hidden, 1);
}

/* x += mlp(norm(x)) */
static void multiply(const Model *m, const Layer *l, const Batch *b, float *x) {
    const int64_t n = b->n, hidden = m->hidden, inner = m->inner;
    float *normed = b->work + n * 2 * (m->heads + m->kv_heads) * m->dim, *gate = normed + tile_of(n) * hidden;
    float *up = gate + tile_of(n) * inner;
    for (int64_t at = 0; at < n; at += TILE) {
        const int64_t rows = tile_of(n - at);
        run_pass((Pass){norm_rows, m, l, b, x + at * hidden, normed, l->post_norm, rows, 0, 0}, hidden);
        product(m, normed, l->gate, l->gate_bias, gate, rows, hidden, inner, 0);
        product(m, normed, l->up, l->up_bias, up, rows, hidden, inner, 0);
        run_pass((Pass){gate_rows, m, l, b, gate, up, NULL, rows, 0, 0}, inner);
        product(m, gate, l->down, l->down_bias, x + at * hidden, rows, inner, hidden, 1);
    }
}

/* The first token that does not exist, or has no place in the cache; -1: none. */
static int64_t first_wrong(const Model *m, const Batch *b) {
    for (int64_t i = 0; i < b->n; i++)
        if (b->tokens[i] < 0 || b->tokens[i] >= m->tokens || b->positions[i] < 0 || b->positions[i] >= m->length) return i;
    for (int64_t w = 0; w < b->writes; w++) {
        const int64_t source = b->write_source ? b->write_source[w] : w;
        if (source < 0 || source >= b->n) return 0;
        if (b->write_slots[w] < 0 || b->write_slots[w] >= m->slots) return source;
        if (b->write_positions[w] < 0 || b->write_positions[w] >= m->length) return source;
    }
    for (const Run *r = b->runs; r < b->runs + b->count; r++) {
        if (r->queries == 0) continue;
        if (r->first < 0 || r->first >= b->n) return 0;
        if (r->queries < 0 || r->first + r->queries > b->n) return r->first;
        if (r->place < 0 || r->place >= m->slots || r->position < 0 || r->position + r->queries > m->length) return r->first;
    }
    return -1;
}

/* Writes the last hidden states [n, hidden], and keys and values. Returns -1, or without having written anything the first token
 * that does not exist or has no place. */
int64_t katds_forward(const Model *m, const Layer *layers, const Batch *b, float *hidden) {
    const int64_t wrong = first_wrong(m, b);
    if (wrong >= 0) return wrong;
    for (int64_t i = 0; i < b->n; i++)
        memcpy(hidden + i * m->hidden, m->embedding + b->tokens[i] * m->hidden, (size_t)m->hidden * sizeof(float));
    for (const Layer *l = layers; l < layers + m->layers; l++) {
        attend(m, l, b, hidden);
        multiply(m, l, b, hidden);
    }
    run_pass((Pass){norm_rows, m, NULL, b, hidden, hidden, m->norm, b->n, 0, 0}, m->hidden);
    return -1;
}

/* One decode step of a Llama-like transformer in float32 on the CPU: n rows, one token each.
 *
 * Only the small operations are written out; matrix products go to the BLAS that PyTorch carries. What PyTorch spends
 * on a small model is not arithmetic but some forty operator calls per layer. No state, no allocation: Python owns all
 * memory.
 *
 * Layouts: weights [out, in] row-major; keys and values [slots, kv_heads, length, dim]; row i writes slot i.
 */
#include "common.h"

#define MAX_DIM 256 /* of a head; step.py refuses more */
#define WORTH_THREADS (1 << 17) /* numbers of keys: some 50 microseconds for one thread */
#define BLOCK 64    /* keys or values that stay in the first cache while all heads read them */

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
    const float *embedding, *norm, *head, *head_bias;
    const float *cosine, *sine; /* [length, dim] */
    float *work;                /* see katds_work_floats */
    int64_t layers, hidden, heads, kv_heads, dim, inner;
    int64_t tokens, vocabulary, length, threads; /* tokens: rows of the embedding */
    float eps, scale;
} Model;

int64_t katds_work_floats(const Model *m, int64_t n) {
    return n * (2 * m->hidden + 2 * m->heads * m->dim + 2 * m->kv_heads * m->dim + 2 * m->inner) +
           m->threads * (m->heads / m->kv_heads) * m->length;
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

/* y = weight x / root mean square; y may be x. */
static void rms_norm(const float *x, const float *weight, float *y, int64_t n, int64_t width, float eps) {
    for (int64_t i = 0; i < n; i++, x += width, y += width) {
        float sum = 0.0f;
        for (int64_t j = 0; j < width; j++) sum += x[j] * x[j];
        const float factor = 1.0f / sqrtf(sum / (float)width + eps);
        for (int64_t j = 0; j < width; j++) y[j] = weight[j] * (x[j] * factor);
    }
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

static void softmax(float *restrict p, int64_t count) {
    float most = p[0], total = 0.0f;
    for (int64_t t = 1; t < count; t++) most = p[t] > most ? p[t] : most;
    for (int64_t t = 0; t < count; t++) {
        p[t] = exponential(p[t] - most);
        total += p[t];
    }
    const float inverse = 1.0f / total;
    for (int64_t t = 0; t < count; t++) p[t] *= inverse;
}

/* `share` query heads of one key head against keys 0 .. count - 1. Inlined for the usual `dim`, so that a row is a few
 * registers and its loops are straight code. */
static inline void attend_rows(const float *restrict query, const float *restrict keys, const float *restrict values,
                               float *restrict scores, float *restrict out, int64_t share, int64_t dim, int64_t count,
                               float scale) {
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        const int64_t end = begin + BLOCK < count ? begin + BLOCK : count;
        for (int64_t h = 0; h < share; h++) {
            const float *restrict q = query + h * dim;
            for (int64_t t = begin; t < end; t++) {
                const float *restrict k = keys + t * dim;
                float sum = 0.0f;
                for (int64_t j = 0; j < dim; j++) sum += q[j] * k[j];
                scores[h * count + t] = sum * scale;
            }
        }
    }
    for (int64_t h = 0; h < share; h++) softmax(scores + h * count, count);
    memset(out, 0, (size_t)(share * dim) * sizeof(float));
    for (int64_t begin = 0; begin < count; begin += BLOCK) {
        const int64_t end = begin + BLOCK < count ? begin + BLOCK : count;
        for (int64_t h = 0; h < share; h++) {
            float row[MAX_DIM];
            for (int64_t j = 0; j < dim; j++) row[j] = out[h * dim + j];
            const float *restrict p = scores + h * count;
            int64_t t = begin;
            for (; t + 4 <= end; t += 4) { /* four at a time: one alone waits for the addition before it */
                const float *restrict v = values + t * dim;
                const float a = p[t], b = p[t + 1], c = p[t + 2], d = p[t + 3];
                for (int64_t j = 0; j < dim; j++)
                    row[j] += (a * v[j] + b * v[j + dim]) + (c * v[j + 2 * dim] + d * v[j + 3 * dim]);
            }
            for (; t < end; t++)
                for (int64_t j = 0; j < dim; j++) row[j] += p[t] * values[t * dim + j];
            for (int64_t j = 0; j < dim; j++) out[h * dim + j] = row[j];
        }
    }
}

static void attend(const float *query, const float *keys, const float *values, float *scores, float *out, int64_t share,
                   int64_t dim, int64_t count, float scale) {
    switch (dim) {
    case 32: attend_rows(query, keys, values, scores, out, share, 32, count, scale); break;
    case 64: attend_rows(query, keys, values, scores, out, share, 64, count, scale); break;
    case 128: attend_rows(query, keys, values, scores, out, share, 128, count, scale); break;
    default: attend_rows(query, keys, values, scores, out, share, dim, count, scale);
    }
}

typedef struct {
    const Model *model;
    const Layer *layer;
    const int64_t *positions;
    float *query, *key, *context, *scores; /* scores of each thread [share, length] */
    const float *value;
    int64_t n, begun, threads; /* rows that a thread has begun, and threads */
} Rows;

/* Writes one row's new keys and values, then its heads' context; query and key are overwritten. */
static void attend_row(const Rows *r, int64_t row, float *scores) {
    const Model *m = r->model;
    const Layer *l = r->layer;
    const int64_t share = m->heads / m->kv_heads, dim = m->dim, at = r->positions[row];
    const int64_t first = l->window && at >= l->window ? at + 1 - l->window : 0;
    const float *cosine = m->cosine + at * dim, *sine = m->sine + at * dim;
    for (int64_t g = row * m->kv_heads; g < (row + 1) * m->kv_heads; g++) {
        float *k = l->keys + g * m->length * dim, *v = l->values + g * m->length * dim;
        float *key = r->key + g * dim, *query = r->query + g * share * dim;
        if (l->key_norm) rms_norm(key, l->key_norm, key, 1, dim, m->eps);
        if (l->query_norm) rms_norm(query, l->query_norm, query, share, dim, m->eps);
        rotate(key, cosine, sine, dim);
        for (int64_t h = 0; h < share; h++) rotate(query + h * dim, cosine, sine, dim);
        memcpy(k + at * dim, key, (size_t)dim * sizeof(float));
        memcpy(v + at * dim, r->value + g * dim, (size_t)dim * sizeof(float));
        attend(query, k + first * dim, v + first * dim, scores, r->context + g * share * dim, share, dim,
               at + 1 - first, m->scale);
    }
}

/* What one thread does: the next row that nobody has begun. */
static void attend_rows_left(void *rows) {
    Rows *r = rows;
    const int64_t thread = __atomic_fetch_add(&r->threads, 1, __ATOMIC_RELAXED);
    float *scores = r->scores + thread * (r->model->heads / r->model->kv_heads) * r->model->length;
    for (int64_t i; (i = __atomic_fetch_add(&r->begun, 1, __ATOMIC_RELAXED)) < r->n;) attend_row(r, i, scores);
}

static void attention(const Model *m, Rows rows) {
    int64_t keys = 0;
    for (int64_t i = 0; i < rows.n; i++) keys += rows.positions[i] + 1;
    if (m->parallel && m->threads > 1 && rows.n > 1 && keys * m->kv_heads * m->dim >= WORTH_THREADS)
        m->parallel(attend_rows_left, &rows, (unsigned)m->threads, 0);
    else
        attend_rows_left(&rows);
}

/* Writes logits [n, vocabulary] and the new keys and values at `positions`. Returns n, or without having written
 * anything the first row whose token or position does not exist. */
int64_t katds_decode(const Model *m, const Layer *layers, int64_t n, const int64_t *tokens, const int64_t *positions,
                     float *logits) {
    for (int64_t i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= m->tokens || positions[i] < 0 || positions[i] >= m->length) return i;
    const int64_t hidden = m->hidden, wide = m->heads * m->dim, narrow = m->kv_heads * m->dim, inner = m->inner;
    float *x = m->work, *normed = x + n * hidden, *query = normed + n * hidden, *key = query + n * wide;
    float *value = key + n * narrow, *context = value + n * narrow, *gate = context + n * wide, *up = gate + n * inner;
    float *scores = up + n * inner;
    for (int64_t i = 0; i < n; i++)
        memcpy(x + i * hidden, m->embedding + tokens[i] * hidden, (size_t)hidden * sizeof(float));
    for (const Layer *l = layers; l < layers + m->layers; l++) {
        rms_norm(x, l->input_norm, normed, n, hidden, m->eps);
        product(m, normed, l->query, l->query_bias, query, n, hidden, wide, 0);
        product(m, normed, l->key, l->key_bias, key, n, hidden, narrow, 0);
        product(m, normed, l->value, l->value_bias, value, n, hidden, narrow, 0);
        attention(m, (Rows){m, l, positions, query, key, context, scores, value, n, 0, 0});
        product(m, context, l->out, l->out_bias, x, n, wide, hidden, 1);
        rms_norm(x, l->post_norm, normed, n, hidden, m->eps);
        product(m, normed, l->gate, l->gate_bias, gate, n, hidden, inner, 0);
        product(m, normed, l->up, l->up_bias, up, n, hidden, inner, 0);
        for (int64_t j = 0; j < n * inner; j++) gate[j] = gate[j] / (1.0f + exponential(-gate[j])) * up[j];
        product(m, gate, l->down, l->down_bias, x, n, inner, hidden, 1);
    }
    rms_norm(x, m->norm, normed, n, hidden, m->eps);
    product(m, normed, m->head, m->head_bias, logits, n, hidden, m->vocabulary, 0);
    return n;
}

// Softmax attention of one row to a cache of bfloat16, query heads in groups that read one key head.
// Keys are shared out in spans, each with a softmax of its own, which are joined in their order: sums
// do not depend on how many threads there are.

#pragma once

#include <cmath>
#include <vector>

#include "powers.h"
#include "lanes.h"
#include "team.h"

constexpr int64_t LEAST_SPAN = 128;  // keys
constexpr int64_t MOST_SPANS = 32;
constexpr int QUERIES = 4;  // heads of a group that are worked on together

struct Queries {
    const uint16_t* rows;  // [heads][dim]
    int64_t heads, kv_heads, dim;
    float scale;
};

// Keys and values of a layer, [kv_heads] of [count][dim], `stride` numbers apart.
struct Cache {
    uint16_t *keys, *values;
    int64_t stride, count;
};

// What a span has of a head: the highest score, the sum of powers, and theirs times the values.
struct Partial {
    float* at;
    float& highest() { return at[0]; }
    float& mass() { return at[1]; }
    float* total() { return at + 16; }
};

struct Attention {
    const float* queries;  // scaled, so that scores are powers of two
    int64_t group, dim;
    Cache cache;
    int64_t spans, length;
    float* partials;

    Partial partial(int64_t head, int64_t span) const {
        return {partials + (head * spans + span) * (dim + 16)};
    }
};

// Scores of `COUNT` neighbouring heads for `KEYS` neighbouring keys.
template <int COUNT, int KEYS>
void scores_of(const float* queries, const uint16_t* keys, int64_t dim, float* scores,
               int64_t length) {
    Lanes sums[COUNT][KEYS];
    for (auto& row : sums)
        for (auto& each : row) each = zero();
    for (int64_t d = 0; d < dim; d += 16) {
        Lanes key[KEYS];
        for (int k = 0; k < KEYS; ++k) key[k] = widen(keys + k * dim + d, 0);
        for (int q = 0; q < COUNT; ++q) {
            const Lanes query = load(queries + q * dim + d);
            for (int k = 0; k < KEYS; ++k) sums[q][k] = add_product(query, key[k], sums[q][k]);
        }
    }
    for (int q = 0; q < COUNT; ++q)
        for (int k = 0; k < KEYS; ++k) scores[q * length + k] = sum(sums[q][k]);
}

// Values times the powers of `COUNT` neighbouring heads, `WIDE` lanes of them.
template <int COUNT, int WIDE>
void values_of(const float* powers, int64_t length, const uint16_t* values, int64_t dim,
               int64_t keys, float* const* totals) {
    Lanes sums[COUNT][WIDE];
    for (auto& row : sums)
        for (auto& each : row) each = zero();
    for (int64_t k = 0; k < keys; ++k, values += dim) {
        Lanes value[WIDE];
        for (int w = 0; w < WIDE; ++w) value[w] = widen(values + 16 * w, 0);
        for (int q = 0; q < COUNT; ++q) {
            const Lanes power = spread(powers[q * length + k]);
            for (int w = 0; w < WIDE; ++w)
                sums[q][w] = add_product(power, value[w], sums[q][w]);
        }
    }
    for (int q = 0; q < COUNT; ++q)
        for (int w = 0; w < WIDE; ++w) store(totals[q] + 16 * w, sums[q][w]);
}

// 2^(score - highest) of a head's keys in place; their sum.
inline float powers_of(float* scores, int64_t keys, float& highest) {
    highest = scores[0];
    for (int64_t k = 1; k < keys; ++k) highest = scores[k] > highest ? scores[k] : highest;
    for (int64_t k = 0; k < keys; ++k) scores[k] = two_to(scores[k] - highest);
    Lanes lanes = zero();
    int64_t k = 0;
    for (; k + 16 <= keys; k += 16) lanes = add(lanes, load(scores + k));
    float mass = sum(lanes);
    for (; k < keys; ++k) mass += scores[k];
    return mass;
}

// `COUNT` heads from `head` on, in one span.
template <int COUNT>
void attend_heads(const Attention& work, int64_t head, int64_t span, float* scores) {
    const int64_t first = span * work.length, dim = work.dim, left = work.cache.count - first;
    const int64_t keys = left < work.length ? left : work.length;
    const int64_t place = head / work.group * work.cache.stride + first * dim;
    const float* queries = work.queries + head * dim;
    int64_t k = 0;
    for (; k + SCORED_KEYS <= keys; k += SCORED_KEYS)
        scores_of<COUNT, SCORED_KEYS>(queries, work.cache.keys + place + k * dim, dim, scores + k,
                                      work.length);
    for (; k < keys; ++k)
        scores_of<COUNT, 1>(queries, work.cache.keys + place + k * dim, dim, scores + k,
                            work.length);
    float* totals[COUNT];
    for (int q = 0; q < COUNT; ++q) {
        Partial partial = work.partial(head + q, span);
        partial.mass() = powers_of(scores + q * work.length, keys, partial.highest());
        totals[q] = partial.total();
    }
    int64_t d = 0;
    for (; d + 16 * VALUE_LANES <= dim; d += 16 * VALUE_LANES) {
        values_of<COUNT, VALUE_LANES>(scores, work.length, work.cache.values + place + d, dim, keys,
                                      totals);
        for (auto& total : totals) total += 16 * VALUE_LANES;
    }
    for (; d < dim; d += 16) {
        values_of<COUNT, 1>(scores, work.length, work.cache.values + place + d, dim, keys, totals);
        for (auto& total : totals) total += 16;
    }
}

inline void attend_span(const Attention& work, int64_t kv_head, int64_t span) {
    static thread_local std::vector<Line> room;
    float* scores = lines_of<float>(room, QUERIES * work.length);
    int64_t head = kv_head * work.group;
    for (int64_t left = work.group; left > 0; left -= QUERIES, head += QUERIES) {
        if (left >= 4) attend_heads<4>(work, head, span, scores);
        else if (left == 3) attend_heads<3>(work, head, span, scores);
        else if (left == 2) attend_heads<2>(work, head, span, scores);
        else attend_heads<1>(work, head, span, scores);
    }
}

// A head's spans joined, bfloat16 [dim].
inline void join_spans(const Attention& work, int64_t head, uint16_t* out) {
    float highest = work.partial(head, 0).highest(), mass = 0;
    for (int64_t s = 1; s < work.spans; ++s) {
        const float other = work.partial(head, s).highest();
        highest = other > highest ? other : highest;
    }
    float weights[MOST_SPANS];
    for (int64_t s = 0; s < work.spans; ++s) {
        Partial partial = work.partial(head, s);
        weights[s] = two_to(partial.highest() - highest);
        mass += weights[s] * partial.mass();
    }
    for (int64_t d = 0; d < work.dim; d += 16) {
        Lanes total = zero();
        for (int64_t s = 0; s < work.spans; ++s)
            total = add_product(spread(weights[s] / mass), load(work.partial(head, s).total() + d),
                                total);
        narrow(out + d, total);
    }
}

// bfloat16 [heads][dim] -> out, the same.
inline void attend(const Queries& queries, const Cache& cache, uint16_t* out, const Team& team) {
    static thread_local std::vector<Line> room;
    const int64_t heads = queries.heads, dim = queries.dim;
    int64_t spans = (cache.count + LEAST_SPAN - 1) / LEAST_SPAN;
    spans = spans < MOST_SPANS ? spans : MOST_SPANS;
    const int64_t length = ((cache.count + spans - 1) / spans + 15) / 16 * 16;
    spans = (cache.count + length - 1) / length;
    float* wide = lines_of<float>(room, heads * dim + heads * spans * (dim + 16));
    const Lanes scale = spread(queries.scale * LOG2_E);
    for (int64_t k = 0; k < heads * dim; k += 16)
        store(wide + k, add_product(widen(queries.rows + k, 0), scale, zero()));
    const int64_t group = heads / queries.kv_heads;
    const Attention work{wide, group, dim, cache, spans, length, wide + heads * dim};
    in_parallel(queries.kv_heads * spans, team, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) attend_span(work, i / spans, i % spans);
    });
    for (int64_t head = 0; head < heads; ++head) join_spans(work, head, out + head * dim);
}

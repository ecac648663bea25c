// A decoder layer of one token: what Python would call one by one, rounded to bfloat16 where it would.

#pragma once

#include <vector>

#include "attention.h"
#include "rows.h"
#include "stored.h"

// One product; without a bias `bias` is null.
struct Linear {
    const void* weights;
    const uint32_t* zeros;  // of weights in the order of a file
    const uint16_t* pairs;  // or the scales alone, of those and of eight bits
    const uint16_t* bias;
    int64_t inputs, outputs, group, form;

    void run(const uint16_t* x, uint16_t* out, const Team& team) const {
        const Plain plain{inputs, outputs, weights, pairs, bias};
        if (form & EIGHT) return eight_bits_row(plain, x, out, team);
        if (form & SIXTEEN) return sixteen_bits_row(plain, x, out, team);
        if (form & STORED) {
            const File file{static_cast<const uint32_t*>(weights), zeros, pairs, bias};
            return few_rows_stored(x, 1, inputs, outputs, group, &file, int(form), out, outputs,
                                   team);
        }
        few_rows(x, 1, inputs, outputs, group, static_cast<const uint8_t*>(weights), pairs,
                 int(form), bias, out, team);
    }
};

// As `quant/native_layer.py` fills it in. Queries, keys and values are the outputs of one product or
// of three, gate and up those of one (which may gate by itself) or of two.
struct Layer {
    Linear project[3], mix, open[2], close;
    int64_t projects, opens;
    const uint16_t *attention_norm, *mlp_norm;
    int64_t width, heads, kv_heads, dim;
    double epsilon;
};

inline void norm(const uint16_t* x, const uint16_t* weight, int64_t width, double epsilon,
                 uint16_t* out) {
    Lanes squares[4] = {zero(), zero(), zero(), zero()};
    for (int64_t k = 0, i = 0; k < width; k += 16, ++i) {
        const Lanes values = widen(x + k, 0);
        squares[i % 4] = add_product(values, values, squares[i % 4]);
    }
    const float all = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const Lanes scale = spread(1.f / std::sqrt(all / float(width) + float(epsilon)));
    for (int64_t k = 0; k < width; k += 16) {
        const Lanes normed = rounded_lanes(add_product(widen(x + k, 0), scale, zero()));
        narrow(out + k, add_product(normed, widen(weight + k, 0), zero()));
    }
}

// A head's rotary turn, in place.
inline void turn(uint16_t* row, const uint16_t* cos, const uint16_t* sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t k = 0; k < half; k += 16) {
        const Lanes first = widen(row + k, 0), second = widen(row + half + k, 0);
        const auto turned = [&](Lanes one, Lanes other, int64_t at) {
            const Lanes kept = rounded_lanes(add_product(one, widen(cos + at, 0), zero()));
            const Lanes moved = rounded_lanes(add_product(other, widen(sin + at, 0), zero()));
            narrow(row + at, add(kept, moved));
        };
        turned(first, second, k);
        turned(second, first, half + k);
    }
}

inline void add_to(uint16_t* out, const uint16_t* more, int64_t width) {
    for (int64_t k = 0; k < width; k += 16) narrow(out + k, add(widen(out + k, 0), widen(more + k, 0)));
}

// Products of one input, their outputs side by side.
inline void run_all(const Linear* linears, int64_t count, const uint16_t* x, uint16_t* out,
                    const Team& team) {
    for (int64_t i = 0; i < count; out += linears[i++].outputs) linears[i].run(x, out, team);
}

// `cache` has as many keys and values as came before; this token's are written behind them.
inline void run_layer(const Layer& layer, const uint16_t* x, const uint16_t* cos,
                      const uint16_t* sin, const Cache& cache, uint16_t* out, const Team& team) {
    static thread_local std::vector<Line> room;
    const int64_t width = layer.width, dim = layer.dim, inner = layer.close.inputs;
    const int64_t heads = layer.heads, kv_heads = layer.kv_heads, all = heads + 2 * kv_heads;
    uint16_t* normed = lines_of<uint16_t>(room, 2 * width + (all + heads) * dim + 2 * inner);
    uint16_t* projected = normed + width;
    uint16_t* mixed = projected + all * dim;
    uint16_t* opened = mixed + heads * dim;
    uint16_t* closed = opened + 2 * inner;

    norm(x, layer.attention_norm, width, layer.epsilon, normed);
    run_all(layer.project, layer.projects, normed, projected, team);
    for (int64_t head = 0; head < heads + kv_heads; ++head)
        turn(projected + head * dim, cos, sin, dim);
    for (int64_t head = 0; head < kv_heads; ++head) {
        const int64_t place = head * cache.stride + cache.count * dim;
        const uint16_t* key = projected + (heads + head) * dim;
        std::memcpy(cache.keys + place, key, 2 * dim);
        std::memcpy(cache.values + place, key + kv_heads * dim, 2 * dim);
    }
    const Queries queries{projected, heads, kv_heads, dim, 1.f / std::sqrt(float(dim))};
    attend(queries, {cache.keys, cache.values, cache.stride, cache.count + 1}, mixed, team);
    layer.mix.run(mixed, out, team);
    add_to(out, x, width);

    norm(out, layer.mlp_norm, width, layer.epsilon, normed);
    run_all(layer.open, layer.opens, normed, opened, team);
    if (!(layer.open[0].form & GATED)) gate_row(opened, inner);
    layer.close.run(opened, closed, team);
    add_to(out, closed, width);
}

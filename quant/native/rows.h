// Products for few rows, for which the weights are read once.

#pragma once

#include <vector>

#include "powers.h"
#include "product.h"
#include "team.h"

constexpr int MOST_ROWS = 8;

inline Lanes rounded_lanes(Lanes values) {
    uint16_t narrowed[BLOCK];
    narrow(narrowed, values);
    return widen(narrowed, 0);
}

// What one group adds to a block's outputs, for all rows.
template <int ROWS>
inline void add_group(const Product& p, int64_t g, const uint8_t* packed, const Scales& scales,
                      Lanes* total) {
    const int64_t groups = p.inputs / p.group;
    Lanes sums[ROWS];
    group_sums<ROWS>(p.x, p.inputs, g * p.group, p.group, packed, sums);
    for (int r = 0; r < ROWS; ++r)
        total[r] = scales.add_to(total[r], sums[r], spread(p.x.totals[r * groups + g]), p.form);
}

// One block's outputs for all rows, in fp32, with the bias.
template <int ROWS>
void block_outputs(const Product& p, int64_t block, Lanes* total) {
    const uint8_t* packed = p.packed + block * p.inputs * 8;
    for (int r = 0; r < ROWS; ++r) total[r] = zero();
    for (int64_t g = 0; g < p.inputs / p.group; ++g, packed += p.group * 8)
        add_group<ROWS>(p, g, packed, {pair_of(p, block, g), p.form}, total);
    for (int r = 0; r < ROWS; ++r) total[r] = with_bias(p.bias, block, total[r]);
}

// x / (1 + e^-x), rounded to bfloat16 as all that is handed on is.
inline Lanes silu(Lanes values) {
    alignas(64) float x[BLOCK];
    store(x, values);
    for (float& each : x) {
        const float out = each / (1.f + two_to(each * -LOG2_E));
        each = each < -87.f ? 0.f : out;
    }
    return rounded_lanes(load(x));
}

// silu of a block's outputs times those of another, both rounded before.
template <int ROWS>
inline void gate_block(Lanes* gate, const Lanes* up) {
    for (int r = 0; r < ROWS; ++r)
        gate[r] = add_product(silu(rounded_lanes(gate[r])), rounded_lanes(up[r]), zero());
}

template <int ROWS>
inline void narrow_block(const Product& p, int64_t block, const Lanes* total) {
    for (int r = 0; r < ROWS; ++r) narrow(p.out + r * p.stride + block * BLOCK, total[r]);
}

template <int ROWS>
void four_bits(const Product& p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        Lanes total[ROWS];
        block_outputs<ROWS>(p, block, total);
        narrow_block<ROWS>(p, block, total);
    }
}

// Of outputs side by side, silu of the one half times the other.
template <int ROWS>
void gated(const Product& p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        Lanes gate[ROWS], up[ROWS];
        block_outputs<ROWS>(p, block, gate);
        block_outputs<ROWS>(p, block + p.outputs / 2 / BLOCK, up);
        gate_block<ROWS>(gate, up);
        narrow_block<ROWS>(p, block, gate);
    }
}

using FewRows = void (*)(const Product&, int64_t, int64_t);
inline constexpr FewRows FEW_ROWS[2][MOST_ROWS] = {
    {four_bits<1>, four_bits<2>, four_bits<3>, four_bits<4>, four_bits<5>, four_bits<6>,
     four_bits<7>, four_bits<8>},
    {gated<1>, gated<2>, gated<3>, gated<4>, gated<5>, gated<6>, gated<7>, gated<8>},
};

// x bfloat16 [rows][inputs] -> out [rows][outputs], of which gated ones are half as many.
inline void few_rows(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                     int64_t group, const uint8_t* packed, const uint16_t* pairs, int form,
                     const uint16_t* bias, uint16_t* out, const Team& team) {
    static thread_local std::vector<float> room;
    const bool gates = form & GATED;
    const int64_t columns = gates ? outputs / 2 : outputs;
    for (int64_t done = 0; done < rows; done += MOST_ROWS) {
        const int64_t now = rows - done < MOST_ROWS ? rows - done : MOST_ROWS;
        const Activations ready = prepare_four(x + done * inputs, now, inputs, group, room);
        const Product product{ready, inputs, outputs, group, packed,
                              pairs, form,   bias,    out + done * columns, columns};
        const FewRows body = FEW_ROWS[gates][now - 1];
        in_parallel(columns / BLOCK, team,
                    [&](int64_t first, int64_t last) { body(product, first, last); });
    }
}

// Weights of a product that are not packed.
struct Plain {
    int64_t inputs, outputs;
    const void* weights;      // [outputs][inputs]
    const uint16_t* scales;   // of the outputs, for eight bits
    const uint16_t* bias;
};

// x bfloat16 [inputs] -> out [outputs]; a bias is added to the rounded sum, as torch would.
inline void eight_bits_row(const Plain& p, const uint16_t* x, uint16_t* out, const Team& team) {
    static thread_local std::vector<float> room;
    const float* wide = widen_row(x, p.inputs, room);
    const auto* weights = static_cast<const int8_t*>(p.weights);
    in_parallel(p.outputs, team, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
            const float sum = dot_eight(wide, weights + n * p.inputs, p.inputs);
            out[n] = round_one(sum * wide_one(p.scales[n]));
            if (p.bias) out[n] = round_one(wide_one(out[n]) + wide_one(p.bias[n]));
        }
    });
}

// The same of bfloat16 weights; rounded once, with the bias.
inline void sixteen_bits_row(const Plain& p, const uint16_t* x, uint16_t* out, const Team& team) {
    const auto* weights = static_cast<const uint16_t*>(p.weights);
    in_parallel(p.outputs, team, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
            const float sum = dot_sixteen(x, weights + n * p.inputs, p.inputs);
            out[n] = round_one(p.bias ? sum + wide_one(p.bias[n]) : sum);
        }
    });
}

// silu of the first half of a row times the second, into the first; rounded after each.
inline void gate_row(uint16_t* row, int64_t half) {
    for (int64_t k = 0; k < half; k += 16)
        narrow(row + k, add_product(silu(widen(row + k, 0)), widen(row + half + k, 0), zero()));
}

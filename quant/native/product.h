// A product of rows of activations with 4-bit weights.
//
// Order of the weights: blocks of 16 outputs, [N / 16][K / 8][16] words of 32 bits. A word holds
// eight inputs of one output; input i of eight is nibble {0, 4, 1, 5, 2, 6, 3, 7}[i], so that two
// neighbours lie in the halves of the word, where the products of bfloat16 pairs want them.
// Order of scales: [N / 16][K / group][2][16] of 16 bits, 16 scales, then what goes with them:
//   zero points: the weight is (q - 8 - t) * s, t being the zero point less 8;
//   offsets:     the weight is (q - 8) * s + t.

#pragma once

#include "lanes.h"

constexpr int BLOCK = 16;
// Of which type pairs are, what the second is, what is made of the outputs; or how many bits weights
// have that are not packed, or that they are in the order of a file.
constexpr int FLOAT16 = 1, OFFSETS = 2, GATED = 4, EIGHT = 8, SIXTEEN = 16, STORED = 32;

struct Product {
    Activations x;
    int64_t inputs, outputs, group;
    const uint8_t* packed;
    const uint16_t* pairs;
    int form;
    const uint16_t* bias;
    uint16_t* out;
    int64_t stride;  // numbers from one row of `out` to the next
};

inline const uint16_t* pair_of(const Product& p, int64_t block, int64_t group) {
    return p.pairs + (block * (p.inputs / p.group) + group) * 2 * BLOCK;
}

// What a group has for the 16 outputs of a block.
struct Scales {
    Lanes scale, other;

    Scales() = default;
    Scales(const uint16_t* pair, int form)
        : scale(widen(pair, form & FLOAT16)), other(widen(pair + BLOCK, form & FLOAT16)) {}

    // Of sums over (q - 8) * x and over x alone: the weights' own, added to `total`.
    Lanes add_to(Lanes total, Lanes sums, Lanes all, int form) const {
        if (form & OFFSETS) return add_product(other, all, add_product(scale, sums, total));
        return add_product(scale, take_product(other, all, sums), total);
    }
};

inline Lanes with_bias(const uint16_t* bias, int64_t block, Lanes total) {
    return bias ? add(total, widen(bias + block * BLOCK, 0)) : total;
}

// Products for many rows: weights are unpacked for a few outputs and inputs at a time, into the
// nearest cache, and multiplied by all rows from there. Every row is summed in the same order,
// whatever rows it comes with.

#pragma once

#include <vector>

#include "product.h"
#include "team.h"

constexpr int ITEM_BLOCKS = 4;
constexpr int64_t ITEM_ROWS = 252;   // their sums, 64 outputs wide, stay in a cache of 1 MB
constexpr int64_t MOST_INPUTS = 128;  // unpacked at a time

// Inputs of one group that are unpacked at a time: as many as divide it.
inline int64_t inputs_at_a_time(int64_t group) {
    int64_t length = MOST_INPUTS;
    while (group % length) length -= BLOCK;
    return length;
}

template <int ROWS>
void add_tile(const Product& p, const Input* x, int64_t stride, const float* all, int64_t steps,
              const Unpacked* weights, int64_t length, const Scales* scales, float* totals) {
    Lanes sums[ROWS][TILE_BLOCKS];
    tile_sums<ROWS>(x, stride, weights, length, sums);
    // Unrolled, so that they are never anywhere but in registers.
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int b = 0; b < TILE_BLOCKS; ++b) {
            float* total = totals + (r * ITEM_BLOCKS + b) * BLOCK;
            const Lanes everything = spread(all[r * steps]);
            store(total, scales[b].add_to(load(total), sums[r][b], everything, p.form));
        }
}

using AddTile = void (*)(const Product&, const Input*, int64_t, const float*, int64_t,
                         const Unpacked*, int64_t, const Scales*, float*);
constexpr AddTile ADD_TILE[] = {nullptr,     add_tile<1>, add_tile<2>, add_tile<3>,
                                add_tile<4>, add_tile<5>, add_tile<6>};
static_assert(TILE_ROWS == 6, "one for each number of rows");

// Where some inputs of a block are, and what their group has for it.
struct Place {
    const uint8_t* packed;
    const uint16_t* pair;
};

// Weights that lie in the products' order.
struct InOrder {
    const Product& p;

    void find(int64_t block, int64_t count, int64_t start, int64_t, Place* places) const {
        for (int64_t at = block; at < block + count; ++at)
            *places++ = {p.packed + (at * p.inputs + start) * BLOCK / 2,
                         pair_of(p, at, start / p.group)};
    }
};

// The outputs of `ITEM_BLOCKS` blocks from `block`, of `rows` rows from `row`.
template <class Weights>
void item(const Product& p, const Weights& from, int64_t length, int64_t block, int64_t row,
          int64_t rows) {
    static thread_local std::vector<Line> unpacked, summed, wide;
    const int64_t steps = p.inputs / length, left = p.outputs / BLOCK - block;
    const int count = left < ITEM_BLOCKS ? int(left) : ITEM_BLOCKS;
    Unpacked* weights = lines_of<Unpacked>(unpacked, length * BLOCK * ITEM_BLOCKS);
    float* totals = lines_of<float>(summed, rows * BLOCK * ITEM_BLOCKS);
    for (int64_t i = 0; i < rows * BLOCK * ITEM_BLOCKS; ++i) totals[i] = 0;
    for (int64_t step = 0; step < steps; ++step) {
        const int64_t start = step * length;
        Scales scales[ITEM_BLOCKS];
        Place places[ITEM_BLOCKS];
        from.find(block, count, start, length, places);
        for (int b = 0; b < ITEM_BLOCKS; ++b) {
            // Beyond the last block it comes again, and is not stored.
            const Place& place = places[b < count ? b : count - 1];
            scales[b] = {place.pair, p.form};
            unpack(place.packed, length, weights + place_in_tiles(b, length));
        }
        int64_t stride = p.x.stride;
        const Input* x = inputs_of(p.x.narrow + row * stride + start, rows, length, stride, wide);
        const float* all = p.x.totals + row * steps + step;
        for (int64_t r = 0; r < rows; r += TILE_ROWS) {
            const int64_t now = rows - r < TILE_ROWS ? rows - r : TILE_ROWS;
            for (int64_t next = r + TILE_ROWS; next < rows && next < r + 2 * TILE_ROWS; ++next)
                for (int64_t k = 0; k < length; k += int64_t(64 / sizeof(Input)))
                    _mm_prefetch(reinterpret_cast<const char*>(x + next * stride + k),
                                 _MM_HINT_T0);
            for (int b = 0; b < ITEM_BLOCKS; b += TILE_BLOCKS)
                ADD_TILE[now](p, x + r * stride, stride, all + r * steps, steps,
                              weights + place_in_tiles(b, length), length, scales + b,
                              totals + (r * ITEM_BLOCKS + b) * BLOCK);
        }
    }
    for (int64_t r = 0; r < rows; ++r)
        for (int b = 0; b < count; ++b)
            narrow(p.out + (row + r) * p.stride + (block + b) * BLOCK,
                   with_bias(p.bias, block + b, load(totals + (r * ITEM_BLOCKS + b) * BLOCK)));
}

// x bfloat16 [rows][inputs] times the weights, plus a bias if there is one -> out [rows][outputs].
template <class Weights>
void many_rows(Product& p, const Weights& from, int64_t rows, const Team& team) {
    if (!rows) return;
    static thread_local std::vector<float> room;
    const int64_t length = inputs_at_a_time(p.group), steps = p.inputs / length;
    room.resize(rows * steps);
    float* totals = room.data();
    in_parallel(rows, team, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row)
            sum_groups(p.x.narrow + row * p.x.stride, p.inputs, length, totals + row * steps);
    });
    p.x.totals = totals;
    const int64_t blocks = p.outputs / BLOCK, across = (blocks + ITEM_BLOCKS - 1) / ITEM_BLOCKS;
    const int64_t down = (rows + ITEM_ROWS - 1) / ITEM_ROWS;
    const int64_t height = ((rows + down - 1) / down + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    in_parallel(across * down, team, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t row = i % down * height, left = rows - row;
            if (left > 0)
                item(p, from, length, i / down * ITEM_BLOCKS, row, left < height ? left : height);
        }
    });
}

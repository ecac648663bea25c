// Products of weights in the order of a file. What a group has for a few blocks is brought into the
// products' own order, in the nearest cache, and goes through the same code as weights that lie in
// that order: so every sum is the same number.

#pragma once

#include <vector>

#include "file_order.h"
#include "rows.h"
#include "tiles.h"

constexpr int LINE_BLOCKS = 8;  // of which a row of the file is a cache line

// Outputs of `count` blocks from `first`, for all rows, in fp32, with the bias.
template <int ROWS>
void line_outputs(const Product& p, const File& file, int64_t outputs, int64_t first,
                  int64_t count, Lanes (&total)[LINE_BLOCKS][ROWS]) {
    static thread_local std::vector<Line> room;
    const int64_t size = p.group * 8;
    uint8_t* packed = lines_of<uint8_t>(room, LINE_BLOCKS * size);
    uint16_t pairs[LINE_BLOCKS * 2 * BLOCK];
    for (auto& block : total)
        for (auto& row : block) row = zero();
    for (int64_t g = 0; g < p.inputs / p.group; ++g) {
        put_weights(file, outputs, first, count, g * p.group, p.group, packed, size);
        put_pairs(file, p.form, outputs, first, count, g, pairs, 2 * BLOCK);
        for (int64_t b = 0; b < count; ++b)
            add_group<ROWS>(p, g, packed + b * size, {pairs + b * 2 * BLOCK, p.form}, total[b]);
    }
    for (int64_t b = 0; b < count; ++b)
        for (auto& row : total[b]) row = with_bias(file.bias, first + b, row);
}

// `first` and `last` count cache lines; gated ones are of two linears, with half of the outputs each.
template <int ROWS>
void stored_lines(const Product& p, const File* files, int64_t first, int64_t last) {
    const bool gates = p.form & GATED;
    const int64_t outputs = gates ? p.outputs / 2 : p.outputs, blocks = outputs / BLOCK;
    for (int64_t left = first * LINE_BLOCKS; left < blocks && left < last * LINE_BLOCKS;
         left += LINE_BLOCKS) {
        const int64_t count = blocks - left < LINE_BLOCKS ? blocks - left : LINE_BLOCKS;
        Lanes total[LINE_BLOCKS][ROWS], passed[LINE_BLOCKS][ROWS];
        line_outputs<ROWS>(p, files[0], outputs, left, count, total);
        if (gates) line_outputs<ROWS>(p, files[1], outputs, left, count, passed);
        for (int64_t b = 0; b < count; ++b) {
            if (gates) gate_block<ROWS>(total[b], passed[b]);
            narrow_block<ROWS>(p, left + b, total[b]);
        }
    }
}

// As `few_rows`, of one file, or of two if they are gated; rows of `out` are `stride` numbers apart.
inline void few_rows_stored(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                            int64_t group, const File* files, int form, uint16_t* out,
                            int64_t stride, const Team& team) {
    using Body = void (*)(const Product&, const File*, int64_t, int64_t);
    static constexpr Body BODIES[MOST_ROWS] = {
        stored_lines<1>, stored_lines<2>, stored_lines<3>, stored_lines<4>,
        stored_lines<5>, stored_lines<6>, stored_lines<7>, stored_lines<8>};
    static thread_local std::vector<float> room;
    const int64_t columns = form & GATED ? outputs / 2 : outputs;
    const int64_t lines = (columns / BLOCK + LINE_BLOCKS - 1) / LINE_BLOCKS;
    for (int64_t done = 0; done < rows; done += MOST_ROWS) {
        const int64_t now = rows - done < MOST_ROWS ? rows - done : MOST_ROWS;
        const Activations ready = prepare_four(x + done * inputs, now, inputs, group, room);
        const Product product{ready,   inputs, outputs, group,               nullptr,
                              nullptr, form,   nullptr, out + done * stride, stride};
        const Body body = BODIES[now - 1];
        in_parallel(lines, team, [&](int64_t first, int64_t last) {
            body(product, files, first, last);
        });
    }
}

// Weights for `many_rows`, of a file.
struct InFile {
    const Product& p;
    const File& file;

    void find(int64_t block, int64_t count, int64_t start, int64_t length, Place* places) const {
        static thread_local std::vector<Line> room;
        uint8_t* packed = lines_of<uint8_t>(room, ITEM_BLOCKS * (length * 8 + 4 * BLOCK));
        auto* pairs = reinterpret_cast<uint16_t*>(packed + ITEM_BLOCKS * length * 8);
        put_weights(file, p.outputs, block, count, start, length, packed, length * 8);
        put_pairs(file, p.form, p.outputs, block, count, start / p.group, pairs, 2 * BLOCK);
        for (int64_t b = 0; b < count; ++b)
            places[b] = {packed + b * length * 8, pairs + b * 2 * BLOCK};
    }
};

// What Python calls: products of 4-, 8- and 16-bit weights, the way from a file's order of 4-bit weights
// to theirs, and a decoder layer of one token. Built for one kind of processor at a time; `lanes.h`
// has what differs.

#include <cstdint>
#include <cstring>
#include <vector>

#include "layer.h"
#include "rows.h"
#include "stored.h"
#include "team.h"
#include "tiles.h"

namespace {

int place_of(int input) { return 4 * (input / 2) + 16 * (input % 2); }

// Eight nibbles of each of 16 outputs, [8][16] bytes -> one block's 16 words.
void join_words(const uint8_t* q, uint8_t* packed) {
    uint32_t words[BLOCK] = {};
    for (int i = 0; i < 8; ++i)
        for (int n = 0; n < BLOCK; ++n) words[n] |= uint32_t{q[i * BLOCK + n]} << place_of(i);
    std::memcpy(packed, words, sizeof words);
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// x bfloat16 [rows][inputs] times the weights, plus a bias if there is one -> out [rows][outputs];
// or, where they are gated, silu of the first half of the outputs times the second.
void lowvram_four_bits(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                       int64_t group, const uint8_t* packed, const uint16_t* pairs, int form,
                       const uint16_t* bias, uint16_t* out, unsigned threads, Start start) {
    few_rows(x, rows, inputs, outputs, group, packed, pairs, form, bias, out, {threads, start});
}

// x bfloat16 [rows][inputs] times int8 [outputs][inputs], each row times its bfloat16 scale.
void lowvram_eight_bits(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                        const int8_t* weights, const uint16_t* scales, uint16_t* out,
                        unsigned threads, Start start) {
    const Team team{threads, start};
    const Plain product{inputs, outputs, weights, scales, nullptr};
    for (int64_t row = 0; row < rows; ++row)
        eight_bits_row(product, x + row * inputs, out + row * outputs, team);
}

// One bfloat16 row of x [inputs] times bfloat16 [outputs][inputs], plus a bias if there is one.
void lowvram_sixteen_bits(const uint16_t* x, int64_t inputs, int64_t outputs,
                          const uint16_t* weights, const uint16_t* bias, uint16_t* out,
                          unsigned threads, Start start) {
    const Team team{threads, start};
    sixteen_bits_row({inputs, outputs, weights, nullptr, bias}, x, out, team);
}

// The same for many rows, of which none are gated; those of x are `apart` numbers apart.
void lowvram_four_bits_many(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                            int64_t group, const uint8_t* packed, const uint16_t* pairs, int form,
                            const uint16_t* bias, uint16_t* out, int64_t apart, unsigned threads,
                            Start start) {
    Product p{{x, nullptr, nullptr, apart}, inputs, outputs, group, packed, pairs, form, bias, out,
              outputs};
    many_rows(p, InOrder{p}, rows, {threads, start});
}

// The first of these for a file's weights; gated ones are of two files, with half of the outputs each.
// Rows of `out` are `stride` numbers apart.
void lowvram_four_bits_stored(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                              int64_t group, const File* files, int form, uint16_t* out,
                              int64_t stride, unsigned threads, Start start) {
    few_rows_stored(x, rows, inputs, outputs, group, files, form, out, stride, {threads, start});
}

// The same for many rows, of which none are gated; those of x are `apart` numbers apart.
void lowvram_four_bits_many_stored(const uint16_t* x, int64_t rows, int64_t inputs,
                                   int64_t outputs, int64_t group, const File* file, int form,
                                   uint16_t* out, int64_t stride, int64_t apart, unsigned threads,
                                   Start start) {
    Product p{{x, nullptr, nullptr, apart}, inputs, outputs, group,  nullptr,
              nullptr,                      form,   file->bias, out, stride};
    many_rows(p, InFile{p, *file}, rows, {threads, start});
}

// The file's int32 qweight [K][N / 8], qzeros [K / group][N / 8] and scales [K / group][N] (of 16
// bits, kept as they are; `form` says of which kind) -> packed and pairs.
void lowvram_from_file(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales,
                       int form, int64_t inputs, int64_t outputs, int64_t group, uint8_t* packed,
                       uint16_t* pairs, unsigned threads, Start start) {
    const File file{qweight, qzeros, scales, nullptr};
    const Team team{threads, start};
    const int64_t groups = inputs / group, blocks = outputs / BLOCK;
    const auto bring = [&](int64_t begin, int64_t end) {
        for (int64_t left = begin * LINE_BLOCKS; left < blocks && left < end * LINE_BLOCKS;
             left += LINE_BLOCKS) {
            const int64_t count = blocks - left < LINE_BLOCKS ? blocks - left : LINE_BLOCKS;
            put_weights(file, outputs, left, count, 0, inputs, packed + left * inputs * 8,
                        inputs * 8);
            for (int64_t g = 0; g < groups; ++g)
                put_pairs(file, form, outputs, left, count, g,
                          pairs + (left * groups + g) * 2 * BLOCK, groups * 2 * BLOCK);
        }
    };
    in_parallel((blocks + LINE_BLOCKS - 1) / LINE_BLOCKS, team, bring);
}

// A decoder layer of one token, bfloat16 x [width] -> out [width], after `filled` others: their keys and
// values, `stride` numbers apart for each key head, get one row more. `cos` and `sin` are [dim], the
// first half of the sines negated.
void lowvram_layer(const Layer* layer, const uint16_t* x, const uint16_t* cos, const uint16_t* sin,
                   uint16_t* keys, uint16_t* values, int64_t stride, int64_t filled, uint16_t* out,
                   unsigned threads, Start start) {
    together({threads, start}, [&](const Team& crew) {
        run_layer(*layer, x, cos, sin, {keys, values, stride, filled}, out, crew);
    });
}

// Whole numbers 0 to 15, uint8 [outputs][inputs] -> packed.
void lowvram_from_rows(const uint8_t* rows, int64_t inputs, int64_t outputs, uint8_t* packed,
                       unsigned threads, Start start) {
    const Team team{threads, start};
    in_parallel(outputs / BLOCK, team, [&](int64_t first, int64_t last) {
        uint8_t q[8 * BLOCK];
        for (int64_t b = first; b < last; ++b)
            for (int64_t k = 0; k < inputs; k += 8) {
                for (int i = 0; i < 8; ++i)
                    for (int n = 0; n < BLOCK; ++n)
                        q[i * BLOCK + n] = rows[(b * BLOCK + n) * inputs + k + i];
                join_words(q, packed + (b * inputs + k) * 8);
            }
    });
}

}  // extern "C"
#pragma GCC visibility pop

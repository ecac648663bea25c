// What Python calls: products of 4-bit and 8-bit weights, the way from a file's order of 4-bit weights
// to theirs, and a decoder layer of one token. Built for one kind of processor at a time; `lanes.h`
// has what differs.

#include <cstdint>
#include <cstring>
#include <vector>

#include "layer.h"
#include "rows.h"
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

// 16 nibbles of two words of the file, whose output j of eight is nibble {0, 4, 1, 5, ...}[j].
void split_file_words(const uint32_t* words, uint8_t* q) {
    for (int half = 0; half < 2; ++half)
        for (int j = 0; j < 8; ++j) q[8 * half + j] = words[half] >> place_of(j) & 15;
}

}  // namespace

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

// The same for many rows, of which none are gated.
void lowvram_four_bits_many(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                            int64_t group, const uint8_t* packed, const uint16_t* pairs, int form,
                            const uint16_t* bias, uint16_t* out, unsigned threads, Start start) {
    const Team team{threads, start};
    const Activations as_they_are{x, nullptr, nullptr};
    many_rows({as_they_are, inputs, outputs, group, packed, pairs, form, bias, out}, rows, team);
}

// The file's int32 qweight [K][N / 8], qzeros [K / group][N / 8] and scales [K / group][N] (of 16
// bits, kept as they are; `form` says of which kind) -> packed and pairs.
void lowvram_from_file(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales,
                       int form, int64_t inputs, int64_t outputs, int64_t group, uint8_t* packed,
                       uint16_t* pairs, unsigned threads, Start start) {
    const Team team{threads, start};
    const int64_t words = outputs / 8, groups = inputs / group, blocks = outputs / BLOCK;
    uint16_t shifted[16];
    for (int q = 0; q < 16; ++q) shifted[q] = form & FLOAT16 ? half_one(q - 8) : round_one(q - 8);
    // Eight blocks are a cache line of the file's rows.
    in_parallel((blocks + 7) / 8, team, [&](int64_t begin, int64_t end) {
        const int64_t stop = 8 * end < blocks ? 8 * end : blocks;
        for (int64_t left = 8 * begin; left < stop; left += 8) {
            const int64_t right = left + 8 < stop ? left + 8 : stop;
            uint8_t q[8 * BLOCK];
            for (int64_t k = 0; k < inputs; k += 8)
                for (int64_t b = left; b < right; ++b) {
                    for (int i = 0; i < 8; ++i)
                        split_file_words(qweight + (k + i) * words + 2 * b, q + i * BLOCK);
                    join_words(q, packed + (b * inputs + k) * 8);
                }
            for (int64_t g = 0; g < groups; ++g)
                for (int64_t b = left; b < right; ++b) {
                    uint16_t* pair = pairs + (b * groups + g) * 2 * BLOCK;
                    split_file_words(qzeros + g * words + 2 * b, q);
                    std::memcpy(pair, scales + g * outputs + b * BLOCK, 2 * BLOCK);
                    for (int n = 0; n < BLOCK; ++n) pair[BLOCK + n] = shifted[q[n]];
                }
        }
    });
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

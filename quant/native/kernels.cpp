// 4-bit and 8-bit products for few rows, and the way from a file's order of 4-bit weights to theirs
// and back to 16 bits. Built for one kind of processor at a time; `lanes.h` has what differs.

#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"
#include "team.h"
#include "tiles.h"

namespace {

constexpr int MOST_ROWS = 8;

Lanes rounded_lanes(Lanes values) {
    uint16_t narrowed[BLOCK];
    narrow(narrowed, values);
    return widen(narrowed, 0);
}

int place_of(int input) { return 4 * (input / 2) + 16 * (input % 2); }

// One block's outputs for all rows, in fp32, with the bias.
template <int ROWS>
void block_outputs(const Product& p, int64_t block, Lanes* total) {
    const int64_t groups = p.inputs / p.group;
    const uint8_t* packed = p.packed + block * p.inputs * 8;
    for (int r = 0; r < ROWS; ++r) total[r] = zero();
    for (int64_t g = 0; g < groups; ++g) {
        Lanes sums[ROWS];
        group_sums<ROWS>(p.x, p.inputs, g * p.group, p.group, packed, sums);
        const Scales scales(p, block, g);
        for (int r = 0; r < ROWS; ++r)
            total[r] = scales.add_to(total[r], sums[r], spread(p.x.totals[r * groups + g]), p.form);
        packed += p.group * 8;
    }
    for (int r = 0; r < ROWS; ++r) total[r] = with_bias(p, block, total[r]);
}

// x / (1 + e^-x), rounded to bfloat16 as all that is handed on is.
Lanes silu(Lanes values) {
    alignas(64) float x[BLOCK];
    store(x, values);
    for (float& each : x) {
        float power = each * -1.44269504f;
        power = power < 126.f ? power : 126.f;
        power = power > -126.f ? power : -126.f;
        const float whole = power + 12582912.f - 12582912.f;
        const float part = power - whole;
        float two = 1.54035304e-4f;  // 2^part, by its series
        for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f,
                        6.93147181e-1f, 1.f})
            two = two * part + c;
        int32_t bits;
        std::memcpy(&bits, &two, sizeof bits);
        bits += int32_t(whole) * (1 << 23);
        std::memcpy(&two, &bits, sizeof two);
        const float out = each / (1.f + two);
        each = each < -87.f ? 0.f : out;
    }
    return rounded_lanes(load(x));
}

template <int ROWS>
void four_bits(const Product& p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
        Lanes total[ROWS];
        block_outputs<ROWS>(p, block, total);
        for (int r = 0; r < ROWS; ++r) narrow(p.out + r * p.outputs + block * BLOCK, total[r]);
    }
}

// Of outputs side by side, silu of the one half times the other.
template <int ROWS>
void gated(const Product& p, int64_t first, int64_t last) {
    const int64_t half = p.outputs / 2;
    for (int64_t block = first; block < last; ++block) {
        Lanes gate[ROWS], up[ROWS];
        block_outputs<ROWS>(p, block, gate);
        block_outputs<ROWS>(p, block + half / BLOCK, up);
        for (int r = 0; r < ROWS; ++r) {
            const Lanes open = silu(rounded_lanes(gate[r]));
            narrow(p.out + r * half + block * BLOCK,
                   add_product(open, rounded_lanes(up[r]), zero()));
        }
    }
}

using FourBits = void (*)(const Product&, int64_t, int64_t);
constexpr FourBits FOUR_BITS[2][MOST_ROWS] = {
    {four_bits<1>, four_bits<2>, four_bits<3>, four_bits<4>, four_bits<5>, four_bits<6>,
     four_bits<7>, four_bits<8>},
    {gated<1>, gated<2>, gated<3>, gated<4>, gated<5>, gated<6>, gated<7>, gated<8>},
};

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
                       const uint16_t* bias, uint16_t* out, unsigned threads, Team team) {
    static thread_local std::vector<float> room;
    const bool gates = form & GATED;
    const int64_t columns = gates ? outputs / 2 : outputs;
    for (int64_t done = 0; done < rows; done += MOST_ROWS) {
        const int64_t now = rows - done < MOST_ROWS ? rows - done : MOST_ROWS;
        const Activations ready = prepare_four(x + done * inputs, now, inputs, group, room);
        const Product product{ready,  inputs, outputs, group, packed,
                              pairs, form,   bias,    out + done * columns};
        const FourBits body = FOUR_BITS[gates][now - 1];
        in_parallel(columns / BLOCK, 8, threads, team,
                    [&](int64_t first, int64_t last) { body(product, first, last); });
    }
}

// x bfloat16 [rows][inputs] times int8 [outputs][inputs], each row times its bfloat16 scale.
void lowvram_eight_bits(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                        const int8_t* weights, const uint16_t* scales, uint16_t* out,
                        unsigned threads, Team team) {
    static thread_local std::vector<float> room;
    for (int64_t row = 0; row < rows; ++row) {
        const float* wide = widen_row(x + row * inputs, inputs, room);
        uint16_t* place = out + row * outputs;
        in_parallel(outputs, 16, threads, team, [&](int64_t first, int64_t last) {
            for (int64_t n = first; n < last; ++n) {
                const float sum = dot_eight(wide, weights + n * inputs, inputs);
                place[n] = round_one(sum * wide_one(scales[n]));
            }
        });
    }
}

// The same for many rows, of which none are gated.
void lowvram_four_bits_many(const uint16_t* x, int64_t rows, int64_t inputs, int64_t outputs,
                            int64_t group, const uint8_t* packed, const uint16_t* pairs, int form,
                            const uint16_t* bias, uint16_t* out, unsigned threads, Team team) {
    const Activations as_they_are{x, nullptr, nullptr};
    many_rows({as_they_are, inputs, outputs, group, packed, pairs, form, bias, out}, rows, threads,
              team);
}

// The file's int32 qweight [K][N / 8], qzeros [K / group][N / 8] and scales [K / group][N] (of 16
// bits, kept as they are; `form` says of which kind) -> packed and pairs.
void lowvram_from_file(const uint32_t* qweight, const uint32_t* qzeros, const uint16_t* scales,
                       int form, int64_t inputs, int64_t outputs, int64_t group, uint8_t* packed,
                       uint16_t* pairs, unsigned threads, Team team) {
    const int64_t words = outputs / 8, groups = inputs / group, blocks = outputs / BLOCK;
    uint16_t shifted[16];
    for (int q = 0; q < 16; ++q) shifted[q] = form & FLOAT16 ? half_one(q - 8) : round_one(q - 8);
    // Eight blocks are a cache line of the file's rows.
    in_parallel((blocks + 7) / 8, 4, threads, team, [&](int64_t begin, int64_t end) {
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

// Whole numbers 0 to 15, uint8 [outputs][inputs] -> packed.
void lowvram_from_rows(const uint8_t* rows, int64_t inputs, int64_t outputs, uint8_t* packed,
                       unsigned threads, Team team) {
    in_parallel(outputs / BLOCK, 4, threads, team, [&](int64_t first, int64_t last) {
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

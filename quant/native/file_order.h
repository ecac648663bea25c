// The way from a file's order of 4-bit weights to that of the products.

#pragma once

#include "product.h"

// A linear as the file has it: qweight [K][N / 8] and qzeros [K / group][N / 8], whose output j of the
// eight of a word is nibble PLACES[j], and scales [K / group][N]. Without a bias `bias` is null.
struct File {
    const uint32_t *qweight, *qzeros;
    const uint16_t *scales, *bias;
};

constexpr int PLACES[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// Of a square of nibbles whose rows are words: what is above the diagonal of two rows changes
// places with what is below it.
template <int SHIFT>
inline void change_places(__m256i& above, __m256i& below, int kept) {
    const __m256i moved = _mm256_srli_epi32(above, SHIFT);
    const __m256i changed = _mm256_and_si256(_mm256_xor_si256(moved, below), _mm256_set1_epi32(kept));
    below = _mm256_xor_si256(below, changed);
    above = _mm256_xor_si256(above, _mm256_slli_epi32(changed, SHIFT));
}

// Words [8][8] of 32 bits, lanes of rows to rows of lanes.
inline void transpose(__m256i* rows) {
    __m256i twos[8], fours[8];
    for (int i = 0; i < 8; i += 2) {
        twos[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        twos[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            fours[i + 2 * j] = _mm256_unpacklo_epi64(twos[i + j], twos[i + j + 2]);
            fours[i + 2 * j + 1] = _mm256_unpackhi_epi64(twos[i + j], twos[i + j + 2]);
        }
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

// Eight inputs of up to four blocks: rows of the file, `words` apart -> packed, blocks `apart` bytes
// apart.
inline void turn_eight(const uint32_t* file, int64_t words, int64_t blocks, uint8_t* packed,
                       int64_t apart) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(2 * blocks)), lanes);
    __m256i rows[8], outputs[8];
    for (int i = 0; i < 8; ++i)
        rows[PLACES[i]] = _mm256_maskload_epi32(reinterpret_cast<const int*>(file + i * words), there);
    for (int i = 0; i < 4; ++i) change_places<16>(rows[i], rows[i + 4], 0x0000ffff);
    for (int i = 0; i < 4; ++i) {
        const int row = 4 * (i / 2) + i % 2;
        change_places<8>(rows[row], rows[row + 2], 0x00ff00ff);
    }
    for (int i = 0; i < 8; i += 2) change_places<4>(rows[i], rows[i + 1], 0x0f0f0f0f);
    // Every word now has eight inputs of one output; the outputs of a word of the file follow.
    for (int j = 0; j < 8; ++j) outputs[j] = rows[PLACES[j]];
    transpose(outputs);
    for (int64_t word = 0; word < 2 * blocks; ++word)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(packed + word / 2 * apart + word % 2 * 32), outputs[word]);
}

// `length` inputs from `start` of `count` blocks from `first`, of `outputs` outputs -> packed,
// blocks `apart` bytes apart.
inline void put_weights(const File& file, int64_t outputs, int64_t first, int64_t count,
                        int64_t start, int64_t length, uint8_t* packed, int64_t apart) {
    constexpr int AHEAD = 128;
    const int64_t words = outputs / 8;
    const uint32_t* from = file.qweight + start * words + 2 * first;
    for (int64_t k = 0; k < length; k += 8, from += 8 * words) {
        // Every row is on another page, where the processor does not look ahead by itself.
        for (int i = 0; i < 8; ++i)
            _mm_prefetch(reinterpret_cast<const char*>(from + (AHEAD + i) * words), _MM_HINT_T0);
        for (int64_t b = 0; b < count; b += 4)
            turn_eight(from + 2 * b, words, count - b < 4 ? count - b : 4,
                       packed + b * apart + k * 8, apart);
    }
}

// Eight zero points less 8, as 16 bits of the scales' type.
inline __m128i zero_points(uint32_t word, int float16) {
    const __m256i shifts = _mm256_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28);
    const __m256i nibbles = _mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shifts);
    const __m256i numbers = _mm256_and_si256(nibbles, _mm256_set1_epi32(15));
    const __m256 wide = _mm256_cvtepi32_ps(_mm256_sub_epi32(numbers, _mm256_set1_epi32(8)));
    if (float16) return _mm256_cvtps_ph(wide, 0);
    const __m256i narrow = _mm256_srli_epi32(_mm256_castps_si256(wide), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(narrow), _mm256_extracti128_si256(narrow, 1));
}

// What group `group` has for `count` blocks from `first` -> pairs, blocks `apart` numbers apart.
inline void put_pairs(const File& file, int form, int64_t outputs, int64_t first, int64_t count,
                      int64_t group, uint16_t* pairs, int64_t apart) {
    const uint16_t* scales = file.scales + group * outputs + first * BLOCK;
    const uint32_t* zeros = file.qzeros + group * (outputs / 8) + 2 * first;
    for (int64_t b = 0; b < count; ++b, pairs += apart) {
        std::memcpy(pairs, scales + b * BLOCK, 2 * BLOCK);
        for (int half = 0; half < 2; ++half)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(pairs + BLOCK + 8 * half),
                             zero_points(zeros[2 * b + half], form & FLOAT16));
    }
}
